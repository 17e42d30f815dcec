"""The report with pictures, for people."""

from guard.report.report import Example, Section, example, examples, render

__all__ = ["Example", "Section", "example", "examples", "render"]
