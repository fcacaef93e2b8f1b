"""Reference routers, in float64. The docstring of each function is the contract of its op."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIALECTS = ("distinct", "minus_one", "num_experts", "zero_weight", "garbage")


def topk_softmax(
    logits: Tensor,  # [T, E] float32 | bfloat16 | float16, any strides; T >= 0, 1 <= E <= 1024
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32
    scale: float = 1.0,  # finite, >= 0
    is_padding: Tensor | None = None,  # [T] bool
    padding: str = "distinct",
    out: tuple[Tensor, Tensor] | None = None,  # (weights [T, k] float32, ids [T, k] int32), both contiguous
) -> tuple[Tensor, Tensor]:  # (weights [T, k] float32, ids [T, k] int32): `out` where it was given
    """The `top_k` experts of each token, and their weights. No row changes another.

    Selection: by score + bias, score = softmax(logits); without a bias that is the order of the logits themselves.
        Slots descend by the value selected on. Experts with equal logits and equal biases tie: the lowest id comes
        first here; a target may break ties either way unless it declares `lowest_index_first`.
    Weight: the score without the bias, times `scale`; with `renormalize`, divided by the sum of the selected scores, so
        that a row sums to `scale`. Where the selected scores sum below 2^-40 a target's own epsilon may decide: weights
        are then only finite and >= 0. (Here they are the exact ratio even there.)
    Masked experts: a logit of -inf has score 0. With a bias it can still be selected, with weight 0.
    Defined rows: no logit and no bias is NaN or +inf, and at least `top_k` experts have both of them finite
        (`defined_rows`). On any other row that is not flagged: k distinct ids in [0, E), finite weights >= 0, nothing
        else. Here NaN counts as -inf and +inf as the largest number of the dtype.
    Padding: a row flagged in `is_padding` obeys the dialect and no other rule. `distinct`: k distinct ids in [0, E),
        finite weights >= 0. `minus_one`: id -1, weight 0. `num_experts`: id E, weight 0. `zero_weight`: id 0, weight 0.
        `garbage`: anything, even nothing (here the row of `out` stays as it is).

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    validate(logits, top_k, bias, scale, is_padding, padding, out)
    x = finite_above(logits)  # [T, E]
    ids = _best(x if bias is None else softmax_scores(logits, bias)[1], top_k)
    weights = renormalized(x.gather(1, ids), "softmax") if renormalize else _softmax(x).gather(1, ids)  # [T, k]
    return deliver(logits, weights * scale, ids, is_padding, padding, out)


def topk_sigmoid(
    logits: Tensor,  # [T, E] float32 | bfloat16 | float16, any strides; T >= 0, 1 <= E <= 1024
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32
    scale: float = 1.0,  # finite, >= 0
    is_padding: Tensor | None = None,  # [T] bool
    padding: str = "distinct",
    out: tuple[Tensor, Tensor] | None = None,  # (weights [T, k] float32, ids [T, k] int32), both contiguous
) -> tuple[Tensor, Tensor]:  # (weights [T, k] float32, ids [T, k] int32): `out` where it was given
    """The `top_k` experts of each token by the sigmoid of their logits, and their weights. No row changes another.

    The contract is that of `topk_softmax` word for word, with score = sigmoid(logits) = 1 / (1 + exp(-logits)):
    selection by score + bias, weight the score without the bias, and where the selected scores sum below 2^-40 (all
    logits far below 0, chosen by their bias) a target's own epsilon may decide.
    Saturation: in float32 sigmoid(18) = sigmoid(30) = 1. Experts whose scores a float32 cannot tell apart may fall
    either way; experts with equal logits and equal biases tie as in `topk_softmax`.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    validate(logits, top_k, bias, scale, is_padding, padding, out)
    x = finite_above(logits)  # [T, E]
    ids = _best(x if bias is None else sigmoid_scores(logits, bias)[1], top_k)
    weights = renormalized(x.gather(1, ids), "sigmoid") if renormalize else x.sigmoid().gather(1, ids)  # [T, k]
    return deliver(logits, weights * scale, ids, is_padding, padding, out)


def softmax_scores(logits: Tensor, bias: Tensor | None, finite: bool = False) -> tuple[Tensor, Tensor]:
    """Scores and biased scores, float64 [T, E], with NaN as -inf and +inf as the dtype's largest number.

    The scores of a row without one finite logit are 0.
    finite: every logit and every bias is, so that nobody has to look for others; the scores are the same.
    """
    scores = _softmax(logits.double() if finite else finite_above(logits))
    return scores, scores if bias is None else scores + (bias if finite else finite_above(bias))


def sigmoid_scores(logits: Tensor, bias: Tensor | None, finite: bool = False) -> tuple[Tensor, Tensor]:
    """As `softmax_scores`, for the sigmoid: a NaN has the score 0."""
    scores = (logits.double() if finite else finite_above(logits)).sigmoid()
    return scores, scores if bias is None else scores + (bias if finite else finite_above(bias))


SCORES = {"softmax": softmax_scores, "sigmoid": sigmoid_scores}


def defined_rows(logits: Tensor, bias: Tensor | None, top_k: int) -> Tensor:
    """Whether selection and weights of a row are determined by the contract: bool [T]."""
    good = (logits < math.inf).all(dim=1)  # NaN is not
    usable = logits > -math.inf  # [T, E]
    if bias is not None:
        good = good & (bias < math.inf).all()
        usable = usable & (bias > -math.inf)
    return good & (usable.sum(dim=1) >= top_k)


def renormalized(picked: Tensor, scoring: str) -> Tensor:
    """The scores of the picked logits [T, k], float64, over their sum: exact also where the scores underflow."""
    return _softmax(picked if scoring == "softmax" else logsigmoid(picked))


def deliver(
    logits: Tensor, weights: Tensor, ids: Tensor, is_padding: Tensor | None, padding: str,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lays the padding dialect over what was routed, and writes it into `out`, or into new tensors."""
    tokens, experts = logits.shape
    if out is None:
        out = logits.new_empty(ids.shape, dtype=torch.float32), logits.new_empty(ids.shape, dtype=torch.int32)
    flagged = logits.new_zeros(tokens, dtype=torch.bool) if is_padding is None else is_padding  # [T]
    if padding != "distinct":
        weights = weights.masked_fill(flagged[:, None], 0.0)
        ids = ids.masked_fill(flagged[:, None], {"minus_one": -1, "num_experts": experts}.get(padding, 0))
    written = ~flagged if padding == "garbage" else torch.ones_like(flagged)
    out[0][written] = weights[written].float()
    out[1][written] = ids[written].int()
    return out


