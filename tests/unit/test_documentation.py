"""Every public name of guard says what it is: packages, functions, classes with their attributes, and constants."""

import ast
import dataclasses
import enum
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pydantic
import pytest

import guard

PACKAGES = ["guard", *sorted(m.name for m in pkgutil.walk_packages(guard.__path__, "guard.") if m.ispkg)]
MODULES = [*PACKAGES, "guard.errors"]


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def described(documentation: str, name: str, sections: str) -> bool:
    """Whether one of the sections has an entry of this name."""
    found = re.split(rf"^ *(?:{sections}):\n", documentation, maxsplit=1, flags=re.MULTILINE)
    return len(found) == 2 and re.search(rf"^ *{name}: \S", found[1], re.MULTILINE) is not None


def documented_constants(package: str) -> set[str]:
    """Names that are assigned at the top of a module of the package, with a string below."""
    found = set()
    for file in Path(str(importlib.import_module(package).__file__)).parent.glob("*.py"):
        body = tree(str(file)).body
        for statement, following in pairwise(body):
            targets: list[ast.expr] = []
            if isinstance(statement, ast.Assign):
                targets = [t for e in statement.targets for t in (e.elts if isinstance(e, ast.Tuple) else [e])]
            elif isinstance(statement, ast.AnnAssign):
                targets = [statement.target]
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def attributes(cls: type) -> Iterator[str]:
    """The public attributes that instances have: fields, and what `__init__` sets."""
    if dataclasses.is_dataclass(cls):
        yield from (field.name for field in dataclasses.fields(cls))
    elif issubclass(cls, tuple) and hasattr(cls, "_fields"):
        yield from cls._fields
    elif not issubclass(cls, pydantic.BaseModel):
        for node in tree(str(inspect.getsourcefile(cls))).body:
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                yield from (
                    target.attr
                    for method in node.body
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__"
                    for target in ast.walk(method)
                    if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
                    if isinstance(target.value, ast.Name) and target.value.id == "self"
                )


def gaps(cls: type) -> Iterator[str]:
    """What a class does not say about itself."""
    documentation = cls.__dict__.get("__doc__") or ""
    if not documentation or documentation.startswith(f"{cls.__name__}("):  # dataclasses makes such a text
        yield cls.__name__
        return
    bases = "".join(base.__doc__ or "" for base in cls.__mro__[1:-1] if base.__module__.startswith("guard."))
    # An attribute of a class that is no record may be one of its arguments.
    sections = "Attributes" if dataclasses.is_dataclass(cls) else "Attributes|Args"
    for name in dict.fromkeys(attributes(cls)):
        if not name.startswith("_") and not any(described(text, name, sections) for text in (documentation, bases)):
            yield f"{cls.__name__}.{name}, under {sections}"
    if issubclass(cls, pydantic.BaseModel):
        for name, field in cls.model_fields.items():
            if not field.description and not any(described(text, name, sections) for text in (documentation, bases)):
                yield f"{cls.__name__}.{name}, as a field"
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        function = getattr(function, "func", function)  # cached_property
        inherited = any(getattr(getattr(base, name, None), "__doc__", None) for base in cls.__mro__[1:-1])
        if not name.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(function) and not inherited:
            yield f"{cls.__name__}.{name}"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module: Any = importlib.import_module(name)
    missing = [] if module.__doc__ else [name]
    constants = documented_constants(name)
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value):
            missing += [public] if issubclass(value, enum.Enum) and not value.__doc__ else gaps(value)
        elif inspect.isfunction(value) or isinstance(value, click.Command):
            missing += [] if getattr(value, "help", value.__doc__) else [public]
        elif public not in constants and not public.startswith("__"):
            missing.append(f"{public}, below its assignment")
    assert missing == []
