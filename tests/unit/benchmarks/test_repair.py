"""The tables of the benchmark of repair."""

from typing import Any

from benchmarks.repair.measurement import REPAIR
from benchmarks.repair.report import report


def row(model: str, method: str, success: float | None, **changes: Any) -> dict[str, Any]:
    """A measured row, of a backdoored model unless it has no success."""
    return {
        "seed": 1,
        "model": model,
        "label": "clean" if success is None else "backdoored",
        "method": method,
        "outcome": None,
        "success": [None if success is None else 1.0, success],
        "accuracy": [0.98, 0.97],
        "cosine": 0.9,
        "found": 0.8,
        "passes": 1000,
        "seconds": 2.0,
        "machine": "a machine",
        **changes,
    }


def test_a_model_that_is_called_repaired_and_still_follows_its_trigger_is_counted() -> None:
    text = report([row("a", REPAIR, 0.02, outcome="repaired"), row("b", REPAIR, 0.6, outcome="repaired")])
    assert "| repaired | 2 | 31.0% | 60.0% | 50.0% (1/2;" in text


def test_clean_models_say_what_was_found_and_what_a_method_costs() -> None:
    rows = [
        row("c", REPAIR, None, outcome="nothing to repair", accuracy=[0.98, 0.98]),
        row("c", "switch", None, accuracy=[0.98, 0.976]),
    ]
    text = report(rows)
    assert "nothing was found to repair of 100.0% (1/1;" in text
    assert "| switch | 1 | -0.40 | -0.40 | 100.0% (1/1;" in text


def test_the_last_row_of_a_model_and_a_method_counts() -> None:
    text = report([row("a", "guided", 0.9), row("a", "guided", 0.01)])
    assert "| guided | 1 | 1.0% | 1.0% |" in text
