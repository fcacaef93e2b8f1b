"""The planted bugs: the catalog is in order, friendly input shows none of them, and each shows on its own input."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.reference.grouped_topk import grouped_topk
from moe_fuzz.reference.routing import softmax_scores, topk_sigmoid
from moe_fuzz.reference.routing import topk_softmax as reference

# the interpreter computes in numpy, which mentions the overflows and all-NaN rows that are meant here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = torch.nan, torch.inf
CHECKS = {
    "error", "structure", "written", "ids", "finite", "padding", "shared", "expert_map", "selection", "ties", "order",
    "weights", "fence", "canary", "isolation", "batch_invariance", "determinism", "capture", "replay",
    "crash", "hang", "oom",
    "count", "slots", "experts", "fill", "tail", "inverse", "stable",
    "dropped", "exact", "bound", "statistical", "relabel", "shards", "scaling", "backends",
    "scale", "codes",
    "ranks", "residual", "pads",
}  # fmt: skip
REFERENCES = {"topk_softmax": reference, "topk_sigmoid": topk_sigmoid, "grouped_topk": grouped_topk}
#: Those that launch a Triton kernel whatever the input; the others compute with torch, or launch none on a CPU.
KERNELS = ("nan_sentinel", "negative_nan_key", "reads_past_logits", "writes_past_ids", "scratch_in_input",
           "memset_rounded_up", "id_left_unwritten", "padding_weight_not_zeroed")  # fmt: skip
ROUTERS = [bug for bug in PLANTED if bug.op in REFERENCES]
EVERY = pytest.mark.parametrize("planted", ROUTERS, ids=lambda planted: planted.name)


def load(name):
    planted = get_planted(name)
    return getattr(importlib.import_module(f"moe_fuzz.planted.{planted.module}"), planted.function)


def logits_of(tokens, experts, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_catalog_covers_every_check_alone():
    assert {p.check for p in PLANTED} == CHECKS
    assert {p.check for p in PLANTED if p.only} == CHECKS
    assert len({p.name for p in PLANTED}) == len(PLANTED) >= 20
    assert get_planted("nan_argmax") in PLANTED
    assert get_planted("no_such_bug") is None


def test_the_catalog_needs_no_torch():
    code = "import sys, moe_fuzz.planted.catalog; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@EVERY
def test_the_docstring_names_the_upstream_issue(planted):
    function = load(planted.name)
    assert planted.upstream in inspect.getdoc(function)
    assert list(inspect.signature(function).parameters)[:3] == ["logits", "top_k", "renormalize"]
    imports = {line for line in inspect.getsource(sys.modules[function.__module__]).splitlines() if "import" in line}
    assert not [line for line in imports if "moe_fuzz" in line]


@pytest.mark.parametrize("planted", [
    pytest.param(bug, id=bug.name, marks=[pytest.mark.interpreter] if bug.name in KERNELS else []) for bug in ROUTERS
])  # fmt: skip
@pytest.mark.parametrize("renormalize", [False, True])
def test_friendly_input_shows_nothing(planted, renormalize):
    """E = 8, k = 2, T = 4, float32, normal logits, no padding, no bias, two groups that both stay. `scratch_in_input`
    spoils its input unseen."""
    logits = logits_of(4, 8)
    groups = {"n_group": 2, "topk_group": 2} if planted.op == "grouped_topk" else {}
    weights, ids = load(planted.name)(logits.clone(), 2, renormalize=renormalize, **groups)
    expected = REFERENCES[planted.op](logits, 2, renormalize=renormalize, **groups)
    torch.testing.assert_close(weights, expected[0], rtol=1e-6, atol=0)
    assert torch.equal(ids, expected[1])


# ---- what must stay right, for the bugs that one check alone can find -----------------------------------------------


def assert_sound(logits, got, top_k, renormalize=False, bias=None):
    """Distinct ids in range, finite weights, and weights right for the ids."""
    weights, ids = got
    assert ids.shape == weights.shape == (len(logits), top_k)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    picked = softmax_scores(logits, bias)[0].gather(1, ids.long())
    exact = picked / picked.sum(1, keepdim=True) if renormalize else picked
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0)


def hostile(experts):
    rows = [[NAN], [-INF], [INF], [3e38, -3e38], [NAN, 1.0], [INF, NAN, -INF, 0.0], [0.0]]
    return torch.tensor([(row * experts)[:experts] for row in rows])


PURE = [p for p in PLANTED if p.only and p.module in {"routing_numerics", "routing_state"} and p.check != "finite"]


@pytest.mark.parametrize("planted", PURE, ids=lambda planted: planted.name)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (8, 3), (33, 32), (60, 6), (257, 2)])
def test_pure_bugs_keep_ids_distinct_and_weights_finite(planted, experts, top_k):
    logits = torch.cat([hostile(experts), logits_of(4, experts)])
    for renormalize in (False, True):
        weights, ids = load(planted.name)(logits.clone(), top_k, renormalize=renormalize)
        assert (ids.sort(1).values.diff(dim=1) > 0).all()
        assert ((ids >= 0) & (ids < experts)).all()
        assert weights.isfinite().all()
        assert (weights >= 0).all()


# ---- each bug on its own input --------------------------------------------------------------------------------------


def test_nan_gives_one_expert_k_times():
    logits = logits_of(3, 8)
    logits[1] = NAN
    assert load("nan_argmax")(logits, 2)[1][1].tolist() == [0, 0]


@pytest.mark.interpreter
def test_nan_gives_the_id_past_the_last():
    logits = logits_of(3, 8)
    logits[1] = NAN
    assert load("nan_sentinel")(logits, 2)[1][1].tolist() == [8, 8]


@pytest.mark.interpreter
def test_a_negative_nan_loses_to_the_lanes_past_e():
    logits = logits_of(3, 6)
    logits[1, 1:] = -torch.tensor(NAN)
    weights, ids = load("negative_nan_key")(logits, 3)
    assert ids[1].tolist() == [0, 6, 7]
    assert weights.isfinite().all()
    assert_sound(logits[:1], (weights[:1], ids[:1]), 3)


@pytest.mark.interpreter
def test_the_last_id_of_an_odd_k_is_left():
    logits = logits_of(4, 8)
    out = torch.zeros(4, 3), torch.full((4, 3), 77, dtype=torch.int32)
    load("id_left_unwritten")(logits, 3, out=out)
    assert torch.equal(out[1][:, :2], reference(logits, 3)[1][:, :2])
    assert (out[1][:, 2] == 77).all()


@pytest.mark.interpreter
def test_the_slack_behind_the_outputs_is_cleared():
    logits, slack = logits_of(3, 8), torch.full((32,), 7.0)
    out = slack[:9].view(3, 3), torch.empty(4, 3, dtype=torch.int32)[:3]
    assert_sound(logits, load("memset_rounded_up")(logits, 3, out=out), 3)
    assert slack[9:].tolist() == [0.0] * 3 + [7.0] * 20


@pytest.mark.interpreter
def test_the_last_block_of_ids_is_stored_whole():
    logits, buffer = logits_of(5, 8), torch.full((32,), 77, dtype=torch.int32)
    assert_sound(logits, load("writes_past_ids")(logits, 2, out=(torch.empty(5, 2), buffer[:10].view(5, 2))), 2)
    assert (buffer[10:16] != 77).all()
    assert (buffer[16:] == 77).all()


@pytest.mark.interpreter
def test_the_logits_serve_as_scratch():
    logits = logits_of(4, 8)
    before = logits.clone()
    assert_sound(before, load("scratch_in_input")(logits, 2), 2)
    assert (logits == -INF).sum(1).tolist() == [2] * 4


@pytest.mark.interpreter
def test_the_row_is_read_in_vectors_of_four():
    """The columns past E are another tensor's. With them unmapped the process would die; here they are watched."""
    from moe_fuzz.planted import routing_memory

    seen = []
    interpreter = sys.modules["triton.runtime.interpreter"]._interpreter
    load_memory = interpreter.load
    storage = torch.zeros(4 * 6 + 8)

    def watch(pointers, mask, other, *rest):
        seen.append(pointers[mask].max())
        return load_memory(pointers, mask, other, *rest)

    interpreter.load = watch
    try:
        routing_memory.reads_past_logits(storage[:24].view(4, 6), 2)
    finally:
        interpreter.load = load_memory
    assert max(seen) == storage.data_ptr() + 4 * (3 * 6 + 7)


