"""Where the values of settings come from, and which sources may change what a configuration file requires."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from guard.errors import UsageError
from guard.sidecar.model_settings import split
from guard.sidecar.policy import Mode

ENVIRONMENT_PREFIX: Final = "GUARD_"
_STRICTEST = ("failure_policy", "closed")
_GUARDED = ("policy", "trust", "require_certified", "failure_policy", "models")
"""Settings by which certificates are judged, and that decide what happens without one."""


class Source(StrEnum):
    """Where the value of a setting comes from; a later one wins."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    OPTION = "option"


@dataclass(frozen=True)
class EffectiveSetting:
    """A setting in effect.

    Attributes:
        model: Label of the model that it is of; "" if it is of the sidecar, or of models without a value of their own.
        name: Its name.
        value: Its value as JSON.
        source: Where the value comes from.
    """

    model: str
    name: str
    value: str
    source: Source


def sources_of(table: Mapping[str, Any], given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Source]:
    """Where the value of each setting comes from that is not a default.

    Args:
        table: The contents of the file.
        given: The options that were given.
        names: Names of all settings.
    """
    named, variables = dict.fromkeys(table, Source.FILE), environment()
    for name in names:
        if f"{ENVIRONMENT_PREFIX}{name}".upper() in variables:
            named[name] = Source.ENVIRONMENT
    return named | dict.fromkeys(given, Source.OPTION)


def environment() -> dict[str, str]:
    """The variables that are not empty, by name in upper case: settings are read from variables in any case."""
    return {name.upper(): value for name, value in os.environ.items() if value}


def only_stricter(table: Mapping[str, Any], given: dict[str, Any]) -> None:
    """Let options and environment make the rules for certificates stricter than the configuration file, never weaker.

    Policies of all sources are asked. What would replace a rule of the file is refused, where the file requires
    certified models: whoever may set variables of a container need not be who decides which models it serves.

    Args:
        table: The contents of the file.
        given: The options; `policy` is completed.

    Raises:
        UsageError: An option or a variable contradicts the file.
    """
    found = environment()
    variables = {name: found.get(f"{ENVIRONMENT_PREFIX}{name.upper()}") for name in _GUARDED}
    named = [split(each) for each in (given.get("policy"), variables["policy"], table.get("policy")) if each]
    if named:
        given["policy"] = tuple(dict.fromkeys(str(path) for paths in named for path in paths))
    if table.get("require_certified") is not True:
        return
    # Otherwise another mode would bring another default.
    stated = table.get("failure_policy", "open" if table.get("mode") == Mode.SHADOW else "closed")
    for name in _GUARDED:
        own = stated if name == "failure_policy" else table.get(name, ())
        for value, source in ((given.get(name), "an option"), (variables[name], "the environment")):
            if name == "policy" or value in (None, "") or _same(value, own) or (name, value) == _STRICTEST:
                continue
            raise UsageError(f"the configuration file requires certified models, so {source} must not change {name}")
    given.setdefault("failure_policy", stated)


def _same(value: object, stated: object) -> bool:
    """Whether a value of an option or a variable says what the file states."""
    if isinstance(stated, bool):
        return str(value).lower() in ({"true", "1", "yes", "on"} if stated else {"false", "0", "no", "off"})
    if isinstance(stated, list | tuple):
        return [str(part) for part in split(value)] == [str(part) for part in stated]
    return str(value) == str(stated)
