"""Python environments for programs whose requirements clash with guard's."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_UNREACHABLE = ("(from versions: none)", "connection broken by", "Max retries exceeded")
"""What pip says if no package index answers."""


def environment(requirements: Path) -> Path:
    """The Python of an environment with these requirements: made once, then kept in the user's cache folder.

    Skips the test if no package index can be reached.
    """
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "guard-tests" / f"{requirements.parent.name}-{digest}"
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode and any(text in done.stderr for text in _UNREACHABLE):
            pytest.skip(f"no package index can be reached, to install what {requirements.parent.name} needs")
        assert done.returncode == 0, done.stderr
        finished.touch()
    return python
