"""What the router kernels rank and weigh by (routing_lanes.py, routing_threads.py, routing_top1.py).

A key is an integer: equal ones do not exist, so ids stay distinct whatever the logits are. A comparison of floats would
pick expert 0 again and again on a row of NaN (vllm#39391), or none at all (sglang#30079).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(x):
    """float32 of a float32, bfloat16 or float16; of the latter two the last 13 bits are 0, also those of a NaN."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    elif x.dtype == tl.float16:
        x = (x.to(tl.float32).to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def order_of(x, BEYOND: tl.constexpr, MANY: tl.constexpr):
    """An int32 that orders like the float32 x, -0 like +0, and NaN below -inf.

    NaN costs no instruction of its own: magnitude and sign order like the float, but for NaN, which lies beyond both
    infinities. Added to what takes +inf to the end of the range, a positive NaN wraps around to below everything.
    BEYOND is that: 0x7FFFFF, or 0x7FE000 where the last 13 bits shall stay 0.

    MANY is for a thread that has 16 of them. Of that many comparisons LLVM makes one of a vector, and picks what it
    says from the bits of one integer, for more than what a comparison saves otherwise.
    """
    bits = x.to(tl.int32, bitcast=True)
    if MANY:
        sign = bits >> 31
        order = ((bits & 0x7FFFFFFF) ^ sign) - sign
    else:
        order = tl.where(bits < 0, tl.sub(-0x80000000, bits, sanitize_overflow=False), bits)
    return tl.add(order, BEYOND, sanitize_overflow=False)


@triton.jit
def float_of(order, BEYOND: tl.constexpr):
    """The x of `order_of`."""
    order = tl.sub(order, BEYOND, sanitize_overflow=False)
    sign = order >> 31
    return ((order + sign) ^ (sign & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_of(x, low, real, FULL: tl.constexpr, WIDE: tl.constexpr, MANY: tl.constexpr):
    """Orders like the float32 x, then like `low`, from 0 to 1023; what is not `real` comes last.

    It has 64 bits; 32 where x was `widened`: `low` lies in the 13 bits that are 0.
    """
    if WIDE:
        order = order_of(x, 0x7FFFFF, MANY)
        if not FULL:
            order = tl.where(real, order, -0x80000000)  # the least NaN's, and `low` is less than any real one's
        key = (order.to(tl.int64) << 32) | low
    else:
        key = tl.add(order_of(x, 0x7FE000, MANY), low, sanitize_overflow=False)  # one addition of both
        if not FULL:
            key = tl.where(real, key, -0x80000000)  # the least NaN's, and `low` of any real one is more than 0
    return key


@triton.jit
def value_of(key, WIDE: tl.constexpr):
    """The x of a key."""
    return float_of((key >> 32).to(tl.int32), 0x7FFFFF) if WIDE else float_of(key & -0x2000, 0x7FE000)


@triton.jit
def clamped(x, LARGEST: tl.constexpr, NAN_SAFE: tl.constexpr):
    """NaN becomes -inf and +inf the dtype's largest number, so that no difference of two of them is NaN."""
    if NAN_SAFE:
        x = tl.minimum(tl.where(x > float("-inf"), x, float("-inf")), LARGEST)
    return x


@triton.jit
def top_of(x, LARGEST: tl.constexpr, NAN_SAFE: tl.constexpr):
    """What to subtract from the logits of a row whose largest is x: never -inf, and finite where that is NAN_SAFE."""
    if NAN_SAFE:
        x = tl.minimum(tl.where(x > -3.4028234663852886e38, x, -3.4028234663852886e38), LARGEST)
    else:
        x = tl.maximum(x, -3.4028234663852886e38)
    return x


@triton.jit
def divisor(total):
    """A sum of scores to divide by. With NaN or +inf in a row it is neither, and that row's weights are 0, not NaN."""
    return tl.where(total > 1e-30, total, float("inf"))


@triton.jit
def relative_score(x, top, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr):
    """The score of a logit, before the division: of the softmax relative to the row's `top` logit (`top_of`). At most
    1 for an `x` that is not above `top`, but for NaN and +inf: those are for `saturated`.

    Renormalized ones are relative to the largest selected score, so that their sum is at least 1/2 even where a bias
    has selected experts whose scores underflow: no 0/0 (sglang#31017, flashinfer#3803).
    """
    if not SIGMOID:
        score = tl.exp(x - top)
    elif RENORMALIZE:
        score = tl.exp(tl.minimum(x, 0.0) - tl.minimum(top, 0.0)) / (1.0 + tl.exp(-tl.abs(x)))
    else:
        score = 1.0 / (1.0 + tl.exp(-x))
    return score


@triton.jit
def biased_score(x, top, total, bias, SIGMOID: tl.constexpr):
    """The score of a logit and its bias, which experts are ranked by: the same bits for equal ones, wherever they are.

    The product and the sum of a softmax's are fused by hand. The compiler fuses what it finds side by side: with Triton
    3.6 and a strided bias the products of one list and not of another, so that of two experts with the same logit and
    the same bias the second was the better one.
    """
    if SIGMOID:
        rank = 1.0 / (1.0 + tl.exp(-x)) + bias
    else:
        rank = tl.fma(tl.exp(x - top), tl.broadcast_to(1.0 / total, x.shape), bias)
    return rank


@triton.jit
def saturated(score, NAN_SAFE: tl.constexpr):
    """NaN scores 0, as -inf does, and +inf 1, as the dtype's largest number does. On a GPU that is part of the product
    that makes the score, or one addition, where to clamp the logit would take two instructions."""
    if NAN_SAFE:
        score = tl.minimum(tl.where(score > 0.0, score, 0.0), 1.0)
    return score


@triton.jit
def exchanged(keys, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    """A tuple of N keys with A and B in descending order."""
    a, b = keys[A], keys[B]
    if WIDE:
        swap = a < b  # one comparison of 64 bits, where a maximum and a minimum would take two
        high, low = tl.where(swap, b, a), tl.where(swap, a, b)
    else:
        high, low = tl.maximum(a, b), tl.minimum(a, b)
    return keys[0:A] + (high,) + keys[A + 1 : B] + (low,) + keys[B + 1 : N]


@triton.jit
def row_sum(x):
    """[R, L] float32 -> [R, 1], each half added to the other, again and again: bits that no layout of threads changes.

    The order of `tl.sum` is that of the lanes a row lies in, which are the compiler's choice.
    """
    for _ in tl.static_range(10):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), axis=1)
    return x
