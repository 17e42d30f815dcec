import importlib
import pkgutil
import subprocess
import sys

import pytest

import guard

PACKAGES = sorted(module.name for module in pkgutil.iter_modules(guard.__path__) if module.ispkg)


def test_the_rooms_are_the_ones_that_are_documented() -> None:
    assert PACKAGES == [
        "attacks", "classifiers", "cli", "demo", "diagnostics", "evaluation", "evidence", "profiles", "protocol",
        "report", "screening", "sidecar", "testing", "triggers", "vetting",
    ]  # fmt: skip


@pytest.mark.parametrize("name", PACKAGES)
def test_the_public_names_are_all_and_exist(name: str) -> None:
    module = importlib.import_module(f"guard.{name}")
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", "").startswith("guard.")
    }
    assert len(set(module.__all__)) == len(module.__all__)
    assert public - set(module.__all__) <= _helpers(name)
    for exported in module.__all__:
        assert getattr(module, exported) is not None


def _helpers(name: str) -> set[str]:
    """Names that a package imports for itself."""
    return {
        "sidecar": set(),
        "cli": {
            "GuardError", "UsageError", "attack", "calibrate", "demo", "evaluate", "export", "log", "serve", "triggers",
            "vet",
        },
    }.get(name, {"lazy"})  # fmt: skip


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        importlib.import_module("guard.vetting").nonsense  # noqa: B018 - the access is the test


@pytest.mark.parametrize(
    "module",
    [
        "guard.sidecar",
        "guard.evidence",
        "guard.profiles",
        "guard.screening",
        "guard.cli",
        "guard.vetting",
        "guard.evaluation",
    ],
)
def test_serving_and_reading_import_without_torch(module: str) -> None:
    assert not loaded(module, {"torch", "open_clip", "sklearn", "scipy"})


@pytest.mark.parametrize("module", ["guard.profiles", "guard.screening", "guard.classifiers", "guard.evidence"])
def test_reading_a_profile_imports_neither_onnx_runtime_nor_pillow(module: str) -> None:
    assert not loaded(module, {"onnxruntime", "PIL"})


def loaded(module: str, names: set[str]) -> set[str]:
    """Which of the names are imported when the module is."""
    code = f"import sys, {module}; print(*set({names!r}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_every_error_is_a_guard_error_with_an_exit_code() -> None:
    from guard import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.GuardError)
        assert getattr(errors, name).exit_code in {2, 4}
