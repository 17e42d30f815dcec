"""The embedded default: handwritten digits, a small CLIP trained on them, and everything that guard does with it."""

from guard._lazy import lazy

__all__ = ["DemoResult", "run", "table"]

__getattr__ = lazy(__name__, dict.fromkeys(("DemoResult", "run", "table"), "demo"))
