"""The steps of a case: one alone, several calls in a row, or the replays of a graph over static buffers.

The buffers of a graph mode are kept in mind here, replay by replay, and not when the case is run. A server copies its
real rows in and leaves the rest as it is, so the tail holds what was there: an earlier replay's rows with their faults,
NaN that a layer before left, or the zeros of a buffer that is new. Each step says this of itself, through faults that
name the step a row is from (`stale_rows` with its stream). So a case stays a function of its own JSON, and when the
reducer takes a step away, the tails of the others hold what they held.

Of two sequences of eager calls, one has its steps in the same buffers, too, those of as many rows: what a target keeps
of a call by its tensors' addresses is then there in the next.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_fuzz.case import ALL_MODES, MODES, RANKS, Case, Fault, Scalar, Step
from moe_fuzz.contract import TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops.space import FaultPlace, Means, Space

SINGLE, SEQUENCE = "single", "sequence"  # of eager calls; the other kinds of run are the graph modes
#: What servers capture; and sizes that they round up to these, but a user may ask for.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144, 152, 160, 168, 176,
           184, 192, 200, 208, 216, 224, 232, 240, 248, 256, 512)  # fmt: skip
ODD_BUCKETS = (3, 7, 13, 33, 65, 100)
#: What is in the tail before a replay: most often what was there, else what a layer before has left there.
TAILS = ("", "", "", "nan_rows", "inf_rows", "neg_inf_rows", "huge_rows", "zero_rows")
SMALL = 6  # of the dictionary's token counts: these are cheap, and break most; none at all, a fourth as often
MODEST = 513  # the token counts beyond it are large: hardly ever one that costs as much as a hundred of the others
#: The kinds of token counts, each as often as its share.
SIZES = ("small",) * 6 + ("any",) * 5 + ("large",)
MAX_SEQUENCE, MAX_REPLAYS = 4, 8  # steps

LaidFault = tuple[FaultPlace, int]  # and where it lies, as in `fault_rows`


@dataclass(frozen=True)
class Move:
    """A step in small choices: which of the plan's token counts, how much padding (`padding_rows`), what is in it."""

    size: int
    padding: int
    tail: int
    faults: tuple[LaidFault, ...]


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...]  # token counts: in a graph mode, the buckets
    moves: tuple[Move, ...]


def runs(modes: Sequence[str], device: str) -> tuple[str, ...]:
    """The kinds of run, each as often as its share: three cases in five are a single call. Without CUDA graphs it is
    three in four: a replay shows less there, and costs more."""
    graphs = [mode for mode in ALL_MODES[1:] if mode in modes]
    graphs += [*graphs[:1], *([RANKS] * 3 if RANKS in modes else [])]
    if MODES[0] not in modes:
        return tuple(graphs)
    single = (6 if device == "cuda" else 12) if graphs else 6
    return (SINGLE,) * single + (SEQUENCE, *graphs)


def mode(run: str) -> str:
    """The mode of the cases of a kind of run."""
    return MODES[0] if run in (SINGLE, SEQUENCE) else run


def afforded(
    space: Space, info: TargetInfo, config: Mapping[str, Scalar], run: str, others: Sequence[str], means: Means
) -> tuple[str, tuple[int, ...]]:  # fmt: skip
    """The run, and the token counts that a case of this config can afford in it, the simplest first. A single call,
    if that is among the other kinds of run, where a single step of the simplest costs too much already."""
    tokens = space.tokens(config, means)
    if not info.capabilities.zero_tokens:
        tokens = tuple(count for count in tokens if count)
    if mode(run) == MODES[0]:
        return run, tokens
    most = max(tokens)

    ranks = _ranks(config)

    def affordable(size: int) -> bool:
        return space.affordable(Case(space.op, config, (Step(Labels.range(size)),), 0, run), means)

    sizes = [ranks * size for size in (*BUCKETS, *ODD_BUCKETS) if ranks * size <= most]
    found = tuple(sizes if affordable(max(sizes, default=1)) else filter(affordable, sizes))
    if not found and SINGLE in others:
        return SINGLE, tokens
    return run, found or (ranks * BUCKETS[0],)


def large(
    space: Space, info: TargetInfo, config: Mapping[str, Scalar], run: str, tokens: Sequence[int], means: Means
) -> tuple[int, ...]:
    """Of the token counts that these means afford in such a run, those that the ordinary ones do not."""
    if means.times == 1:
        return ()
    _, ordinary = afforded(space, info, config, run, (), replace(means, times=1))
    most = max(ordinary, default=0)
    return tuple(count for count in tokens if count > most)


