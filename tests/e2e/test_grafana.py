"""The dashboard for Grafana against Grafana's own types, by the compiler of TypeScript."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.environments import node_package

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "guard.json"


def complaints(dashboard: dict[str, Any], folder: Path) -> str:
    """What the compiler says of a dashboard as `Partial<Dashboard>`, which forbids fields that are not known."""
    schema, typescript = node_package("@grafana/schema", "11.6.0"), node_package("typescript", "5.9.3")
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed; on Debian and Ubuntu: apt-get install nodejs")
    text = json.dumps(dashboard, indent=1)
    lines = (
        'import type { Dashboard } from "@grafana/schema";',
        f"export const dashboard = {text} satisfies Partial<Dashboard>;",
    )
    (folder / "dashboard.ts").write_text("\n".join(lines))
    options = {
        "strict": True, "noEmit": True, "skipLibCheck": True, "module": "esnext", "moduleResolution": "bundler",
        "types": [], "paths": {"@grafana/schema": [str(schema / "dist" / "esm" / "index.d.mts")]},
    }  # fmt: skip
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "files": ["dashboard.ts"]}))
    command = [node, str(typescript / "bin" / "tsc"), "-p", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def as_loaded(dashboard: dict[str, Any]) -> dict[str, Any]:
    """The dashboard after the Prometheus data source has read it.

    It moves the query of an annotation into a `target`, whose further fields are its own and not Grafana's. Older
    releases read the query where the file has it.
    """
    for annotation in dashboard["annotations"]["list"]:
        assert annotation.pop("expr")
        assert annotation.pop("step")
        annotation["target"] = {"refId": "Anno"}
    return dashboard


def test_the_dashboard_has_the_types_of_grafana(tmp_path: Path) -> None:
    assert complaints(as_loaded(json.loads(DASHBOARD.read_text(encoding="utf-8"))), tmp_path) == ""


def test_a_field_that_grafana_does_not_know_is_found(tmp_path: Path) -> None:
    dashboard = as_loaded(json.loads(DASHBOARD.read_text(encoding="utf-8")))
    dashboard["panels"][0]["gridPos"]["depth"] = 1
    assert "'\"depth\"' does not exist" in complaints(dashboard, tmp_path)
