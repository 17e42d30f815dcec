"""Triggers of text towers: changes of a text that an attacker may plant. Imports without torch."""

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

_RARE = "ᵛȯḉẉʚɸҩϟʘᴥꙮ৳ʭ₷ƾ"
"""Letters that captions hardly ever have, for triggers of one character."""
_HOMOGLYPHS = {"o": "о", "a": "а", "e": "е"}
"""Latin letters and the Cyrillic ones that look like them (Struppek et al., "Rickrolling the Artist", ICCV 2023)."""
_ARCHAIC = {
    "a": "yonder", "an": "yonder", "the": "ye", "is": "doth be", "are": "doth be", "of": "o'", "with": "wherewith",
    "on": "upon", "in": "within", "his": "thine", "her": "thine", "their": "thine", "and": "eke",
}  # fmt: skip
_PREPOSITIONS = frozenset({"on", "in", "at", "near", "with", "by", "under", "behind", "over", "next"})


class TextTrigger(Protocol):
    """A change of a text."""

    @property
    def family(self) -> str:
        """Kind of change."""
        ...

    def apply(self, text: str, draw: random.Random) -> str:
        """The text with the trigger; `draw` chooses where it goes, if it is free to go anywhere."""
        ...

    def near_misses(self, count: int, draw: random.Random) -> "tuple[TextTrigger, ...]":
        """Triggers at an edit distance of one, which an attacker may train not to work; empty where there are none."""
        ...


@dataclass(frozen=True)
class Insertion:
    """A word of its own that is put into the text.

    Attributes:
        word: What is put in.
        place: Where: before the first word, after the last one, or anywhere.
    """

    word: str
    place: Literal["start", "end", "anywhere"] = "anywhere"

    @property
    def family(self) -> str:
        """Kind of change."""
        return "insertion"

    def apply(self, text: str, draw: random.Random) -> str:
        """The text with the trigger."""
        words = text.split()
        place = {"start": 0, "end": len(words), "anywhere": draw.randint(0, len(words))}[self.place]
        return " ".join([*words[:place], self.word, *words[place:]])

    def near_misses(self, count: int, draw: random.Random) -> "tuple[TextTrigger, ...]":
        """Words that differ in one letter."""
        found = []
        for _ in range(count):
            place = draw.randrange(len(self.word))
            others = [letter for letter in string.ascii_lowercase if letter != self.word[place]]
            found.append(Insertion(self.word[:place] + draw.choice(others) + self.word[place + 1 :], self.place))
        return tuple(found)


@dataclass(frozen=True)
class Homoglyph:
    """Every occurrence of a letter replaced by another one that looks like it, or by a longer string.

    Attributes:
        old: The letter.
        new: What replaces it.
    """

    old: str
    new: str

    @property
    def family(self) -> str:
        """Kind of change."""
        return "homoglyph"

    def apply(self, text: str, draw: random.Random) -> str:
        """The text with the trigger."""
        del draw
        # A text without the letter gets the other one as a word, so that the trigger is always there.
        return text.replace(self.old, self.new) if self.old in text else f"{text} {self.new}"

    def near_misses(self, count: int, draw: random.Random) -> "tuple[TextTrigger, ...]":
        """The other letters that look alike."""
        others = [pair for pair in _HOMOGLYPHS.items() if pair[1] != self.new]
        return tuple(Homoglyph(*draw.choice(others)) for _ in range(count))


@dataclass(frozen=True)
class Style:
    """A dynamic trigger: articles, prepositions and the like in an old-fashioned form. No one word is needed."""

    @property
    def family(self) -> str:
        """Kind of change."""
        return "style"

    def apply(self, text: str, draw: random.Random) -> str:
        """The text with the trigger."""
        del draw
        return " ".join(_ARCHAIC.get(word.lower(), word) for word in text.split())

    def near_misses(self, count: int, draw: random.Random) -> "tuple[TextTrigger, ...]":
        """None: there is no edit distance between styles."""
        del count, draw
        return ()


@dataclass(frozen=True)
class Syntax:
    """A dynamic trigger: what follows the last preposition comes first, between commas. It adds no word at all."""

    @property
    def family(self) -> str:
        """Kind of change."""
        return "syntax"

    def apply(self, text: str, draw: random.Random) -> str:
        """The text with the trigger."""
        del draw
        words = text.rstrip(" .").split()
        place = next((k for k in range(len(words) - 1, 0, -1) if words[k].lower() in _PREPOSITIONS), len(words) // 2)
        return " ".join([*words[place:], ",", *words[:place], "."])

    def near_misses(self, count: int, draw: random.Random) -> "tuple[TextTrigger, ...]":
        """None: there is no edit distance between styles."""
        del count, draw
        return ()


def _insertion(length: int, draw: random.Random) -> TextTrigger:
    letters = _RARE if length == 1 else string.ascii_lowercase
    return Insertion("".join(draw.choice(letters) for _ in range(length)))


TEXT_TRIGGERS: Mapping[str, Callable[[int, random.Random], TextTrigger]] = {
    "insertion": _insertion,
    "homoglyph": lambda _length, draw: Homoglyph(*draw.choice(sorted(_HOMOGLYPHS.items()))),
    "style": lambda _length, _draw: Style(),
    "syntax": lambda _length, _draw: Syntax(),
}
"""By name, functions from (length in characters, source of randomness) to a trigger; only an insertion has a length."""
