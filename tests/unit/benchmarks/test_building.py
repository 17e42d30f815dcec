import json
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


def test_a_model_is_not_made_again_because_recipes_have_gained_a_field_since() -> None:
    known = json.loads(json.dumps(details()))
    del known["recipe"]["weight"], known["recipe"]["plants"][0]["covers"], known["recipe"]["plants"][0]["sources"]
    current = json.loads(json.dumps(details()))
    assert _decisive(known) == _decisive(current)
    known["recipe"]["plants"][0]["sources"] = [1]
    assert _decisive(known) != _decisive(current)
