"""Cases and labels: JSON there and back, and every kind of damage a clear error."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fuzz.case import Case, Fault, Step, dumps_sequence, loads_sequence
from moe_fuzz.errors import CaseError, UsageError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space, load_case

SPACE = get_space("topk_softmax")
CASE = Case(
    "topk_softmax",
    {
        "experts": "0-59",
        "top_k": 4,
        "dtype": "bfloat16",
        "renormalize": True,
        "bias": True,
        "scale": 2.5,
        "is_padding": True,
        "padding": "minus_one",
        "edge": "left",
        "out": False,
        "magnitude": 4,
    },
    (
        Step(
            Labels.range(7),
            Labels.parse("5-6"),
            (Fault("nan_rows", "logits", Labels.parse("5-6")), Fault("extreme_bias", "bias")),
        ),
    ),
    seed=2**62 + 1,
    target="topk_softmax@torch",
)

label_sets = st.frozensets(st.integers(0, 60), max_size=20)


@given(label_sets, label_sets)
def test_labels_are_sets(one, other):
    a, b = Labels.of(one), Labels.of(other)
    assert list(a) == sorted(one)
    assert set(a & b) == one & other
    assert set(a - b) == one - other
    assert set(a | b) == one | other
    assert len(a) == len(one)
    assert all((label in a) == (label in one) for label in range(62))
    assert Labels.parse(str(a)) == a
    assert a.issubset(a | b)
    assert a.positions(a | b) == [i for i, label in enumerate(sorted(one | other)) if label in one]
    assert [at for run in a.runs(b) for at in run] == a.positions(b)
    assert all(isinstance(run, range) and run for run in a.runs(b))


@given(label_sets, st.integers(0, 25))
def test_labels_first_and_last(values, count):
    ordered = sorted(values)
    assert list(Labels.of(values).first(count)) == ordered[:count]
    assert list(Labels.of(values).last(count)) == ordered[len(ordered) - min(count, len(ordered)) :]


@pytest.mark.parametrize("text", ["1-0", "3,1", "0-2,2", "0,1", "a", "-1", "1-", "1,,2", "99999999999", " 1"])
def test_labels_are_written_in_one_way(text):
    with pytest.raises(ValueError, match=r"number|empty|order"):
        Labels.parse(text)


def test_json_and_inline_round_trip():
    assert load_case(CASE.dumps(indent=1)) == CASE
    assert load_case(CASE.inline()) == CASE
    assert CASE.inline().startswith("mfz1:")
    assert loads_sequence(dumps_sequence([CASE, CASE])) == (CASE, CASE)


def test_keep_rows_takes_padding_and_faults_along():
    step = CASE.steps[0].keep_rows(Labels.parse("0,5"))
    assert (str(step.rows), str(step.padding)) == ("0,5", "5")
    assert [(f.name, str(f.rows)) for f in step.faults] == [("nan_rows", "5"), ("extreme_bias", "")]
    assert [f.name for f in CASE.steps[0].keep_rows(Labels.range(2)).faults] == ["extreme_bias"]


def test_a_missing_digest_is_accepted_and_a_wrong_one_names_the_way_out():
    data = CASE.to_json()
    del data["digest"]
    assert load_case(json.dumps(data)) == CASE
    with pytest.raises(CaseError, match="damaged, or was edited") as caught:
        load_case(json.dumps({**CASE.to_json(), "seed": 1}))
    assert "delete the digest line" in caught.value.hint


def edit(**changes):
    data = CASE.to_json()
    del data["digest"]
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ([], ""),
        (edit(moe_fuzz=2), "moe_fuzz"),
        (edit(moe_fuzz=True), "moe_fuzz"),
        (edit(op="topk_softmx"), "no op"),
        (edit(op=3), "op"),
        (edit(mode="grpah"), "mode"),
        (edit(seed=-1), "seed"),
        (edit(seed=1.0), "seed"),
        (edit(seed=True), "seed"),
        (edit(surprise=1), "surprise"),
        (edit(config={}), "config"),
        (edit(config={**CASE.config, "top_k": 61}), "config.top_k"),
        (edit(config={**CASE.config, "top_k": True}), "config.top_k"),
        (edit(config={**CASE.config, "experts": "0-9999"}), "config.experts"),
        (edit(config={**CASE.config, "experts": 60}), "config.experts"),
        (edit(config={**CASE.config, "dtype": "int8"}), "config.dtype"),
        (edit(config={**CASE.config, "bias": 1}), "config.bias"),
        (edit(config={**CASE.config, "scale": float(3)}), "config.scale"),
        (edit(config={**CASE.config, "extra": 3}), "config.extra"),
        (edit(config={**CASE.config, "scale": [1.0]}), "config.scale"),
        (edit(steps=[]), "steps"),
        (edit(steps=[{}]), "steps[0].rows"),
        (edit(steps=[{"rows": "0-3000000"}]), "steps[0].rows"),
        (edit(steps=[{"rows": "0", "padding": "1"}]), "steps[0].padding"),
        (
            edit(steps=[{"rows": "0", "faults": [{"name": "nan_rows", "tensor": "logits", "rows": "1"}]}]),
            "faults[0].rows",
        ),
        (edit(steps=[{"rows": "0", "faults": [{"name": "nan_rows", "tensor": "logits"}]}]), "faults[0].rows"),
        (
            edit(steps=[{"rows": "0", "faults": [{"name": "extreme_bias", "tensor": "bias", "rows": "0"}]}]),
            "faults[0].rows",
        ),
        (edit(steps=[{"rows": "0", "faults": [{"name": "no_such", "tensor": "logits"}]}]), "faults[0]"),
        (edit(steps=[{"rows": "0", "faults": [{"name": "nan_rows", "tensor": "bias", "rows": "0"}]}]), "faults[0]"),
        (edit(target="nonsense"), "target"),
    ],
)
def test_each_defect_names_its_field(data, where):
    with pytest.raises(UsageError) as caught:
        load_case(json.dumps(data))
    assert where in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "mfz1:",
        "mfz1:!!!!",
        "mfz1:AAAA",
        CASE.inline()[:-9],
        '{"moe_fuzz": 1, "moe_fuzz": 1}',
        '{"seed": NaN}',
        "[" * 100000,
    ],
)
def test_what_is_not_a_case_at_all(text):
    with pytest.raises(CaseError):
        load_case(text)


def test_a_thousand_damaged_files_never_pass_and_never_raise_anything_else():
    chosen = random.Random(20)
    text = CASE.dumps(indent=1)
    for number in range(1000):
        broken = list(text)
        for _ in range(chosen.randint(1, 3)):
            at = chosen.randrange(len(broken))
            action = chosen.randrange(3)
            if action == 0:
                broken[at] = chr(chosen.randrange(33, 127))
            elif action == 1:
                del broken[at : at + chosen.randint(1, 20)]
            else:
                broken.insert(at, chosen.choice('{}[]",:0-9e\\'))
        damaged = "".join(broken)
        try:
            survived = load_case(damaged)
        except UsageError:
            continue
        assert survived == CASE, f"damage {number} was taken for another case: {damaged}"
