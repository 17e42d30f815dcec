"""Ordinary prompts, on which text towers are compared: made from a list of words, or read from a file."""

import random
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from guard._documents import read_text, read_toml
from guard.errors import UsageError

MIN_PROMPTS = 96
"""Fewest prompts that a text tower is examined with."""
MAX_PROMPTS = 100_000
_MAX_BYTES, _LONGEST, _TRIES = 32 * 2**20, 2000, 50


@cache
def _words() -> dict[str, list[str]]:
    with resources.as_file(resources.files("guard.vetting").joinpath("ordinary_prompts.toml")) as path:
        return dict(read_toml(path, _MAX_BYTES, UsageError, missing=f"{path} is missing; install guard again"))


def ordinary_prompts(count: int, seed: int) -> tuple[str, ...]:
    """Different prompts such as people write, the same ones for the same seed.

    Args:
        count: How many; at most 5,000.
        seed: Seed for the choice.
    """
    words, draw = _words(), random.Random(seed)  # noqa: S311 - repeatable, not secret
    found: dict[str, None] = {}
    for _ in range(count * _TRIES):
        chosen = {key: draw.choice(values) for key, values in words.items()}
        thing2 = draw.choice([thing for thing in words["thing"] if thing != chosen["thing"]])
        found[chosen["forms"].format(**chosen, thing2=thing2)] = None
        if len(found) == count:
            break
    return tuple(found)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, one on each line; blank lines and repetitions are left out.

    Raises:
        UsageError: The file cannot be read, is not UTF-8, or has fewer than 96 prompts, more than 100,000, or one
            of more than 2,000 characters.
    """
    text = read_text(path, _MAX_BYTES, UsageError, missing=f"there is no file of prompts {path}")
    prompts = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    check_prompts(prompts, f"the file {path}")
    return prompts


def check_prompts(prompts: Sequence[str], source: str) -> None:
    """Make sure that there are enough prompts, and not too many or too long.

    Raises:
        UsageError: There are not.
    """
    if not MIN_PROMPTS <= len(set(prompts)) <= MAX_PROMPTS:
        raise UsageError(f"{source} has {len(set(prompts))} different prompts; it takes {MIN_PROMPTS} to {MAX_PROMPTS}")
    if any(len(prompt) > _LONGEST for prompt in prompts):
        raise UsageError(f"{source} has a prompt of more than {_LONGEST} characters; leave such prompts out")
