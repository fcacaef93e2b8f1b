"""How blocks of different ranks wait for each other, and whose turn of the two halves of a buffer it is.

State, int64, one a rank, in its own memory: bits 0-15 the blocks of this call that came by, 16-47 calls so far, bit 62
set once a wait was given up. Signals, int32 [block, rank], one pad a rank: how often that rank's block has signalled
and was not waited for yet. They are counts, not flags: a fast rank may signal for its next call before a slow one has
looked for the last, and a flag would be lost then (vllm#2760). When every rank has finished, all are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Spins on $1 until it is above zero, if $2, for at most $3 nanoseconds. 1 where it was seen. The clock is asked every
#: 64th time only: it is slow.
_SPIN = tl.constexpr("""
{
    .reg .pred there, early;
    .reg .u64 begin, now;
    .reg .u32 seen, count;
    mov.u32 $0, 1;
    setp.eq.u32 there, $2, 0;
    @there bra done;
    mov.u64 begin, %globaltimer;
    mov.u32 count, 0;
again:
    ld.acquire.sys.global.u32 seen, [$1];
    setp.gt.s32 there, seen, 0;
    @there bra done;
    add.u32 count, count, 1;
    and.b32 seen, count, 63;
    setp.ne.u32 early, seen, 0;
    @early bra again;
    mov.u64 now, %globaltimer;
    sub.u64 now, now, begin;
    setp.lt.u64 early, now, $3;
    @early bra again;
    mov.u32 $0, 0;
done:
}
""")
_BROKEN = tl.constexpr(62)
_NOBODY = tl.constexpr(255)  # above any rank


@triton.jit
def begin_call(state_ptr, blocks, FIRST: tl.constexpr):
    """(half, broken): the half of the buffers that this call writes, 0 or 1, and whether an earlier wait was given up.

    What peers read of a half they have read before they start the next call, and a call ends only after every peer has
    started it: so a half is free again one call later, without a barrier at the end. The count is the device's own:
    replays of a graph alternate too. The last block to ask moves it on, and all have their answer by then.

    FIRST: this is the first launch of the call; else the count was moved on by an earlier one.
    """
    if FIRST:
        state = tl.atomic_add(state_ptr, 1, sem="relaxed", scope="gpu")
        if (state & 0xFFFF) == blocks - 1:
            tl.atomic_add(state_ptr, (0x10000 - blocks).to(tl.int64), sem="relaxed", scope="gpu")
        half = (state >> 16) & 1
    else:
        state = tl.load(state_ptr)
        half = ((state >> 16) - 1) & 1
    return half, (state >> _BROKEN) & 1


@triton.jit
def meet(
    signals_ptr,  # [R] int64: addresses of the pads
    state_ptr, fault_ptr,  # int64 of this rank
    rank, block, broken, timeout,  # nanoseconds; of a block with several programs, the program
    STAGE: tl.constexpr, WORLD: tl.constexpr, WORLD_PAD: tl.constexpr,
):  # fmt: skip
    """Waits for the same block of every peer; 1 if all came in time. Ordered at system scope: what any thread of theirs
    wrote before is there for every thread of this block behind it."""
    peer = tl.arange(0, WORLD_PAD)
    other = (peer < WORLD) & (peer != rank)
    pads = tl.load(signals_ptr + peer, mask=other, other=0)
    theirs = pads + (block * WORLD + rank) * 4
    own = tl.load(signals_ptr + rank) + (block * WORLD + peer) * 4
    return _signal_and_wait(theirs, own, other, peer, state_ptr, fault_ptr, rank, block, broken, timeout, STAGE)


@triton.jit
def meet_owners(
    buffers_ptr, offset,  # [R] int64: addresses of the buffers; bytes, from where on each has a second pad
    state_ptr, fault_ptr,  # int64 of this rank
    rank, block, part, broken, timeout,  # nanoseconds
    STAGE: tl.constexpr, WORLD: tl.constexpr, WORLD_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tells every rank, this one too, that this part of its sums is there, and waits for all parts of the ranks whose
    sums the program is to read: every PARTS-th, from `part` on. 1 if all came in time.

    The pad is another than that of `meet`: which program signals a word hangs on PARTS here, which may be another at
    the next call, and a peer may be there already. It signals here only behind a `meet` with every rank, though."""
    word = tl.arange(0, WORLD_PAD)
    inside = word < WORLD
    pads = tl.load(buffers_ptr + word, mask=inside, other=0) + offset
    theirs = pads + ((block * PARTS + rank % PARTS) * WORLD + rank // PARTS * PARTS + part) * 4
    own = tl.load(buffers_ptr + rank) + offset + ((block * PARTS + part) * WORLD + word) * 4
    owner = word // PARTS * PARTS + part
    return _signal_and_wait(theirs, own, inside, owner, state_ptr, fault_ptr, rank, block * PARTS + part, broken,
                            timeout, STAGE)  # fmt: skip


@triton.jit
def _signal_and_wait(
    theirs, own, inside,  # addresses of words, and which of them there are
    peer,  # who signals `own`
    state_ptr, fault_ptr, rank, program, broken, timeout, STAGE: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()  # a release covers what its own thread has seen: the stores of the others, by this barrier
    tl.atomic_add(theirs.to(tl.pointer_type(tl.int32)), 1, mask=inside, sem="release", scope="sys")
    seen = tl.inline_asm_elementwise(
        _SPIN, "=&r,l,r,l", [own, inside.to(tl.int32), tl.where(broken != 0, 0, timeout).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()  # nobody looks any more, and what the spinning threads acquired all have
    tl.atomic_add(own.to(tl.pointer_type(tl.int32)), -1, mask=inside & (seen != 0), sem="relaxed", scope="sys")
    came = tl.min(seen, axis=0)
    if came == 0:
        missing = tl.min(tl.where(seen == 0, peer, _NOBODY), axis=0)
        if broken == 0:
            # one store of 64 bits: of several blocks' reports one is left, whole
            tl.store(fault_ptr, pack_fault(rank, missing, program, STAGE))
        tl.atomic_or(state_ptr, tl.full((), 1, tl.int64) << _BROKEN, sem="relaxed", scope="gpu")
    return came


@triton.jit
def pack_fault(rank, peer, block, stage):
    packed = (tl.full((), 1, tl.int64) << 40) + (rank.to(tl.int64) << 32)
    return packed + (peer.to(tl.int64) << 24) + (block.to(tl.int64) << 8) + stage


def unpack_fault(packed: int) -> tuple[int, int, int, int]:
    """(rank, peer, block, stage) of what a block has left."""
    return packed >> 32 & 0xFF, packed >> 24 & 0xFF, packed >> 8 & 0xFFFF, packed & 0xFF
