"""Public names that are imported when they are first used.

`import guard` must be cheap, and the serving path must not load torch, yet `guard`, `guard.classifiers` and
`guard.vetting` export names that need it.
"""

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """Return a module-level `__getattr__` (PEP 562) that imports each name from its submodule on first use.

    Args:
        package: The package's `__name__`.
        names: Public name → submodule that it is imported from.
    """

    def load(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{names[name]}"), name)

    return load
