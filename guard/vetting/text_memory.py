"""Finished searches of text towers on disk, so that an examination that was interrupted goes on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guard.classifiers.digest import canonical, sha256
from guard.vetting.cache import SearchCache
from guard.vetting.text_search import FoundTokens

METHOD = "text 1"
"""Changes whenever the searches or probes do, so that older results are not used."""


class TextMemory:
    """What the searches of one examination found, by all that their results depend on.

    Args:
        cache: Where it is stored; None to remember nothing.
        identity: What all searches of the examination depend on: the towers, the prompts, the settings.
    """

    def __init__(self, cache: SearchCache | None, identity: Sequence[object]) -> None:
        self._cache = cache
        self._subject = canonical([METHOD, *identity])

    def probes(self, names: Sequence[str], measure: Callable[[], Tensor]) -> Tensor:
        """The lead of each probe, shape [P]: as it is stored, or as it is measured."""
        place = self._place("probes", *names)
        known = self._cache.load(place) if self._cache else None
        if known and known[0][1].get("leads", torch.empty(0)).shape == (len(names),):
            return known[0][1]["leads"]
        leads = measure()
        if self._cache:
            self._cache.save(place, [({}, {"leads": leads.cpu()})])
        return leads

    def search(self, what: Sequence[object], search: Callable[[], tuple[FoundTokens, int]]) -> tuple[FoundTokens, int]:
        """What a search found and the prompts that it pushed through towers: as it is stored, or as it is made."""
        place = self._place("search", *what)
        known = self._cache.load(place) if self._cache else None
        if known:
            numbers, tensors = known[0]
            try:
                tokens = tuple(int(token) for token in numbers["tokens"])
                leads = float(numbers["lead"]), float(numbers["token_lead"])
                found = FoundTokens(numbers["place"], tensors["vectors"], leads[0], tokens, leads[1])
                return found, int(numbers["passes"])
            except (KeyError, TypeError, ValueError):
                pass  # searched again
        found, passes = search()
        if self._cache:
            numbers = {"place": found.place, "lead": found.lead, "tokens": found.tokens, "passes": passes}
            numbers["token_lead"] = found.token_lead
            self._cache.save(place, [(numbers, {"vectors": found.vectors.cpu()})])
        return found, passes

    def _place(self, *what: object) -> str:
        return "text-" + sha256(self._subject + canonical(list(what)))[:40]
