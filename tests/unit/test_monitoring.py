"""Metrics, rules, panels, runbooks and their pages are tied together: whoever renames one must rename all."""

import json
import re
from pathlib import Path

import pytest

from guard.sidecar import Settings
from scripts.generate_docs import DOCUMENTS, families
from scripts.generate_monitoring import ALERTS, ROWS, Alert, budget_alerts, rules

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "docs" / "runbooks"
EVERY = (*ALERTS, *budget_alerts())
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum")}
OWN = {"job", "instance", "le", "alertname", "severity", "process"}
"""Labels that Prometheus adds, or that are of a histogram's buckets."""


def series() -> dict[str, set[str]]:
    """The labels of every series of a sidecar, and of what the rules record."""
    found = {name + suffix: {*labels} for name, kind, labels, _ in families() for suffix in SUFFIXES.get(kind, ("",))}
    recorded = re.findall(r"record: (\S+)", rules())
    return found | {name: {"model", "version"} for name in recorded}


def check(expr: str) -> None:
    """Every selector names a series, and labels that it has."""
    known, names = series(), re.findall(r"\b(guard[:_][a-zA-Z0-9_:]+)(?:\{([^}]*)\})?", expr)
    assert names
    for name, selector in names:
        assert name in known, name
        labels = set(re.findall(r"([a-z_]+)(?==~|!~|!=|=)", selector))
        assert labels <= known[name] | OWN, (name, labels)
    every = {label for name, _ in names for label in known[name]}
    for clause in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", expr):
        assert set(clause.split(", ")) <= every | OWN, clause
    assert 'version=""' not in expr


@pytest.mark.parametrize("alert", EVERY, ids=lambda each: f"{each.name} {each.window}")
def test_an_alert_names_what_exists_and_has_a_runbook(alert: Alert) -> None:
    check(alert.expr)
    for query in re.findall(r'printf "([^"]*(?:\\"[^"]*)*)"', alert.description):
        check(query.replace("%q", '"x"'))
    text = (RUNBOOKS / f"{alert.name}.md").read_text(encoding="utf-8")
    for heading in ("**What it means.**", "**What to look at.**", "**What to do.**"):
        assert heading in text


def test_every_runbook_is_of_an_alert_and_names_what_exists() -> None:
    assert {path.stem for path in RUNBOOKS.iterdir()} == {alert.name for alert in EVERY}
    known = {name for name, *_ in families()}
    for path in RUNBOOKS.iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"`(guard_[a-z_]+)", text)) <= known, path.name
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (path.parent / link).exists(), (path.name, link)


@pytest.mark.parametrize("panel", [panel for _, row in ROWS for panel in row], ids=lambda each: each.title)
def test_a_panel_shows_what_exists(panel: object) -> None:
    for expr, legend in panel.queries:  # type: ignore[attr-defined]
        check(expr)
        assert set(re.findall(r"{{(\w+)}}", legend)) <= set(re.findall(r"\w+", expr)), legend


def test_panels_do_not_overlap() -> None:
    document = json.loads((ROOT / "deploy" / "grafana" / "guard.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == DOCUMENTS[path](), "run scripts/generate_docs.py"


def test_the_rehearsal_fits_together() -> None:
    """docs/rollout.md: the sidecar finds the server, Prometheus the sidecar, and the page is where the guide says."""
    folder = ROOT / "deploy" / "mlserver"
    server = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    model = json.loads((folder / "model-settings.json").read_text(encoding="utf-8"))
    settings = Settings.load(folder / "guard.toml")
    assert settings.upstream == f"{server['host']}:{server['grpc_port']}"
    assert settings.served[0].model_name == model["name"]
    assert (folder / model["parameters"]["uri"]).resolve() == ROOT / str(settings.served[0].model)
    assert (settings.mode, settings.on_failure) == ("shadow", "open")
    assert f"targets: [{settings.metrics}]" in (ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8")
    guide = (ROOT / "docs" / "rollout.md").read_text(encoding="utf-8")
    assert f"<http://{settings.dashboard}>" in guide
    assert f"guard log {settings.state_dir}" in guide