def plan(run: str, tokens: Sequence[int], swarm: Sequence[FaultPlace], chosen: random.Random) -> Plan:
    """A plan of a kind of run. tokens: as `afforded` tells them; swarm: the faults."""
    count = chosen.randint(2, chosen.randint(2, MAX_SEQUENCE if run == SEQUENCE else MAX_REPLAYS))  # more often few
    moves = [
        Move(chosen.randint(0, 1), chosen.randint(0, 4), chosen.randrange(len(TAILS)), some(swarm, 2, chosen))
        for _ in range(count)
    ]
    return Plan(_some_sizes(tokens, chosen), tuple(moves))


def some(swarm: Sequence[FaultPlace], most: int, chosen: random.Random) -> tuple[LaidFault, ...]:
    """None to `most` of the faults, each at some rows (`fault_rows`)."""
    places = chosen.sample(swarm, chosen.randint(0, min(most, len(swarm))))
    return tuple((place, chosen.randint(0, 3)) for place in places)


def within(tokens: Sequence[int], faults: Sequence[LaidFault]) -> Sequence[int]:
    """The token counts that all of the faults can be laid into; all, if there are none."""
    most = min((place.max_rows for place, _ in faults if place.max_rows is not None), default=None)
    return tokens if most is None else [count for count in tokens if count <= most] or tokens


def random_plan(
    tokens: Sequence[int], faults: Sequence[LaidFault], padding: int, size: str, chosen: random.Random
) -> Plan:  # fmt: skip
    """A plan for the grid, which has chosen a fault, some padding and a kind of size that must be in it. tokens: as in
    `plan`."""
    moves = [Move(0, min(padding, 4), chosen.randrange(len(TAILS)), tuple(faults))]
    moves += [
        Move(chosen.randint(0, 1), chosen.randint(0, 4), chosen.randrange(len(TAILS)), ())
        for _ in range(chosen.randint(1, MAX_SEQUENCE - 1))
    ]
    chosen.shuffle(moves)
    return Plan(_some_sizes(tokens, chosen, size), tuple(moves))


def make(
    space: Space, config: Mapping[str, Scalar], run: str, plan: Plan, seed: int, target: str, means: Means,
    places: Sequence[FaultPlace] | None = None,
) -> Case:  # fmt: skip
    """The case of a plan; as many of its steps as can be afforded. places: the faults that may be in a tail, if
    not all of the space's."""
    chosen = random.Random(seed)  # positions only; the values come from the case's generator
    refilled = run == SEQUENCE and seed % 2 == 1
    if run == SEQUENCE:
        steps = [make_step(_size(plan, move), move.padding, move.faults, chosen) for move in plan.moves]
        if refilled:
            whole = _whole(plan)
            steps = [replace(step, faults=(*(fault for fault in step.faults if fault.rows), *whole)) for step in steps]
    else:
        known = {place.fault: place.tensor for place in reversed(space.places if places is None else places)}
        steps = _replays(plan, chosen, known, getattr(space, "tails", TAILS), _ranks(config))
    case = Case(space.op, config, tuple(steps), seed, mode(run), target).over_buffers(refilled)
    while len(case.steps) > 1 and not space.affordable(case, means):
        case = replace(case, steps=case.steps[:-1])
    return case


def make_step(tokens: int, padding: int, faults: Sequence[LaidFault], chosen: random.Random) -> Step:
    """A step that has nothing to do with others: `padding`, as in `padding_rows`, each fault with where it lies."""
    rows = Labels.range(tokens)
    padded = padding_rows(rows, padding, chosen)
    laid = []
    for place, where in faults:
        if place.max_rows is not None and tokens > place.max_rows:
            continue
        if not place.on_rows:
            laid.append(Fault(place.fault, place.tensor))
            continue
        named = fault_rows(rows, padded, where, chosen)
        if named:
            laid.append(Fault(place.fault, place.tensor, named))
    return Step(rows, padded, tuple(laid))


