import re
from pathlib import Path

import pytest

from guard.sidecar import Settings
from guard.sidecar.model_settings import ModelSettings
from scripts.generate_docs import configuration

EXAMPLE = Path(__file__).parents[2] / "deploy" / "guard.toml"


def test_the_example_configuration_is_the_one_that_the_settings_make() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") == configuration()


def test_the_example_configuration_is_valid_and_shows_the_defaults() -> None:
    settings = Settings.load(EXAMPLE)
    for name, field in Settings.model_fields.items():
        if name not in {"profile", "model"}:
            assert getattr(settings, name) == field.get_default(call_default_factory=True), name


def test_the_example_configuration_names_every_setting() -> None:
    names = re.findall(r"^(?:# )?(\w+) = ", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [*names, "models"] == list(Settings.model_fields)


@pytest.mark.parametrize("kind", [Settings, ModelSettings])
def test_every_setting_is_described_in_sentences_and_has_a_default_or_an_example(kind: type[ModelSettings]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert field.description[0].isupper(), name
        assert field.description.endswith("."), name
        assert field.default is not None or field.examples, name


def test_the_example_of_several_models_is_valid(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    top, _, models = text.partition("# [[models]]")
    alone = re.sub(r"^(profile|model_name) = .*$", "", top, flags=re.MULTILINE)
    own = tmp_path / "guard.toml"
    own.write_text(
        f"{alone}upstream = '127.0.0.1:9000'\n[[models]]{models.replace('# ', ' ').replace('#', ' ')}", "utf-8"
    )
    pets, signs = Settings.load(own).served
    assert (pets.model_name, pets.model_version, pets.mode, pets.alpha) == ("pets", "3", "block", 0.001)
    assert (signs.mode, signs.model, signs.embedding_output) == ("tag", None, "image_embeds")