@pytest.mark.interpreter
def test_padding_keeps_its_weight():
    logits, flags = logits_of(3, 8), torch.tensor([False, True, False])
    weights, ids = load("padding_weight_not_zeroed")(logits, 2, is_padding=flags, padding="minus_one")
    assert ids[1].tolist() == [-1, -1]
    assert (weights[1] > 0).all()
    assert_sound(logits[::2], (weights[::2], ids[::2]), 2)


def test_renormalizing_zero_by_zero():
    logits, bias = torch.tensor([[200.0, 0.0, 1.0, 0.0]]), torch.tensor([-9.0, 1.0, 1.5, 0.0])
    assert load("renorm_zero_division")(logits, 2, renormalize=True, bias=bias)[0].isnan().all()


def test_masking_with_zero_lets_a_taken_expert_win_again():
    ids = load("masked_with_zero")(logits_of(1, 8), 2, bias=torch.full((8,), -5.0))[1]
    assert ids[0, 0] == ids[0, 1]


def test_the_weight_is_the_biased_score():
    logits, bias = logits_of(2, 8), torch.linspace(0, 1, 8)
    weights, ids = load("biased_weight")(logits, 2, bias=bias)
    torch.testing.assert_close(weights.double(), softmax_scores(logits, bias)[1].gather(1, ids.long()))


