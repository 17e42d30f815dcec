"""What is installed, seen through packages that a test puts in front of the real ones."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guard.diagnostics import installation
from guard.diagnostics.findings import Finding, Status

Package = Callable[..., None]
ONNXRUNTIME = """
__version__ = "1.99"
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers):
        import sys
        sys.stderr.write("\\x1b[31mFailed with error: libcublasLt.so.99: cannot open shared object file\\x1b[m\\n")
        self.providers = {works} and providers or providers[-1:]
    def get_providers(self):
        return self.providers
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Puts metadata of a package where they are found first."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name: str, version: str, *lines: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        header = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
        (folder / "METADATA").write_text("\n".join((*header, *lines, "")))

    return put


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module where it is found first, by other processes only."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)

    return put


def guard(install: Package, *requirements: str, python: str = ">=3.11") -> dict[str, Finding]:
    """The findings where guard's metadata ask for these, by subject."""
    extras = ("Provides-Extra: vet", "Provides-Extra: demo")
    install(
        "clip-guard", "9", f"Requires-Python: {python}", *extras, *(f"Requires-Dist: {each}" for each in requirements)
    )
    return {found.subject: found for found in installation.packages()}


def test_all_parts_are_listed_with_their_versions(install: Package) -> None:
    install("one", "1.5")
    install("two", "2.0")
    base = ("one>=1.0", 'none>=1; sys_platform == "nowhere"')
    found = guard(install, *base, 'two; extra == "vet"', 'one; extra == "demo"', 'clip-guard[vet]; extra == "demo"')
    assert {subject: each.detail for subject, each in found.items() if subject != "python"} == {
        "serving": "one 1.5",
        "vet": "two 2.0",
        "demo": "one 1.5",
    }
    assert {each.status for each in found.values()} == {Status.OK}


@pytest.mark.parametrize(("needed", "said"), [("one>=3", "one 1.5 is not one>=3"), ("no", "no is not installed")])
def test_what_serving_lacks_is_a_failure(install: Package, needed: str, said: str) -> None:
    install("one", "1.5")
    found = guard(install, needed)["serving"]
    assert (found.status, found.exit_code) == (Status.FAILED, 2)
    assert f"{said}; pip install 'clip-guard'" in found.detail


def test_what_an_extra_lacks_is_no_fault_and_a_wrong_version_a_warning(install: Package) -> None:
    install("one", "1.5")
    found = guard(install, 'no>=1; extra == "vet"', 'one>=3; extra == "demo"')
    assert found["vet"].status is Status.OK
    assert found["vet"].detail.startswith("not installed (without no); pip install 'clip-guard[vet]'")
    assert found["demo"].status is Status.WARNING
    assert "one 1.5 is not one>=3" in found["demo"].detail


def test_another_python_than_needed_is_a_failure(install: Package) -> None:
    assert guard(install, python=">=99")["python"].status is Status.FAILED


def test_either_build_of_onnx_runtime_will_do_and_both_will_not(
    install: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(Path(installation.__file__).parents[1])])
    # `packaging` is loaded already.
    import packaging.requirements
    import packaging.specifiers  # noqa: F401 - as above

    install("onnxruntime", "1.30")
    found = guard(install, "onnxruntime-gpu>=1.20")
    assert (found["serving"].status, found["serving"].detail) == (Status.OK, "onnxruntime 1.30")
    assert "builds" not in found
    install("onnxruntime-gpu", "1.31")
    (builds,) = (each for each in installation.packages() if each.subject == "builds")
    assert (builds.status, builds.exit_code) == (Status.FAILED, 2)
    assert "onnxruntime 1.30 and onnxruntime-gpu 1.31 overwrite" in builds.detail


def test_guard_without_metadata_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_PACKAGE", "no-such-package")
    assert [each.status for each in installation.packages()] == [Status.WARNING]


def test_the_sidecar_can_be_imported() -> None:
    assert installation.imports().status is Status.OK


def test_a_broken_package_is_a_failure_with_its_own_words(module: Callable[[str, str], None]) -> None:
    module("grpc", "raise ImportError('no symbol x')")
    found = installation.imports()
    assert (found.status, found.exit_code) == (Status.FAILED, 2)
    assert found.detail == "the sidecar cannot be imported: ImportError: no symbol x"


def test_a_package_that_crashes_the_interpreter_is_a_failure(module: Callable[[str, str], None]) -> None:
    module("grpc", "import os\nos.abort()")
    assert "signal 6" in installation.imports().detail


def accelerators(module: Callable[[str, str], None], *, works: bool = True) -> dict[str, Finding]:
    module("onnxruntime", ONNXRUNTIME.replace("{works}", str(works)))
    module("torch", "raise ImportError('libtorch')")
    return {found.subject: found for found in installation.accelerators()}


def test_a_machine_without_a_gpu_is_all_well(
    module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(installation, "_DRIVER", tmp_path / "none")
    found = accelerators(module)["onnxruntime"]
    assert (found.status, "1.99 uses the CPU" in found.detail) == (Status.OK, True)


def test_a_gpu_that_works_is_said_and_one_that_does_not_is_a_warning(
    module: Callable[[str, str], None], install: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("onnxruntime-gpu", "1.99")
    monkeypatch.setattr(installation, "_DRIVER", tmp_path)
    assert accelerators(module)["onnxruntime"].detail == "1.99 uses the GPU, through CUDA"
    found = accelerators(module, works=False)["onnxruntime"]
    assert found.status is Status.WARNING
    assert "(libcublasLt.so.99 is not found)" in found.detail


def test_an_empty_onnx_runtime_is_a_failure_and_a_broken_torch_a_warning(module: Callable[[str, str], None]) -> None:
    assert accelerators(module)["torch"].status is Status.WARNING
    # What uninstalling one of two builds leaves.
    module("onnxruntime", "\n")
    found = installation.accelerators()[0]
    assert (found.status, found.exit_code) == (Status.FAILED, 2)
    assert "has no attribute" in found.detail


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        ("127", Status.OK, "at 8 bits"),
        ("63", Status.OK, "at 7 bits"),
        ("0", Status.OK, "in full"),
        ("1 / 0", Status.FAILED, "ZeroDivisionError"),
    ],
)
def test_how_banks_are_searched_on_this_machine_is_said(
    answer: str, status: Status, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "_SEARCH", f"print({answer})")
    found = next(each for each in installation.accelerators() if each.subject == "search")
    assert found.status is status
    assert told in found.detail


def test_the_search_that_is_tried_is_there() -> None:
    assert installation._run(installation._SEARCH).text in {"127", "63", "0"}


def test_the_model_that_onnx_runtime_is_tried_with_runs() -> None:
    answer = installation._run(f"WANTED = ['CPU']\n{installation._ONNXRUNTIME}")
    assert (answer.error, answer.text.split()[-1]) == (None, "CPU")
