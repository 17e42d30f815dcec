"""The report on the zoo of prompt learners: benchmarks/results/prompts.md."""

from typing import Any


def write(rows: list[dict[str, Any]]) -> None:
    """Write it."""
