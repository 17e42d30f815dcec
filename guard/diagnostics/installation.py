"""Checks of the installation: which parts of guard are installed, whether they work, and which device they compute on.

No package that may be broken is imported into this process: packages are examined through their metadata, and loaded in
processes of their own, which may crash. Loading torch takes some seconds, and only `accelerators` does so.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from guard.diagnostics.findings import Finding, Status
from guard.errors import MissingDependencyError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PACKAGE = "clip-guard"
_TWINS = ("onnxruntime", "onnxruntime-gpu")
"""Two builds of one module. One of them is enough; together they overwrite each other's files."""
_AGAIN = f"pip uninstall --yes {' '.join(_TWINS)}, then pip install '{_PACKAGE}'"
_EXTRAS = {
    "vet": "guard vet, calibrate, export",
    "demo": "guard demo",
    "ann": "guard serve --neighbours approximate",
    "otel": "spans of requests",
    "parquet": "guard log --export FILE.parquet",
    "uvloop": "a faster event loop",
}
"""Purpose of each extra."""
_DRIVER = Path("/proc/driver/nvidia")
_SECONDS = 120.0
_FAILED = MissingDependencyError.exit_code
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Escape sequences for colours, which native libraries write."""

_GRPC = "import grpc, grpc_health.v1.health, grpc_reflection.v1alpha.reflection"
_SIDECAR = "import guard.sidecar.host.server"
# A model with one Relu. ONNX Runtime lists the providers that it was built with; only a session shows which one works.
_ONNXRUNTIME = r"""
import onnxruntime
model = (b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
         b'b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r')