def padding_rows(rows: Labels, padding: int, chosen: random.Random) -> Labels:
    """0 to 4: so many quarters of the rows, at the tail, as a CUDA graph pads. 5 and 6: one and two quarters of them,
    anywhere, as where the padded batches of several ranks are joined."""
    count = -(-len(rows) * (padding if padding <= 4 else padding - 4) // 4)
    return rows.last(count) if padding <= 4 else Labels.of(chosen.sample(range(len(rows)), min(count, 64)))


def rank_padding(rows: Labels, ranks: int, padding: int, chosen: random.Random) -> Labels:
    """The tails of as many ranks, each of the same number of rows, of which at least one is full.

    0: all full. 1: any other numbers of tokens. 2: one rank is idle. 3: one rank is full, the others have one token
    (TensorRT-LLM#7965), or none. 4: any other numbers, none among them.
    """
    block, full = len(rows) // ranks, chosen.randrange(ranks)
    idle = chosen.choice([rank for rank in range(ranks) if rank != full])
    alone, found = chosen.randint(0, 1), Labels()
    for rank in range(ranks):
        tokens = block
        if rank != full and padding:
            tokens = alone if padding == 3 else chosen.randint(min(1, block), block)
            tokens = 0 if rank == idle and padding in (2, 4) else tokens
        found = found | rows.first((rank + 1) * block).last(block - tokens)
    return found


def fault_rows(rows: Labels, padded: Labels, where: int, chosen: random.Random) -> Labels:
    """The padding, one row, some rows, or all rows."""
    if where == 0 and padded:
        return padded
    if where == 3 or not rows:
        return rows
    count = 1 if where == 1 else chosen.randint(1, len(rows))
    return Labels.of(chosen.sample(range(len(rows)), min(count, 64)))


# ---- static buffers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """What a row of a static buffer holds: the values of a stream (None: nothing yet), and the faults laid on them."""

    stream: int | None = None
    faults: tuple[str, ...] = ("zero_rows",)


def _replays(
    plan: Plan, chosen: random.Random, known: Mapping[str, str], tails: Sequence[str] = TAILS, ranks: int = 1
) -> list[Step]:  # fmt: skip
    """known: the faults that may be drawn, and the tensor that each lies on. What none of them can bring into a tail is
    not in it. tails: what may be there, as many as there are TAILS."""
    whole = _whole(plan)
    buffers: dict[int, dict[int, _Content]] = {}
    steps = []
    for stream, move in enumerate(plan.moves):
        rows = Labels.range(_size(plan, move))
        padded = (padding_rows(rows, move.padding, chosen) if ranks == 1 else
                  rank_padding(rows, ranks, move.padding, chosen))  # fmt: skip
        buffer = buffers.setdefault(len(rows), {row: _Content() for row in rows})
        tail = tails[move.tail] if tails[move.tail] in known else ""
        for row in padded:
            if tail:
                buffer[row] = _Content(stream, (tail,))
        for row in rows - padded:
            buffer[row] = _Content(stream, ())
        for place, where in move.faults:
            real = rows - padded
            if place.on_rows and real:
                for row in fault_rows(real, Labels(), where, chosen) & real:
                    buffer[row] = replace(buffer[row], faults=(*buffer[row].faults, place.fault))
        held = _faults(stream, buffer, known)
        steps.append(Step(rows, padded, (*held, *whole)))
    return steps


def _whole(plan: Plan) -> list[Fault]:
    """What is the same in every step over the same buffers: a layout is the buffer's, a bias is a weight."""
    found = {place.fault: Fault(place.fault, place.tensor)
             for move in plan.moves for place, _ in move.faults
             if not place.on_rows and (place.max_rows is None or max(plan.sizes) <= place.max_rows)}  # fmt: skip
    return list(found.values())


def _faults(stream: int, buffer: Mapping[int, _Content], known: Mapping[str, str]) -> list[Fault]:
    """The faults that make the rows of this step hold what the buffer does."""
    found: list[Fault] = []
    for content in dict.fromkeys(buffer.values()):
        rows = Labels.of(row for row, held in buffer.items() if held == content)
        if content.stream not in (None, stream) and "stale_rows" in known:
            found.append(Fault("stale_rows", known["stale_rows"], rows, content.stream))
        found += [Fault(name, known[name], rows) for name in content.faults if name in known]
    return found


def _ranks(config: Mapping[str, Scalar]) -> int:
    """The data-parallel ranks whose rows make up a batch."""
    return int(config.get("dp", 1))


def _size(plan: Plan, move: Move) -> int:
    return plan.sizes[move.size % len(plan.sizes)]


def some_size(tokens: Sequence[int], chosen: random.Random, kind: str = "") -> int:
    """A token count of a kind, see SIZES; one of them by its share without one."""
    kind = kind or chosen.choice(SIZES)
    large = [count for count in tokens if count > MODEST]
    if kind == "small" or len(tokens) <= SMALL:
        size, few = chosen.choice(tokens[:SMALL]), [count for count in tokens[:SMALL] if count]
        return size if size or not few or not chosen.randrange(4) else chosen.choice(few)
    rest = [count for count in tokens if count <= MODEST]
    return chosen.choice(large if large and (kind == "large" or not rest) else rest)


def _some_sizes(tokens: Sequence[int], chosen: random.Random, kind: str = "") -> tuple[int, ...]:
    """One or two, the first of a kind."""
    count = chosen.randint(1, 2)
    return tuple(dict.fromkeys(some_size(tokens, chosen, kind if not at else "") for at in range(count)))
