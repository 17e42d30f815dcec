"""CLIP's tokenizer, for serving: byte pairs from a list of merges (Sennrich et al., ACL 2016). Imports without torch.

The ids are those of open_clip's `SimpleTokenizer`, of which guard knows no other. The texts are cleaned in the same
way, by ftfy, and split by the same pattern, which needs regex: both are of the extra `text`.
"""

import heapq
import html
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from guard.errors import MissingDependencyError, ModelError

Cleaning = Literal["lower", "whitespace", "canonicalize"]
"""How a text is cleaned: in small letters; as it is written; in small letters and without punctuation."""
START, END = "<start_of_text>", "<end_of_text>"
MAX_TEXT = 2**13
"""Longest text, in characters: a hundred times what CLIP reads, and little enough to be cleaned and split at once."""
_MAX_CONTEXT, _MAX_MERGES = 2**14, 2**20
_PATTERN = START + "|" + END + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"
_WORDS = 2**16
"""Words whose tokens are remembered, each of at most `_LONGEST_REMEMBERED` bytes."""
_LONGEST_REMEMBERED = 32


@dataclass(frozen=True)
class TextInput:
    """What a text tower reads.

    Attributes:
        context: Number of token ids of a text, those of start and end included; shorter texts are padded with 0.
        trimmed: Whether what follows the largest id changes nothing, so that it need not be computed.
        cleaning: How texts are cleaned.
        merges: The byte pairs in the order in which they are merged, each as two parts and a space.
    """

    context: int
    trimmed: bool
    cleaning: Cleaning
    merges: tuple[str, ...]


