"""Make a CUDA-built torchvision importable beside a CPU-built torch, if this environment has that pair.

torchvision's wheels on the Python registry are CUDA builds. Beside a CPU torch their operator library cannot load, and
torchvision then fails while it registers shapes for operators that do not exist. open_clip needs torchvision's
transforms only. A .pth file that pre-empts that registration is enough; no installed file is changed.
"""

import importlib.metadata
import sysconfig
from pathlib import Path

import torch

NAME = "guard_torchvision_cpu.pth"
LINE = (
    "import sys, types; sys.modules.setdefault('torchvision._meta_registrations', "
    "types.ModuleType('torchvision._meta_registrations'))\n"
)


def is_mismatched() -> bool:
    """Whether torch is a CPU build and torchvision is not."""
    if torch.version.cuda is not None:
        return False
    files = importlib.metadata.files("torchvision") or []
    version = next((file for file in files if file.name == "version.py"), None)
    return version is not None and "+cu" in Path(str(version.locate())).read_text(encoding="utf-8")


if is_mismatched():
    (Path(sysconfig.get_paths()["purelib"]) / NAME).write_text(LINE, encoding="utf-8")
