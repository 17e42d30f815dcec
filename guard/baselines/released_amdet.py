"""AMDET, step by step as its released code does it: a backdoor of a text tower from one assimilating pseudo-token.

Wang et al., "Assimilation Matters: Model-level Backdoor Detection in Vision-Language Pretrained Models", arXiv
2512.00343; github.com/Robin-WZQ/AMDET (commit 9cd7731). The loss, its constants, the order of the tests and of the
random draws are those of the released code, which differ in places from the description: the first token and the
diagonal are part of the assimilation; every later token keeps its positional embedding when the pseudo-token moves it;
the running mean is over all steps; the first test prompt can never have "the same target" as itself, and counts.
Departures: any width, depth and context, and full attention besides causal; a tower without a result is no error (the
released code ends with a NameError); the grid of the landscape is computed in batches; prompts are used in their order,
where the released code uses that of the directory listing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from guard.classifiers.text_tower import TextTower
from guard.errors import UsageError
from guard.vetting.assimilation import assimilation, landscape, positive_curvature

_BATCH = 64


@dataclass(frozen=True)
class AmdetSettings:
    """The constants of the released code.

    Attributes:
        tokens: Number of pseudo-tokens.
        prompts: Most prompts that are used; four fifths are optimised on, and the others are tested on.
        epochs: Passes over the prompts.
        batch: Prompts in each step.
        learning_rate: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
        original: Weight of the cosine with the features of the prompt without the pseudo-token.
        anchor: Weight of the cosine with the features of the anchor.
        tested: Mean loss over all steps below which the tests are made, on every second step.
        stopped: Mean loss below which an epoch ends.
        assimilated: Assimilation above which a prompt counts as assimilated.
        same: Mean cosine with the first test prompt above which a prompt has the same target.
        different: Mean cosine with the anchor's features below which a prompt differs from the anchor.
        shares: What must be exceeded by the shares of assimilated, of equal and of different prompts, and of positive
            curvature.
        grid: Points on a side of the landscape.
        extent: Half its side.
        seed: Seed for the start, the batches and the second direction, drawn in the order of the released code.
    """

    tokens: int = 1
    prompts: int = 4000
    epochs: int = 2
    batch: int = 10
    learning_rate: float = 0.08
    weight_decay: float = 1e-5
    original: float = 0.1
    anchor: float = 0.1
    tested: float = -0.76
    stopped: float = -0.85
    assimilated: float = 0.8
    same: float = 0.92
    different: float = 0.0
    shares: tuple[float, float, float, float] = (0.8, 0.995, 0.95, 0.8)
    grid: int = 50
    extent: float = 10.0
    seed: int = 42


@dataclass(frozen=True)
class AmdetTests:
    """The outcome of the four tests; None for one that was not made, because one before it failed.

    Attributes:
        assimilated: Share of test prompts that are assimilated.
        same: Share with the same target as the first one.
        different: Share whose features differ from the anchor's.
        curvature: Share of positive curvature.
    """

    assimilated: float
    same: float | None = None
    different: float | None = None
    curvature: float | None = None


@dataclass(frozen=True)
class AmdetResult:
    """What AMDET finds.

    Attributes:
        backdoored: Whether all tests passed.
        losses: The loss of each step.
        mean_loss: The mean over all steps at each step, as the released code forms it.
        tests: The last tests made; None where the mean loss never fell far enough.
        embedding: The pseudo-tokens, shape [k, W].
        features: The features of the last batch's first prompt with them, shape [L, W]: what the backdoor leads to.
        passes: Number of prompts pushed through text towers.
        seconds: Wall-clock time.
        seed: The seed.
    """

    backdoored: bool
    losses: tuple[float, ...]
    mean_loss: tuple[float, ...]
    tests: AmdetTests | None
    embedding: Tensor
    features: Tensor
    passes: int
    seconds: float
    seed: int


def amdet(
    tower: TextTower,
    anchor: TextTower,
    prompts: Sequence[str],
    settings: AmdetSettings | None = None,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> AmdetResult:
    """Look for a pseudo-token that assimilates the features of all prompts, and test it four times.

    Args:
        tower: The suspect.
        anchor: A trusted text tower with the same width and context.
        prompts: Ordinary prompts.
        settings: The constants.
        progress: Called with (steps done, largest number of steps).

    Raises:
        UsageError: The anchor has another width or context, or there are too few prompts.
    """
    settings = settings or AmdetSettings()
    if (tower.width, tower.context) != (anchor.width, anchor.context):
        raise UsageError("AMDET needs an anchor with the width and the context of the suspect")
    used = list(prompts[: settings.prompts])
    split = int(len(used) * 0.8)
    if split < settings.batch or len(used) - split < 2:
        raise UsageError(f"AMDET needs more than {len(used)} prompts")
    search = _Search(tower, anchor, used[:split], used[split:], settings)
    return search.run(progress)


class _Search:
    def __init__(
        self, tower: TextTower, anchor: TextTower, train: list[str], test: list[str], settings: AmdetSettings
    ) -> None:
        self._tower, self._anchor, self._settings = tower, anchor, settings
        self.passes = 0
        self._train, self._test = (self._prepared(prompts) for prompts in (train, test))

    @torch.no_grad()
    def _prepared(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        hidden = self._tower.embed(self._tower.tokens(prompts))
        return hidden, torch.cat([self._features(self._tower, part) for part in hidden.split(_BATCH)])

    def _features(self, tower: TextTower, hidden: Tensor) -> Tensor:
        self.passes += len(hidden)
        return tower.features(hidden)

    def _spliced(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Hidden states with the pseudo-tokens after the first k; the rest moves, and what leaves the context is lost.

        Args:
            hidden: Shape [N, L, W].
            embedding: Shape [k, W], or [N, k, W].
        """
        count = self._settings.tokens
        new = embedding.expand(len(hidden), -1, -1)
        return torch.cat([hidden[:, :count], new, hidden[:, count:]], dim=1)[:, : hidden.shape[1]]

    def _losses(self, embedding: Tensor, hidden: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each prompt, shape [N], and the features with the pseudo-tokens."""
        spliced = self._spliced(hidden, embedding)
        found, anchored = self._features(self._tower, spliced), self._features(self._anchor, spliced)
        loss = (
            -assimilation(found, published=True)
            + self._settings.original * cosine_similarity(original, found, dim=-1).mean(-1)
            + self._settings.anchor * cosine_similarity(anchored, found, dim=-1).mean(-1)
        )
        return loss, found

    def run(self, progress: Callable[[int, int], None]) -> AmdetResult:
        settings, started = self._settings, time.monotonic()
        draws = torch.Generator().manual_seed(settings.seed)
        start = torch.randn(settings.tokens, self._tower.width, generator=draws)
        embedding = start.to(self._tower.device).requires_grad_()
        optimiser = torch.optim.Adam([embedding], lr=settings.learning_rate, weight_decay=settings.weight_decay)
        hidden, original = self._train
        batches = -(-len(hidden) // settings.batch)
        losses: list[float] = []
        means: list[float] = []
        tests, found, passed = None, original[:1], False
        for epoch in range(settings.epochs):
            for i, index in enumerate(_batches(len(hidden), settings.batch, draws)):
                each, found = self._losses(embedding, hidden[index], original[index])
                loss = each.mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
                means.append(sum(losses) / (i + 1 + epoch * batches))
                progress(len(losses), settings.epochs * batches)
                if i % 2 == 0 and means[-1] < settings.tested:
                    tests, passed = self._tested(embedding.detach(), draws)
                if passed or (i % 2 == 0 and means[-1] < settings.stopped):
                    break
            if passed:
                break
        return AmdetResult(
            passed,
            tuple(losses),
            tuple(means),
            tests,
            embedding.detach().cpu(),
            found[0].detach().cpu(),
            self.passes,
            time.monotonic() - started,
            settings.seed,
        )

    def _tested(self, embedding: Tensor, draws: torch.Generator) -> tuple[AmdetTests, bool]:
        """The tests, one after the other until one fails, and whether all passed."""
        settings, (hidden, _) = self._settings, self._test
        with torch.no_grad():
            found = torch.cat(
                [self._features(self._tower, self._spliced(part, embedding)) for part in hidden.split(_BATCH)]
            )
        _loader_seed(draws)
        assimilated = float((assimilation(found, published=True) > settings.assimilated).double().mean())
        if assimilated <= settings.shares[0]:
            return AmdetTests(assimilated), False
        same = (cosine_similarity(found[1:], found[:1], dim=-1).mean(-1) > settings.same).sum()
        with torch.no_grad():
            parts = hidden.split(_BATCH)
            anchored = torch.cat([self._features(self._anchor, self._spliced(part, embedding)) for part in parts])
        different = cosine_similarity(found, anchored, dim=-1).mean(-1) < settings.different
        for _ in range(2):  # each of the two tests iterates over the prompts
            _loader_seed(draws)
        shares = assimilated, float(same) / len(hidden), float(different.double().mean())
        if shares[1] <= settings.shares[1] or shares[2] <= settings.shares[2]:
            return AmdetTests(*shares), False
        curvature = self._curvature(embedding, draws)
        return AmdetTests(*shares, curvature), curvature > settings.shares[3]

    def _curvature(self, embedding: Tensor, draws: torch.Generator) -> float:
        """The share of positive curvature of the loss of the first test prompt around the pseudo-tokens."""
        hidden, original = (part[:1] for part in self._test)
        place = embedding.clone().requires_grad_()
        _loader_seed(draws)
        (gradient,) = torch.autograd.grad(self._losses(place, hidden, original)[0].mean(), place)
        first = -gradient / gradient.norm()
        second = torch.randn(embedding.shape, generator=draws).to(embedding)
        second = second - (first * second).sum(1, keepdim=True) / first.square().sum(1, keepdim=True) * first
        first, second = normalize(first, dim=1), normalize(second, dim=1)
        _loader_seed(draws)

        def loss(points: Tensor) -> Tensor:
            count = len(points)
            return self._losses(points, hidden.expand(count, -1, -1), original.expand(count, -1, -1))[0]

        surface = landscape(
            loss, embedding, first, second, extent=self._settings.extent, grid=self._settings.grid, batch=_BATCH
        )
        return positive_curvature(surface)


def _loader_seed(draws: torch.Generator) -> int:
    """Draw what torch's DataLoader draws from the global generator whenever it is iterated over."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=draws))


def _batches(count: int, batch: int, draws: torch.Generator) -> Iterator[Tensor]:
    """One epoch's batches of indices, drawn as a shuffling DataLoader draws them."""
    _loader_seed(draws)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_loader_seed(draws)))
    yield from order.split(batch)
