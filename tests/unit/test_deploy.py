import re
from pathlib import Path

from guard.sidecar import Settings

EXAMPLE = Path(__file__).parents[2] / "deploy" / "guard.toml"


def test_the_example_configuration_is_valid_and_shows_the_defaults() -> None:
    settings = Settings.load(EXAMPLE)
    for name, field in Settings.model_fields.items():
        if name not in {"profile", "model"}:
            assert getattr(settings, name) == field.get_default(call_default_factory=True), name


def test_the_example_configuration_names_every_setting() -> None:
    names = re.findall(r"^#? ?(\w+) = ", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(Settings.model_fields)
