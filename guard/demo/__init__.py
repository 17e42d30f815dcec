"""The demo: a small CLIP trained on handwritten digits, and every step of guard on it."""

from typing import TYPE_CHECKING

from guard._lazy import lazy

if TYPE_CHECKING:
    from guard.demo.demo import DemoResult, run, table

__all__ = ["DemoResult", "run", "table"]

__getattr__ = lazy(__name__, dict.fromkeys(("DemoResult", "run", "table"), "demo"))
