"""Python environments for programs whose requirements clash with guard's, and packages of npm."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

_UNREACHABLE = ("(from versions: none)", "connection broken by", "Max retries exceeded")
"""What pip says if no package index answers."""


def environment(requirements: Path) -> Path:
    """The Python of an environment with these requirements: made once, then kept in the user's cache folder.

    Skips the test if no package index can be reached.
    """
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = _cache() / f"{requirements.parent.name}-{digest}"
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


def node_package(name: str, version: str) -> Path:
    """The folder of a package of npm, unpacked: fetched once, then kept in the user's cache folder.

    Skips the test if npm is missing or its registry cannot be reached.
    """
    if (npm := shutil.which("npm")) is None:
        pytest.skip("npm is not installed; on Debian and Ubuntu: apt-get install npm")
    folder = _cache() / f"{name.replace('/', '-').lstrip('@')}-{version}"
    if not (folder / "package").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pack = [npm, "pack", f"{name}@{version}", "--pack-destination", str(folder)]
        done = subprocess.run(pack, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot fetch {name}: {done.stderr.strip().splitlines()[-1:]}")
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    return folder / "package"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guard-tests"
