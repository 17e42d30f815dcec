"""The order of rooms: a module imports only from rooms below its own, and no modules import each other in a circle.

A room is a package of `guard`, or one of its private modules. Imports inside functions and under `TYPE_CHECKING` count:
they show what a module knows of, whenever that is loaded.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import guard

FLOORS = (
    ("errors",),
    ("_cpus", "_files", "_lazy", "_pages", "_plots", "_types", "_workers"),
    ("_documents",),
    ("_safetensors",),
    ("distributed",),
    ("protocol", "triggers"),
    ("classifiers",),
    ("screening", "vetting"),
    ("baselines",),
    ("profiles",),
    ("certificates",),
    ("report",),
    ("scan",),
    ("evidence",),
    ("repair",),
    # The sidecar stands beside the attacks, since what trains is never loaded where requests are served.
    ("attacks", "sidecar", "testing"),
    ("evaluation",),
    ("diagnostics",),
    # The Python API: the names of the package itself.
    ("guard",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
"""The rooms of `guard` from the lowest to the highest; those on one floor do not use each other."""

SIDECAR_FLOORS = (
    ("addresses", "policy"),
    ("model_settings",),
    ("setting_sources",),
    ("settings",),
    ("transport",),
    ("telemetry",),
    ("decisions",),
    ("inference",),
    ("host",),
    # What the package exports.
    ("sidecar",),
)
"""The same for the rooms inside `guard.sidecar`."""

ONLY = {"testing": {"errors", "protocol"}}
"""Rooms that may use fewer rooms than their floor allows: other projects import `guard.testing` into their tests."""

FREE = {"guard.__version__"}
"""What every module may import from the package itself."""


@dataclass(frozen=True)
class Import:
    """One module of guard imports another.

    Attributes:
        source: Dotted name of the module that imports.
        line: Where it does.
        target: Dotted name of the module that it imports, or imports names from.
    """

    source: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def read_imports(package: Path) -> Iterator[Import]:
    """All imports between the modules of a package, wherever they stand in a module."""
    modules = {_module(file, package): file for file in sorted(package.rglob("*.py"))}
    for source, file in modules.items():
        parent = source if file.name == "__init__.py" else source.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in _imported(node, parent):
                if name in FREE or name.split(".")[0] != package.name:
                    continue
                target = name if name in modules else name.rpartition(".")[0]
                assert target in modules, f"{source}:{name} is no module"
                yield Import(source, getattr(node, "lineno", 0), target)


def _module(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(node: ast.AST, parent: str) -> Iterator[str]:
    """Dotted names that a statement imports: modules, or names in modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = parent.split(".")[: 1 - node.level or None] if node.level else []
        origin = ".".join([*above, *filter(None, [node.module])])
        yield from (f"{origin}.{alias.name}" for alias in node.names)


def room_of(module: str, package: str) -> str:
    """The room of `package` that a module is in: `guard.vetting.nulls` is in `vetting`; the package itself is one."""
    inside = module.removeprefix(package).lstrip(".")
    return inside.split(".")[0] or package.rpartition(".")[2]


def against_the_order(
    imports: list[Import],
    package: str,
    floors: tuple[tuple[str, ...], ...],
    only: Mapping[str, set[str]] = {},
) -> list[str]:
    """Imports from a room that is not below the module's own, as sentences."""
    height = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    wrong = []
    for each in imports:
        if not all(f"{module}.".startswith(f"{package}.") for module in (each.source, each.target)):
            continue
        source, target = room_of(each.source, package), room_of(each.target, package)
        if source == target:
            continue
        if height[target] >= height[source] or target not in only.get(source, {target}):
            wrong.append(str(each))
    return wrong


def circles(imports: list[Import]) -> list[list[str]]:
    """Circles of modules that import each other; each circle that is found is left out of the search for the next."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        graph.setdefault(each.source, set()).add(each.target)
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            # Each member is a predecessor, thus an import, of the one after it.
            circle = list(reversed(error.args[1]))
            found.append(circle)
            graph[circle[0]].remove(circle[1])
        else:
            return found


IMPORTS = list(dict.fromkeys(read_imports(Path(guard.__path__[0]))))


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(each.source, "guard") for each in IMPORTS} | {room_of(each.target, "guard") for each in IMPORTS}
    assert rooms <= {room for floor in FLOORS for room in floor}


def test_rooms_use_only_rooms_below_them() -> None:
    wrong = against_the_order(IMPORTS, "guard", FLOORS, ONLY)
    assert not wrong, "\n".join(wrong)


def test_rooms_of_the_sidecar_use_only_rooms_below_them() -> None:
    wrong = against_the_order(IMPORTS, "guard.sidecar", SIDECAR_FLOORS)
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = circles(IMPORTS)
    assert not found, "\n".join(" → ".join(circle) for circle in found)


class TestOfTheTest:
    """What is forbidden is seen, in whatever form it is written."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        for name in ("low", "high"):
            (tmp_path / "small" / name).mkdir(parents=True)
            (tmp_path / "small" / name / "__init__.py").touch()
        (tmp_path / "small" / "__init__.py").touch()
        (tmp_path / "small" / "high" / "thing.py").touch()
        return tmp_path / "small"

    @pytest.mark.parametrize(
        "text",
        [
            "import small.high.thing",
            "from small.high.thing import name",
            "from small.high import thing",
            "from small import high",
            "from ..high import thing",
            "from .. import high",
            "def load():\n    from small.high import thing",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from small.high import thing",
        ],
    )
    def test_an_import_from_above_is_seen(self, package: Path, text: str) -> None:
        (package / "low" / "thing.py").write_text(text)
        (wrong,) = against_the_order(list(read_imports(package)), "small", (("low",), ("high",)))
        assert wrong.startswith("small.low.thing:")

    def test_an_import_from_below_is_none_unless_the_room_may_use_fewer(self, package: Path) -> None:
        (package / "high" / "other.py").write_text("import os, small.low\nfrom small.high import thing")
        imports = list(read_imports(package))
        assert against_the_order(imports, "small", (("low",), ("high",))) == []
        assert against_the_order(imports, "small", (("low",), ("high",)), {"high": set()}) != []
        assert against_the_order(imports, "small", (("low", "high"),)) != []

    def test_a_circle_is_seen(self, package: Path) -> None:
        (package / "high" / "thing.py").write_text("def late():\n    from small.high import other")
        (package / "high" / "other.py").write_text("from small.high import third")
        (package / "high" / "third.py").write_text("from small.high.thing import late")
        (circle,) = circles(list(read_imports(package)))
        assert set(circle) == {"small.high.thing", "small.high.other", "small.high.third"}

    def test_a_module_that_imports_its_own_package_is_a_circle(self, package: Path) -> None:
        (package / "high" / "__init__.py").write_text("from small.high.thing import name")
        (package / "high" / "thing.py").write_text("from small.high import name")
        assert len(circles(list(read_imports(package)))) == 1
