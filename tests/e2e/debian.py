"""Programs of Debian's packages: installed where the tests may do that, and otherwise asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def program(name: str, package: str) -> Path:
    """The path of a program, after its package was installed if it was missing and this user may install packages.

    Skips the test if neither is so.
    """
    if (found := shutil.which(name)) is None and os.geteuid() == 0 and (apt := shutil.which("apt-get")):
        subprocess.run([apt, "update", "--quiet"], capture_output=True, check=False)
        install = [apt, "install", "--yes", "--no-install-recommends", package]
        subprocess.run(
            install, capture_output=True, check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        )
        found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; on Debian and Ubuntu: apt-get install {package}")
    return Path(found)