def test_only_128_by_8_takes_the_wrong_branch():
    router = load("branch_128_8")
    for experts, top_k in [(128, 7), (127, 8), (256, 8)]:
        assert_sound(logits_of(2, experts), router(logits_of(2, experts), top_k), top_k)
    torch.testing.assert_close(router(logits_of(2, 128), 8)[0].sum(1), torch.ones(2))


def test_lanes_past_e_enter_the_sum():
    logits = logits_of(5, 6)
    weights, ids = load("padded_lanes_in_sum")(logits, 6)
    assert torch.equal(ids, reference(logits, 6)[1])
    expected = (logits.exp() / (logits.exp().sum(1, keepdim=True) + 2)).gather(1, ids.long())
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("experts", [33, 60, 257])
def test_the_tail_experts_never_win(experts):
    logits = logits_of(8, experts)
    logits[:, -1] = 30.0
    got = load("tail_experts_dropped")(logits, 4)
    assert_sound(logits, got, 4)
    assert (got[1] < experts - 1).all()


def test_a_lane_keeps_four_candidates():
    logits = logits_of(2, 256).clamp(-5.0, 5.0)
    logits[0, 3::32] = torch.arange(6.0, 14.0)  # all in one lane
    logits[1, 3:11] = torch.arange(6.0, 14.0)
    got = load("four_a_lane")(logits, 8)
    assert_sound(logits, got, 8)
    assert got[1][0, :4].tolist() == [227, 195, 163, 131]
    assert got[1][0, 4] % 32 != 3
    assert torch.equal(got[1][1], reference(logits, 8)[1][1])
    assert torch.equal(load("four_a_lane")(logits[:, :128], 8)[1], reference(logits[:, :128], 8)[1])


def test_scores_within_a_bf16_step_become_ties():
    logits = torch.tensor([[0.0, 0.001, -1.0]])
    assert load("bf16_scores")(logits, 2)[1].tolist() == [[0, 1]]
    assert reference(logits, 2)[1].tolist() == [[1, 0]]


def test_ties_fall_to_the_highest_id():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    got = load("reversed_ties")(logits, 2)
    assert got[1].tolist() == [[1, 3]]
    assert_sound(logits, got, 2)


def test_slots_are_not_sorted():
    logits = logits_of(64, 60)
    got = load("unsorted_slots")(logits, 8)
    expected = reference(logits, 8)
    assert_sound(logits, got, 8)
    assert torch.equal(got[1].sort(1).values, expected[1].sort(1).values)
    assert not torch.equal(got[1], expected[1])


