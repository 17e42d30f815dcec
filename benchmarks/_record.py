"""What every result says about itself (machine, date, commit, versions), and the rows that it is made of."""

import importlib.metadata
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "open_clip_torch", "onnxruntime-gpu", "grpcio", "numpy")


def heading(title: str, command: str) -> str:
    """The first lines of a result file."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=True,
        cwd=RESULTS.parent,
    ).stdout.strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"# {title}\n\n"
        f"- command: `{command}`\n"
        f"- commit: {commit}\n"
        f"- date: {datetime.now(UTC):%Y-%m-%d}\n"
        f"- machine: {processor()}, {platform.system()}, Python {platform.python_version()}\n"
        f"- versions: {versions}\n\n"
    )


def processor() -> str:
    """Name of the processor, and number of cores."""
    cores = name = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name, cores = line.partition(":")[2].strip(), f"{int(cores or 0) + 1}"
    return f"{name} ({cores} cores)"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of measurements, oldest first; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
