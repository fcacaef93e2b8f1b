"""Feature coverage as a guide: which cases of a round run."""

from __future__ import annotations

from dataclasses import replace

from moe_fuzz.campaign import lattice
from moe_fuzz.campaign.coverage_guide import Guide
from moe_fuzz.contract import Capabilities, TargetInfo
from tests.cpu.campaign_fakes import SPACE, TARGET, campaign, ran, toy, when

INFO = TargetInfo(TARGET, "toy", "fake")
INTERPRETED = replace(INFO, capabilities=Capabilities(compiles=False))


def test_what_covers_something_new_runs_and_of_the_rest_two():
    guide = Guide(SPACE, INFO, "cpu")
    round_ = tuple(toy(seed=seed) for seed in range(5))
    assert guide.worth(round_) == round_[:1]
    assert guide.worth(round_) == round_[:2]
    nan = toy(faults=("nan_rows",), seed=9)
    assert guide.worth((*round_, nan, replace(nan, seed=10))) == (nan,)
    assert guide.worth((toy(experts=3), nan)) == (toy(experts=3),)


def test_no_case_is_dropped_where_its_config_was_compiled():
    round_ = tuple(toy(seed=seed) for seed in range(5))
    assert Guide(SPACE, INFO, "cuda").worth(round_) == round_
    assert Guide(SPACE, INTERPRETED, "cuda").worth(round_) == round_[:1]


def points(cases):
    return set().union(*(lattice.cells(SPACE, case, 0.0) for case in cases))


def test_a_campaign_runs_as_many_cases_and_the_same_ones_again(tmp_path):
    made = [campaign(tmp_path / str(n), when(lambda case: False), device="cpu", seed=4) for n in range(2)]
    for one in made:
        assert one.run().cases == 200
    assert ran(made[0]) == ran(made[1])
    unguided = campaign(tmp_path / "unguided", when(lambda case: False), device="cuda", seed=4)
    unguided.run()
    early = [points(one.pool.leased[:90]) for one in (made[0], unguided)]
    assert len(early[0]) >= len(early[1])