class Tokenizer:
    """Turns texts into token ids, as open_clip's `SimpleTokenizer` does.

    Args:
        form: What the text tower reads.

    Attributes:
        form: As given.
        size: Number of tokens; ids are below it.

    Raises:
        ModelError: The merges are not those of a tokenizer.
        MissingDependencyError: ftfy or regex is not installed.
    """

    def __init__(self, form: TextInput) -> None:
        self.form = form
        if not 3 <= form.context <= _MAX_CONTEXT or len(form.merges) > _MAX_MERGES:
            raise ModelError("the tokenizer has a context or a number of merges that is out of range")
        self._fix, self._split = _cleaners()
        letters = list(_letters().values())
        tokens = [*letters, *(letter + _WORD_END for letter in letters)]
        known, self._ranks = set(tokens), dict[tuple[str, str], int]()
        for rank, merge in enumerate(form.merges):
            first, _, second = merge.partition(" ")
            if not {first, second} <= known or (first, second) in self._ranks:
                raise ModelError(f"the tokenizer's merge {rank} is of parts that are not there, or there twice")
            self._ranks[first, second] = rank
            known.add(first + second)
            tokens.append(first + second)
        tokens += [START, END]
        self.size = len(tokens)
        self._tokens, self._ids = tokens, {token: number for number, token in enumerate(tokens)}
        self._start, self._end = self._ids[START], self._ids[END]
        self._remembered = lru_cache(maxsize=_WORDS)(self._merged)

    def encode(self, text: str) -> list[int]:
        """All token ids of a text, without those of start and end.

        Raises:
            ValueError: The text is longer than `MAX_TEXT`.
        """
        found: list[int] = []
        for word in self._split(self.clean(text)):
            data = word.encode()
            found += self._remembered(data) if len(data) <= _LONGEST_REMEMBERED else self._merged(data)
        return found

    @property
    def ends(self) -> tuple[int, int]:
        """The ids of start and end of a text."""
        return self._start, self._end

    def read(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids, cut or padded to the context: shape [N, context].

        Raises:
            ValueError: A text is longer than `MAX_TEXT`.
        """
        return np.array([self.framed(self.encode(text)) for text in texts]).reshape(-1, self.form.context)

    def framed(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """The ids of a text between those of start and end, cut or padded to the context: shape [context]."""
        row = np.zeros(self.form.context, np.int64)
        kept = [self._start, *ids[: self.form.context - 2], self._end]
        row[: len(kept)] = kept
        return row

    def clean(self, text: str) -> str:
        """A text as it is split into words.

        Raises:
            ValueError: The text is longer than `MAX_TEXT`.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"it has {len(text)} characters; at most {MAX_TEXT} are read")
        return self._spaced(html.unescape(html.unescape(str(self._fix(text)))).strip())

    def is_plain(self, text: str) -> bool:
        """Whether cleaning mends nothing in a text: what it mends, other tokenizers read differently.

        Raises:
            ValueError: The text is longer than `MAX_TEXT`.
        """
        return self.clean(text) == self._spaced(text)

    def _spaced(self, text: str) -> str:
        """A text with single spaces, and in small letters where the tokenizer has it so."""
        if self.form.cleaning == "canonicalize":
            text = text.replace("_", " ").translate(_NO_PUNCTUATION)
        text = " ".join(text.split())
        return text if self.form.cleaning == "whitespace" else text.lower()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids up to the first end; ids that are none are left out.

        For an ordinary text, `encode` gives the same ids again.
        """
        parts = []
        for number in ids:
            if number == self._end:
                break
            if number != self._start and 0 <= number < self.size:
                parts.append(self._tokens[number])
        data = bytearray(_bytes()[letter] for letter in "".join(parts).replace(_WORD_END, _SPACE))
        return data.decode(errors="replace").strip()

    def words(self, ids: Sequence[int]) -> list[tuple[int, int, str]]:
        """The words of a text: for each the places of its first id and after its last one, and how it is written."""
        found, start = [], 1
        for place, number in enumerate(ids[1:], 1):
            if number == self._end:
                break
            if self._tokens[number].endswith(_WORD_END):
                found.append((start, place + 1, self.decode(ids[start : place + 1])))
                start = place + 1
        return found

    def _merged(self, word: bytes) -> tuple[int, ...]:
        """The ids of a word: its bytes, of which the pair of the lowest rank is merged as long as there is one.

        Pairs wait in a heap, so that the time grows with n · log n; open_clip looks through the word for each merge.
        """
        text = word.decode()
        if text in {START, END}:
            return (self._ids[text],)
        letters = _letters()
        parts: list[str | None] = [letters[byte] for byte in word]
        parts[-1] = f"{parts[-1]}{_WORD_END}"
        after, before = [*range(1, len(parts)), -1], [*range(-1, len(parts) - 1)]
        waiting = [
            (self._ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in self._ranks
        ]  # fmt: skip
        heapq.heapify(waiting)
        while waiting:
            rank, place = heapq.heappop(waiting)
            first, nearby = parts[place], after[place]
            if first is None or nearby < 0 or self._ranks.get((first, str(parts[nearby]))) != rank:
                continue  # one of the two was merged with another part meanwhile
            parts[place], parts[nearby] = f"{first}{parts[nearby]}", None
            after[place] = after[nearby]
            if after[place] >= 0:
                before[after[place]] = place
            for left, right in ((before[place], place), (place, after[place])):
                if left >= 0 and right >= 0:
                    pair = (str(parts[left]), str(parts[right]))
                    if pair in self._ranks:
                        heapq.heappush(waiting, (self._ranks[pair], left))
        return tuple(self._ids[part] for part in parts if part is not None)


_SPACE = "Ġ"
"""The letter of the byte of a space."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1)
def _letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of their token ids: itself, or one above 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(others)}


@lru_cache(maxsize=1)
def _bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in _letters().items()}


@lru_cache(maxsize=1)
def _cleaners() -> tuple[Any, Any]:
    """Ftfy's mending of texts, and what finds the words of one."""
    try:
        import ftfy
        import regex
    except ImportError as error:
        raise MissingDependencyError("texts are read with ftfy and regex; install clip-guard[text]") from error
    return ftfy.fix_text, regex.compile(_PATTERN, re.IGNORECASE).findall
