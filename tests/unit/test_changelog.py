from pathlib import Path

import pytest

from scripts.release_check import newest, problems

GOOD = """# Changelog

## [Unreleased]

## [0.2.0] - 2025-02-01

### Added

- A thing.

### Fixed

- Another
  thing.

## [0.1.0] - 2025-01-01

### Added

- The first.
"""


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    assert problems((Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("# Changelog", "# News", "first line"),
        ("[0.2.0] - 2025-02-01", "0.2.0", "'0.2.0' must be"),
        ("[0.2.0] - 2025-02-01", "[0.0.9] - 2025-02-01", "0.0.9 must not stand above 0.1.0"),
        ("[0.2.0] - 2025-02-01", "[0.2.0] - 2024-12-31", "0.2.0 must not stand above 0.1.0"),
        ("[0.2.0] - 2025-02-01", "[0.1.0] - 2025-01-01", "stands there twice"),
        ("### Fixed", "### Mended", "'Mended' must be one of"),
        ("### Fixed", "### Added", "'Added' stands there twice"),
        ("- The first.", "", "'Added' has no entry"),
        ("### Added\n\n- The first.", "Nothing.", "it tells no change"),
        ("## [0.2.0]", "- Loose.\n\n## [0.2.0]", "under no kind of change"),
    ],
)
def test_what_is_against_the_form_is_told(old: str, new: str, problem: str) -> None:
    assert problems(GOOD) == []
    assert problem in "\n".join(problems(GOOD.replace(old, new, 1)))


def test_what_can_be_released_is_the_newest_heading_unless_changes_are_unreleased() -> None:
    assert newest(GOOD) == "0.2.0"
    assert newest(GOOD.replace("## [Unreleased]\n\n", "")) == "0.2.0"
    assert newest(GOOD.replace("## [Unreleased]\n", "## [Unreleased]\n\n### Added\n\n- More.\n")) is None
    assert newest("# Changelog\n") is None
