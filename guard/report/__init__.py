"""The report on a vetted model, with pictures, for people."""

from guard.report.contact_sheet import contact_sheet
from guard.report.report import Example, Section, example, examples, render

__all__ = ["Example", "Section", "contact_sheet", "example", "examples", "render"]