def test_outputs_of_another_dtype():
    logits = logits_of(2, 6)
    ids = load("int64_ids")(logits, 2)[1]
    assert ids.dtype == torch.int64
    assert torch.equal(ids.int(), reference(logits, 2)[1])
    assert load("weights_in_input_dtype")(logits.bfloat16(), 2)[0].dtype == torch.bfloat16


def test_no_tokens_raise():
    with pytest.raises(ZeroDivisionError):
        load("zero_tokens_raises")(torch.empty(0, 8), 2)
    assert_sound(logits_of(130, 8), load("zero_tokens_raises")(logits_of(130, 8), 2), 2)


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_nan_changes_the_bits_of_its_tile(renormalize):
    router, logits = load("nan_tile_slow_path"), logits_of(32, 61)
    before, changed = router(logits, 4, renormalize=renormalize), logits.clone()
    changed[15] = NAN
    after = router(changed, 4, renormalize=renormalize)
    assert not torch.equal(before[0][:15], after[0][:15])
    assert torch.equal(before[0][16:], after[0][16:])
    for rows in (slice(0, 15), slice(16, 32)):
        assert_sound(logits[rows], (after[0][rows], after[1][rows]), 4, renormalize)


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_small_batch_has_other_bits(renormalize):
    router, logits = load("small_batch_path"), logits_of(40, 61)
    whole, half, few = (router(logits[:n], 4, renormalize=renormalize) for n in (40, 20, 16))
    assert torch.equal(whole[0][:20], half[0])
    assert not torch.equal(whole[0][:16], few[0])
    assert torch.equal(whole[1][:16], few[1])
    assert_sound(logits[:16], few, 4, renormalize)


def test_two_runs_differ_in_the_last_bits():
    router, logits = load("arrival_order"), logits_of(32, 61)
    runs = [router(logits, 4) for _ in range(5)]
    assert any(not torch.equal(runs[0][0], run[0]) for run in runs)
    for run in runs:
        assert_sound(logits, run, 4)


def test_two_runs_fill_undefined_rows_differently():
    router, logits = load("arrival_fill"), logits_of(6, 61)
    logits[2], logits[4, 3:] = NAN, -INF
    runs = [router(logits, 4) for _ in range(5)]
    assert len({tuple(run[1][2].tolist()) for run in runs}) > 1
    for weights, ids in runs:
        assert torch.equal(weights, runs[0][0])
        assert torch.equal(ids[[0, 1, 3, 5]], runs[0][1][[0, 1, 3, 5]])
        assert sorted(ids[4, :3].tolist()) == [0, 1, 2]


def test_a_huge_row_spoils_the_next_call():
    script = """
import torch
from moe_fuzz.planted.routing_state import stale_row_max
x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
first = stale_row_max(x, 2)[0]
stale_row_max(torch.tensor([[0.0, 0.0, 0.0], [9e9, 0.0, 0.0]]), 2)
again = stale_row_max(x, 2)[0]
assert torch.equal(first[0], again[0])
assert again[1].tolist() == [0.0, 0.0]
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "tokens", "experts", "top_k", "code"),
    [
        ("null_workspace", 2, 16, 9, -11),
        ("aborts_on_one_token", 1, 8, 2, -6),
        ("exits_on_launch_error", 17, 60, 2, 3),
        ("waits_for_a_tile", 2, 7, 2, None),
        ("counts_below_zero", 2, 7, 2, 1),
    ],
)
def test_the_process_does_not_come_back(name, tokens, experts, top_k, code):
    script = (  # a limit above what torch has mapped by then, which is gigabytes where it is built for CUDA
        "import resource, torch; from moe_fuzz.planted import routing_process as p; print('up', flush=True);"
        "most = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (2 << 30);"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most));"
        f"p.{name}(torch.zeros({tokens}, {experts}), {top_k})"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"up\n"
        try:
            errors = child.communicate(timeout=20 if code is not None else 1)[1]
        except subprocess.TimeoutExpired:
            child.kill()
            assert code is None
            return
    assert child.returncode == code
    if name == "counts_below_zero":
        assert b"memory" in errors