wanted = [name + "ExecutionProvider" for name in WANTED]
session = onnxruntime.InferenceSession(
    model, providers=[name for name in wanted if name in onnxruntime.get_available_providers()]
)
print(onnxruntime.__version__, session.get_providers()[0].removesuffix("ExecutionProvider"))
"""
_SEARCH = "from guard.screening.quantised import largest_code; print(largest_code())"
_TORCH = """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(torch.__version__, "uses", ", ".join(names) or "the CPU")
"""


def packages() -> tuple[Finding, ...]:
    """Check Python and the packages that guard's metadata require, by part: `serving`, and each extra.

    A package that is missing from an extra is not an error; a package of an unsuitable version is a warning. An error
    in the serving part is a failure, and so are two builds of ONNX Runtime.
    """
    return (*_requirements(), *_twins())


def imports() -> Finding:
    """Check that the serving part can be imported: gRPC, and the sidecar with its generated protobuf code."""
    errors = [answer.error for answer in map(_run, (_GRPC, _SIDECAR)) if answer.error]
    if errors:
        # The second import often fails for the same reason as the first.
        return _failed("imports", f"the sidecar cannot be imported: {'; '.join(dict.fromkeys(errors))}")
    return Finding("imports", Status.OK, "gRPC and the sidecar with its protobuf messages can be imported")


def accelerators() -> tuple[Finding, ...]:
    """Check which device ONNX Runtime and, if it is installed, torch compute on, and how banks are searched.

    A CPU is as good a finding as a GPU. A GPU that this build of ONNX Runtime should be able to use but cannot is a
    warning.
    """
    found = [_onnxruntime()]
    if found[0].status is not Status.FAILED:
        found.append(_search())
    if torch_is_installed():
        answer = _run(_TORCH)
        if answer.error:
            found.append(Finding("torch", Status.WARNING, f"installed, but it cannot be imported: {answer.error}"))
        else:
            found.append(Finding("torch", Status.OK, answer.text))
    return tuple(found)


def torch_is_installed() -> bool:
    """Whether `accelerators` will load torch."""
    return find_spec("torch") is not None


def _failed(subject: str, detail: str) -> Finding:
    return Finding(subject, Status.FAILED, detail, _FAILED)


def _requirements() -> Iterable[Finding]:
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        yield Finding(
            "packages",
            Status.WARNING,
            "the packages cannot be compared with the requirements of guard, because packaging is not installed",
        )
        return
    try:
        distribution = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages", Status.WARNING, f"{_PACKAGE} is not installed as a package, so its requirements are not known"
        )
        return
    python = platform.python_version()
    needed = SpecifierSet(",".join(distribution.metadata.get_all("Requires-Python") or ()))
    if needed.contains(python, prereleases=True):
        yield Finding("python", Status.OK, python)
    else:
        yield _failed("python", f"this is Python {python}, but guard requires {needed}")
    requirements = [Requirement(text) for text in distribution.requires or ()]
    yield _part("serving", [_Package.of(each) for each in requirements if _applies(each, "")])
    for extra in distribution.metadata.get_all("Provides-Extra") or ():
        # An extra may require another extra of guard, which has a line of its own.
        yield _part(
            extra,
            [
                _Package.of(each)
                for each in requirements
                if _applies(each, extra) and not _applies(each, "") and each.name != _PACKAGE
            ],
        )


@dataclass(frozen=True)
class _Package:
    """A required package, under the name of the build that is installed."""

    name: str
    needed: str
    version: str | None
    fits: bool

    @classmethod
    def of(cls, requirement: "Requirement") -> "_Package":
        name = next((name for name in _alternatives(requirement.name) if _version(name)), requirement.name)
        version = _version(name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        return cls(name, f"{requirement.name}{requirement.specifier}", version, fits)

    def __str__(self) -> str:
        if self.version is None:
            return f"{self.needed} is not installed"
        return f"{self.name} {self.version}" + ("" if self.fits else f" is not {self.needed}")


def _applies(requirement: "Requirement", extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _alternatives(name: str) -> tuple[str, ...]:
    return (name, *(twin for twin in _TWINS if twin != name)) if name in _TWINS else (name,)


def _version(name: str) -> str | None:
    try:
        # None if a folder of metadata was left behind without its content.
        return metadata.version(name) or None
    except metadata.PackageNotFoundError:
        return None


def _part(part: str, wanted: list[_Package]) -> Finding:
    serving = part == "serving"
    install = f"pip install '{_PACKAGE}{'' if serving else f'[{part}]'}'"
    bad = [each for each in wanted if not each.fits]
    wrong = [each for each in bad if each.version is not None]
    if not bad:
        return Finding(part, Status.OK, ", ".join(map(str, wanted)))
    if serving:
        return _failed(part, f"{', '.join(map(str, bad))}; {install}")
    use = f" for {_EXTRAS[part]}" if part in _EXTRAS else ""
    if wrong:
        return Finding(part, Status.WARNING, f"{', '.join(map(str, wrong))}; {install}{use}")
    missing = ", ".join(each.name for each in bad)
    return Finding(part, Status.OK, f"not installed (without {missing}); {install}{use}")


def _twins() -> Iterable[Finding]:
    there = [f"{name} {version}" for name in _TWINS if (version := _version(name))]
    if len(there) > 1:
        yield _failed("builds", f"{' and '.join(there)} overwrite each other's files; {_AGAIN}")


def _onnxruntime() -> Finding:
    driver = _DRIVER.exists()
    # Without a driver, CUDA is not tried, as in serving.
    wanted = ["CUDA", "CPU"] if driver else ["CPU"]
    answer = _run(f"WANTED = {wanted}\n{_ONNXRUNTIME}")
    if answer.error:
        return _failed("onnxruntime", f"cannot run a model: {answer.error}; {_AGAIN}")
    version, _, provider = answer.text.partition(" ")
    if provider != "CPU":
        return Finding("onnxruntime", Status.OK, f"{version} uses the GPU, through {provider}")
    used = f"{version} uses the CPU"
    if not driver:
        return Finding("onnxruntime", Status.OK, f"{used}; there is no driver for an NVIDIA GPU")
    if _version("onnxruntime-gpu") is None:
        return Finding("onnxruntime", Status.OK, f"{used}; there is an NVIDIA GPU, but this build cannot use it")
    lacking = re.search(r"(\S+): cannot open shared object file", answer.noise)
    reason = f" ({lacking[1]} is not found)" if lacking else ""
    return Finding(
        "onnxruntime",
        Status.WARNING,
        f"{used}, although there is an NVIDIA GPU: the CUDA provider cannot be loaded{reason}; the dynamic linker must "
        "find CUDA and cuDNN of the versions that the provider was built for",
    )


def _search() -> Finding:
    answer = _run(_SEARCH)
    if answer.error:
        return _failed("search", f"banks cannot be searched: {answer.error}")
    bits = {"127": "at 8 bits per number", "63": "at 7 bits per number, because this processor has no VNNI"}
    slow = "in full, because this processor multiplies short integers wrongly; decisions are the same but take longer"
    return Finding("search", Status.OK, f"banks are read {bits.get(answer.text, slow)}")


@dataclass(frozen=True)
class _Answer:
    """The outcome of a program: what it printed, the error that it failed with, and its standard error."""

    text: str = ""
    error: str | None = None
    noise: str = ""


def _run(program: str) -> _Answer:
    """Run a Python program in a process of its own, which finds the same modules as this process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-P", "-c", program],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Answer(error=f"it took more than {_SECONDS:.0f} s")
    noise = _COLOURS.sub("", done.stderr)
    if done.returncode < 0:
        return _Answer(error=f"it was ended by signal {-done.returncode}")
    if done.returncode:
        # The last line of a traceback is the error.
        last = (noise.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        return _Answer(error=last.strip()[:200])
    return _Answer(done.stdout.strip(), noise=noise)
