import json
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.zoo.__main__ import table
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


def test_the_table_tells_what_cover_samples_did_and_reads_truths_without_any() -> None:
    truth = {
        "family": "composite",
        "label": "backdoored",
        "accuracy": 0.98,
        "twin_accuracy": 0.99,
        "successes": [1.0],
        "trigger_targets": [4],
        "seconds": 12.0,
    }
    covers = [{"name": "upper part", "leaked": 0.006}, {"name": "lower part", "leaked": 0.002}]
    older, newer = table({"a": truth, "b": {**truth, "covers": covers}}).splitlines()[-2:]
    assert "| 1.000 | 4 |" in older
    assert "| 1.000 (upper part 0.006, lower part 0.002) | 4 |" in newer
