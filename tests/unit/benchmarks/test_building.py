from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.zoo.building import _decisive
from guard.attacks import RECIPES


def details(**changes: Any) -> dict[str, Any]:
    return {"seed": 1, "recipe": {**asdict(RECIPES["wanet"]), **changes}}


def test_a_model_is_not_made_again_because_its_recipe_is_described_in_other_words() -> None:
    assert _decisive(details(source="as it was called before", head="zero-shot")) == _decisive(details())


@pytest.mark.parametrize("other", [details(effort=3.0), {**details(), "seed": 2}, {"seed": 1, "recipe": None}, None])
def test_whatever_decides_what_a_model_becomes_does(other: Any) -> None:
    assert _decisive(other) != _decisive(details())