def finite_above(values: Tensor) -> Tensor:
    """`values` in float64, NaN as -inf, +inf as the dtype's largest number, -0 as +0."""
    largest = torch.finfo(values.dtype).max
    wide = values.to(torch.float64, copy=True)
    return wide.nan_to_num_(nan=-math.inf, posinf=largest, neginf=-math.inf).add_(0.0)


def _best(key: Tensor, top_k: int) -> Tensor:
    """The columns of the `top_k` largest keys of each row, the lowest first among equal ones: int64 [T, k]."""
    return key.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def _softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension; all 0 where every x is -inf, and never 0/0."""
    top = x.amax(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)  # of -inf, no difference is NaN
    e = (x - top).exp_()
    return e.div_(e.sum(dim=1, keepdim=True).clamp(min=1.0))  # a sum with exp(0) in it, or 0


def validate(
    logits: Tensor, top_k: int, bias: Tensor | None, scale: float, is_padding: Tensor | None, padding: str,
    out: tuple[Tensor, Tensor] | None, n_shared: int = 0,
) -> None:  # fmt: skip
    """ValueError for what lies outside the contract; `n_shared` slots follow the routed ones in `out`."""
    if logits.dim() != 2 or logits.dtype not in DTYPES or not 1 <= logits.shape[1] <= 1024:
        raise ValueError("logits must be [T, E] in float32, bfloat16 or float16 with 1 <= E <= 1024, "
                         f"not {list(logits.shape)} {logits.dtype}")
    tokens, experts = logits.shape
    if not 1 <= top_k <= min(experts, 32):
        raise ValueError(f"top_k must be from 1 to min(E, 32) = {min(experts, 32)}, not {top_k}")
    if not 0.0 <= scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be a finite float32 >= 0, not {scale}")
    if padding not in DIALECTS:
        raise ValueError(f"padding must be one of {', '.join(DIALECTS)}, not {padding!r}")
    for name, tensor, shape, dtype in (
        ("bias", bias, (experts,), torch.float32),
        ("is_padding", is_padding, (tokens,), torch.bool),
        ("out[0]", None if out is None else out[0], (tokens, top_k + n_shared), torch.float32),
        ("out[1]", None if out is None else out[1], (tokens, top_k + n_shared), torch.int32),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != logits.device):
            raise ValueError(f"{name} must be {list(shape)} {dtype} on {logits.device}, "
                             f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")
    if out is not None and not (out[0].is_contiguous() and out[1].is_contiguous()):
        raise ValueError("out must be contiguous; route into contiguous buffers and copy")
