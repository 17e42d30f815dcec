"""Mutated files are refused in guard's own words, or hold what their kind promises."""

from pathlib import Path

import pytest

from benchmarks.mutations import KINDS, Artefacts, run_here
from tests.attacks.test_mutated_state import KINDS as STATE_KINDS

NUMBERS = {"images": 600, "onnx": 200, "safetensors": 600, "class lists": 600, "configurations": 250}


@pytest.mark.parametrize("name", [name for name in KINDS if name not in {kind.name for kind in STATE_KINDS}])
def test_no_mutation_crashes_or_is_accepted_wrongly(name: str, model_directory: Path, exported: Path) -> None:
    found = run_here(name, Artefacts(model_directory, exported), 1, range(NUMBERS.get(name, 300)))
    assert found.crashes == []
    assert found.wrong == []
    assert found.refused > 0
    assert found.accepted > 0
