"""A second look at a flagged text: which word is it that makes it suspicious? numpy only."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from guard._types import Floats
from guard.classifiers.tokenizer import Tokenizer
from guard.screening.second_look import Bucket, PValues, SecondLookResult, View

EmbedIds = Callable[[NDArray[np.int64]], tuple[Floats, Floats]]
"""Token ids, shape [N, L], to embeddings, shape [N, D], and class scores, shape [N, C]."""
MAX_WORDS = 64


class TextLook:
    """Reads a flagged text again without each of its words; safe to use from many threads.

    *Confirmed*: without one word the text is not flagged, as it is with a trigger that is a word. *Undecided*: no word
    alone makes it so, as it is with a style, an order of words, or a text that is unusual as a whole. No flag is
    withdrawn: a clean text whose one rare word made it unusual is read no other way than a triggered one.

    Args:
        tokenizer: Tells words apart.
        embed: Computes embeddings and class scores of token ids.
        p_values: Computes the p-values of the first look from embeddings.
        alpha: Largest p-value that is flagged, in (0, 1).
        max_per_second: Largest average number of second looks per second, above 0.
        clock: Returns a time in seconds that never decreases.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        embed: EmbedIds,
        p_values: PValues,
        alpha: float,
        max_per_second: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenizer, self._embed, self._p_values, self._alpha = tokenizer, embed, p_values, alpha
        self._bucket = Bucket(max_per_second, clock)

    def look(self, ids: NDArray[np.int64]) -> SecondLookResult:
        """Take a second look at one text: its token ids, shape [L]."""
        words = self._tokenizer.words(ids.tolist())[:MAX_WORDS]
        if len(words) < 2:
            return SecondLookResult("undecided", "there is nothing left of a text of one word without that word")
        if not self._bucket.take():
            return SecondLookResult("skipped", "the budget for second looks was spent")
        rows = np.zeros((len(words) + 1, len(ids)), np.int64)
        rows[0] = ids
        for row, (start, stop, _) in zip(rows[1:], words, strict=True):
            row[: len(ids) - stop + start] = np.concatenate([ids[:start], ids[stop:]])
            row[len(ids) - stop + start :] = ids[-1]
        embeddings, logits = self._embed(rows)
        ordered = np.sort(logits, axis=1)
        names = ["as sent", *(f"without {word!a}" for _, _, word in words)]
        views = tuple(
            View(name, int(answer), float(margin), float(p_value))
            for name, answer, margin, p_value in zip(
                names, logits.argmax(1), ordered[:, -1] - ordered[:, -2], self._p_values(embeddings), strict=True
            )
        )
        best = max(views[1:], key=lambda view: view.p_value)
        change = f"p = {views[0].p_value:.2g}, and {best.p_value:.2g} {best.name}"
        if best.p_value > self._alpha:
            return SecondLookResult("confirmed", f"one word makes the text suspicious: {change}", views)
        return SecondLookResult("undecided", f"no word alone makes the text suspicious: {change}", views)
