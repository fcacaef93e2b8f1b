"""What a target may say of itself: a misspelt word would silence its check."""

from __future__ import annotations

import pytest

from moe_fuzz import declares
from moe_fuzz.contract import Capabilities, Contract
from moe_fuzz.errors import UsageError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"contract": Contract(ties="lowest")}, "ties is one of any, lowest_index_first"),
        ({"contract": Contract(sigmoid="exp2")}, "sigmoid is one of exp, tanh, tanh.approx"),
        ({"contract": Contract(padding="minus_one")}, 'write padding=("minus_one",)'),  # type: ignore[arg-type]
        ({"contract": Contract(padding=("minus1",))}, "padding is of distinct, minus_one"),
        ({"contract": Contract(rounds=("norm",))}, "rounds is of sum, residual, normed"),
        ({"capabilities": Capabilities(dtypes=("bf16",))}, "dtypes is of float32, bfloat16, float16"),
    ],
)
def test_a_word_that_means_nothing_is_refused_with_those_that_do(given: dict, said: str) -> None:
    with pytest.raises(UsageError) as error:
        declares(**given)
    assert said in error.value.hint


def test_what_means_something_is_taken() -> None:
    def target() -> None: ...

    contract = Contract(ties="lowest_index_first", padding=("minus_one", "garbage"), rounds=())
    assert declares(contract=contract, capabilities=Capabilities(dtypes=("bfloat16",)))(target) is target


def test_declares_without_parentheses_is_told() -> None:
    with pytest.raises(UsageError) as error:

        @declares  # type: ignore[arg-type]
        def topk_softmax(logits: object, top_k: int) -> None: ...

    assert "@declares(contract=" in error.value.hint
