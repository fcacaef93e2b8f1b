"""Hypothesis as a generator: the same seed draws the same rounds, on any thread, whatever else is loaded."""

from __future__ import annotations

import statistics
import sys
import threading
import types
from collections import Counter

import pytest
from hypothesis import assume, target
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from moe_fuzz.campaign.drive import FRUITLESS, PLAIN, Enough, derive_seed, drive
from moe_fuzz.campaign.engine import Campaign
from moe_fuzz.campaign.interfaces import Sources
from moe_fuzz.campaign.state import StateDir
from tests.cpu.campaign_fakes import SPACE, FakePool, Listener, settings, toy, toy_rounds, when

numbers = st.tuples(st.integers(0, 2**60), st.sampled_from(range(1000)), st.lists(st.integers(0, 9), max_size=4))


def drawn(seed, count=150, strategy=numbers, then=lambda value: None, backend=PLAIN):
    rounds = []

    def run(value):
        rounds.append(value)
        if len(rounds) == count:
            raise Enough
        then(value)

    while len(rounds) < count:
        drive(strategy, derive_seed(seed, len(rounds)), 100, run, backend)
    return rounds


def test_the_same_seed_draws_the_same_on_three_threads_at_once():
    expected = [drawn(seed) for seed in range(3)]
    results = [None] * 3

    def work(seed):
        results[seed] = drawn(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected
    assert len({str(rounds) for rounds in expected}) == 3


def test_a_drive_in_which_most_draws_give_no_round_is_ended():
    drawn, given = 0, []

    @st.composite
    def rounds(draw):
        nonlocal drawn
        drawn += 1
        value = draw(numbers)
        assume(len(given) < 20)  # as when parts of rounds that are put together do not fit
        return value

    def run(value):
        given.append(value)

    assert not drive(rounds(), 3, 500, run)
    assert (len(given), drawn) == (20, FRUITLESS + 2 * 20)


def test_a_drive_is_not_ended_while_most_of_its_draws_give_rounds():
    given = []
    assert drive(numbers, 3, 500, given.append)
    assert len(given) == 500


def test_a_strategy_that_is_flaky_by_itself_is_told():
    times = 0

    @st.composite
    def rounds(draw):
        nonlocal times
        times += 1
        return draw(st.integers(0, 3) if times % 2 else st.text())

    with pytest.raises(Flaky):
        drive(rounds(), 3, 500, lambda value: None, "hypothesis")


def test_number_literals_of_loaded_modules_are_not_mixed_in(tmp_path, monkeypatch):
    before = drawn(5, 400)
    source = tmp_path / "literals.py"
    source.write_text("\n".join(f"X{n} = {n * 1_000_003 + 77}" for n in range(500)))
    module = types.ModuleType("literals_of_a_local_module")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, "literals_of_a_local_module", module)
    from hypothesis.internal.conjecture import providers

    monkeypatch.setattr(providers, "is_local_module_file", lambda path: path == str(source))
    assert drawn(5, 400) == before


def test_hypothesis_by_itself_can_climb():
    """As the benchmark has it do that says what climbing buys."""
    many = st.lists(st.integers(0, 10**6), min_size=8, max_size=8)
    climbed = drawn(3, 200, many, lambda value: target(float(sum(value)), label="sum"), "hypothesis")
    flat = drawn(3, 200, many, backend="hypothesis")
    assert max(map(sum, climbed)) > max(map(sum, flat))


def test_nothing_is_drawn_but_what_the_strategies_say():
    """Evenly, from the second one on: not small numbers first, not parts of earlier rounds, not what is remarkable."""
    values = drawn(1, 1000, st.tuples(st.integers(0, 10**9), st.sampled_from(range(1000)), st.integers(0, 9)))
    assert len({value[0] for value in values[1:]}) > 980
    assert 0.45 < statistics.fmean(value[0] for value in values) / 10**9 < 0.55
    assert 450 < statistics.fmean(value[1] for value in values) < 550
    assert max(Counter(value[2] for value in values).values()) < 150
    assert 0.45 < statistics.fmean(value[0] for value in values[:60]) / 10**9 < 0.6


def test_an_error_comes_out_as_it_is():
    def run(value):
        raise OSError("the pool broke")

    with pytest.raises(OSError, match="the pool broke"):
        drive(numbers, 1, 10, run)


def test_rounds_share_a_config():
    for cases in drawn(2, 50, toy_rounds()):
        assert len({str(case.config) for case in cases}) <= 1


def test_derived_seeds_are_golden():
    """A recorded seed must mean the same cases in a year."""
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(7, "toy@fake", "generate", 0) == 8369200341566546640
    assert derive_seed(1, "a", "b") != derive_seed(1, "ab")


@pytest.mark.parametrize(("device", "most"), [("cpu", 2), ("cuda", 6)])
def test_where_nothing_is_compiled_two_cases_of_a_round_run(tmp_path, device, most):
    rounds = st.integers(1, 2**50).map(lambda base: tuple(toy(seed=8 * base + number) for number in range(6)))
    sources = Sources(lambda op: SPACE, lambda space, info, device: rounds, lambda *given: iter(()))
    lists = []
    for number in range(2):
        pool, state = FakePool(when(lambda case: False)), StateDir(tmp_path / str(number))
        made = Campaign(settings(device=device, seed=4), pool, state, Listener(), sources=sources)
        assert made.run().cases == 200
        lists.append(sorted(case.seed for case in pool.leased))  # drivers take turns as they like
    assert lists[0] == lists[1]
    # Each shard begins with the simplest rounds, so these come several times.
    assert statistics.median(Counter(seed // 8 for seed in lists[0]).values()) == most
