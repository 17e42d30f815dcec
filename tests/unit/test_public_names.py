import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import guard

PACKAGES = sorted(module.name for module in pkgutil.iter_modules(guard.__path__) if module.ispkg)


def test_the_rooms_are_the_ones_that_are_documented() -> None:
    assert PACKAGES == [
        "attacks", "baselines", "certificates", "classifiers", "cli", "demo", "diagnostics", "distributed",
        "evaluation", "evidence", "profiles", "protocol", "repair", "report", "scan", "screening", "sidecar", "testing",
        "triggers", "vetting",
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
        "cli": {
            "GuardError", "UsageError", "attack", "calibrate", "certify", "convert", "demo", "evaluate", "export",
            "log", "repair", "serve", "triggers", "verify", "vet",
        },
    }.get(name, {"lazy"})  # fmt: skip


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        importlib.import_module("guard.vetting").nonsense  # noqa: B018 - the access is the test


@pytest.mark.parametrize(
    "module",
    [
        "guard.sidecar.host.server",
        "guard.evidence",
        "guard.profiles",
        "guard.screening",
        "guard.cli",
        "guard.vetting",
        "guard.baselines",
        "guard.triggers",
        "guard.evaluation",
        "guard.certificates",
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
        assert getattr(errors, name).exit_code in {1, 2, 4}


def test_the_tree_of_errors_shows_every_error_in_its_place() -> None:
    from guard import errors

    drawn: dict[str, tuple[int, str]] = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.search(r"(\w+Error)\s+(\d|–|…)", line):
            drawn[found[1]] = (found.start(1), found[2])
    assert set(drawn) == set(errors.__all__)
    root = drawn["GuardError"][0]
    for name, (indent, code) in drawn.items():
        error = getattr(errors, name)
        assert len(error.__mro__) - len(errors.GuardError.__mro__) == (indent - root) // 4, name
        assert code in {str(error.exit_code), "–", "…"}, name


def test_errors_for_users_are_defined_in_one_module() -> None:
    from guard import errors

    for path in Path(guard.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and path != Path(errors.__file__):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & set(errors.__all__), f"{path.name}: {node.name}"
