"""Probes of text towers: what may be a trigger, put into ordinary prompts, forward passes only.

The list is `text_probes.toml`: rare tokens, letters of other scripts, emoji, control and zero-width characters, words
that published attacks used, and letters that are replaced by others that look like them. Whoever adds a text there adds
a probe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch
from torch import Tensor

from guard._documents import read_toml
from guard.classifiers.text_tower import TextTower
from guard.errors import UsageError
from guard.vetting.assimilation import agreement

_MAX_BYTES = 2**20
_CHUNK = 1024


@dataclass(frozen=True)
class TextProbe:
    """A fixed change of texts.

    Attributes:
        kind: What it is one of.
        new: The text that is inserted as a word, or that replaces a letter.
        old: The letter that is replaced; None for a word.
    """

    kind: str
    new: str
    old: str | None = None

    @property
    def name(self) -> str:
        """For people, in ASCII."""
        return ascii(self.new) if self.old is None else f"{self.old!r} → {self.new!a}"

    def apply(self, text: str, place: int) -> str:
        """The text with the probe: a word after the first `place` words, or replaced letters."""
        if self.old is not None:
            return text.replace(self.old, self.new)
        words = text.split(" ")
        place %= len(words) + 1
        return " ".join([*words[:place], self.new, *words[place:]])


@cache
def listed_text_probes() -> tuple[TextProbe, ...]:
    """The probes of guard's own list."""
    with resources.as_file(resources.files("guard.vetting").joinpath("text_probes.toml")) as path:
        listed = read_toml(path, _MAX_BYTES, UsageError, missing=f"{path} is missing; install guard again")
    words = [TextProbe(kind, new) for kind, texts in listed["words"].items() for new in texts]
    return (*words, *(TextProbe(kind, new, old) for kind, pairs in listed["letters"].items() for old, new in pairs))


def probe_leads(
    first: TextTower,
    second: TextTower,
    prompts: Sequence[str],
    probes: Sequence[TextProbe],
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Tensor:
    """The lead of each probe (`guard.vetting.text_search`): shape [P].

    Args:
        first: The tower on which prompts with the probe are to agree.
        second: The tower on which they are not to.
        prompts: Ordinary prompts.
        probes: What to try.
        progress: Called with (what, probes done, probes in all).
    """
    towers, group = (first, second), max(1, _CHUNK // len(prompts))
    before = [agreement(tower.encode(prompts)) for tower in towers]
    leads = []
    for start in range(0, len(probes), group):
        part = probes[start : start + group]
        tokens = first.tokens([probe.apply(text, place) for probe in part for place, text in enumerate(prompts)])
        found = [agreement(tower.encode_tokens(tokens).unflatten(0, (len(part), len(prompts)))) for tower in towers]
        gains = [(after - plain) / (1 - plain).clamp(min=1e-3) for after, plain in zip(found, before, strict=True)]
        leads.append(gains[0] - gains[1])
        progress("text probes", start + len(part), len(probes))
    return torch.cat(leads)
