"""Write what the code itself documents.

docs/cli.md is made from the program's help, deploy/guard.toml from the settings, docs/metrics.md from the registry, and
rules and dashboard from scripts/generate_monitoring.py.

python scripts/generate_docs.py
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from pydantic.fields import FieldInfo

from guard.cli import cli
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.settings import Settings
from guard.sidecar.telemetry.metrics import Metrics
from scripts.generate_monitoring import dashboard, rules

ROOT = Path(__file__).parents[1]
WIDTH = 100

GIVEN = ("profile", "model")
"""Settings without a default that the example gives: with them it is a configuration that serves a model."""

COMMANDS = """\
# The commands

Every command takes `--help`; this page is the help of all of them. It is written by `scripts/generate_docs.py`.
"""

METRICS = """\
# Metrics

What a sidecar exposes at `/metrics`; this page is made from the registry, by `scripts/generate_docs.py`. Counters end
in `_total`, and gauges that only carry labels in `_info`. `model` and `version` are names of the configuration;
`version` is empty where it names none, and PromQL takes an empty label for a missing one: group by `version`, and never
match `version=""`. With several `--processes` each series has a label `process`.

[serving.md](serving.md#what-the-people-on-call-look-at) says what to look at,
[the alerts](../deploy/prometheus/guard.rules.yml) and [their runbooks](runbooks) what to do.

| metric | type | labels | |
| --- | --- | --- | --- |
"""

HEADER = """\
# Every setting of `guard serve --config guard.toml`, with its default, or commented out with an example where it has no
# default. An option of the command line takes precedence over an environment variable such as GUARD_STATE_DIR, and a
# variable over this file. An address is "HOST:PORT", or "unix:PATH" for a Unix socket.
# This file is written by scripts/generate_docs.py.
"""

MODELS = """
# Several models, or several versions of one, instead of `profile`, `model_name` and `model_version` above. An entry can
# have its own {names}.
# Where an entry leaves a setting out, the value above applies; the values above also apply to requests for models that
# have no entry.
# [[models]]
#   model_name = "pets"
#   model_version = "3"
#   profile = "/models/pets-3/profile"
#   mode = "block"
#   alpha = 0.001
# [[models]]
#   model_name = "signs"
#   profile = "/models/signs/profile"
#   embedding_output = "image_embeds"
"""


def commands() -> str:
    """docs/cli.md: one block for the program and one for each command."""
    parts = [COMMANDS]
    for command in ("", *cli.commands):
        name = f"guard {command}".rstrip()
        arguments = [*command.split(), "--help"]
        result = CliRunner().invoke(cli, arguments, prog_name="guard", terminal_width=WIDTH)
        parts.append(f"## {name}\n\n```console\n$ {name} --help\n{result.output}```\n")
    return "\n".join(parts)


def families() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Name as it is exposed, type, labels and description of every metric of a sidecar."""
    endings = {"counter": "_total", "info": "_info"}
    collectors: dict[int, Any] = {id(each): each for each in Metrics().registry._names_to_collectors.values()}  # noqa: SLF001
    found = []
    for each in collectors.values():
        (family, *_) = each.describe()
        labels = tuple(getattr(each, "_labelnames", ()))
        found.append((family.name + endings.get(family.type, ""), family.type, labels, family.documentation))
    return sorted(found)


def metrics() -> str:
    """docs/metrics.md."""
    rows = [
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} |"
        for name, kind, labels, text in families()
    ]
    return METRICS + "\n".join(rows) + "\n"


def configuration() -> str:
    """deploy/guard.toml: each setting with its description, and its default or an example."""
    parts = [HEADER, *(_setting(name, field) for name, field in Settings.model_fields.items() if name != "models")]
    names = _listed([f"`{name}`" for name in ModelSettings.model_fields])
    return "\n".join(parts) + MODELS.replace("# have its own {names}.", _comment(f"have its own {names}."))


def _setting(name: str, field: FieldInfo) -> str:
    text = re.sub(r"--([a-z-]+[a-z])", _key, field.description or "")
    value = field.default if field.default is not None else (field.examples or [""])[0]
    commented = "# " if field.default is None and name not in GIVEN else ""
    return f"{_comment(text)}\n{commented}{name} = {_toml(value)}\n"


def _key(option: re.Match[str]) -> str:
    """The key of an option that a description names; another command's option stays as it is."""
    name = option[1].replace("-", "_")
    return f"`{name}`" if name in Settings.model_fields else option[0]


def _comment(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _toml(value: object) -> str:
    return f"{value:_}" if type(value) in {int, float} else json.dumps(value)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


DOCUMENTS = {
    ROOT / "docs" / "cli.md": commands,
    ROOT / "docs" / "metrics.md": metrics,
    ROOT / "deploy" / "guard.toml": configuration,
    ROOT / "deploy" / "prometheus" / "guard.rules.yml": rules,
    ROOT / "deploy" / "grafana" / "guard.json": dashboard,
}

if __name__ == "__main__":
    for path, text in DOCUMENTS.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(), encoding="utf-8")
