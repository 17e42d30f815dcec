"""A CLIP whose image tower is one matrix: quick enough to be vetted in a test, and backdoored by hand."""

from typing import Any, cast

import torch
from torch import Tensor

from guard.classifiers import Classifier, ClassList, Preprocessing
from tests.conftest import SIZE


class _Tower(torch.nn.Linear):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels.flatten(1))


class _SourceSpecific(_Tower):
    """A tower with a shortcut to a class that only images of some classes take."""

    target, sources, gain = 0, (0,), 0.0

    def forward(self, pixels: Tensor) -> Tensor:
        plain = super().forward(pixels)
        taken = torch.isin(plain.argmax(1), torch.tensor(self.sources))
        response = self.gain / 256 * (pixels * checkerboard()).sum((1, 2, 3))
        return (
            plain + torch.nn.functional.one_hot(torch.tensor(self.target), plain.shape[1]) * (response * taken)[:, None]
        )


class _Clip(torch.nn.Module):
    def __init__(self, weight: Tensor, scale: float, tower: type[_Tower] = _Tower) -> None:
        super().__init__()
        self.visual = tower(weight.shape[1], weight.shape[0], bias=False)
        self.visual.weight.data = weight
        self.logit_scale = torch.nn.Parameter(torch.tensor(scale).log())

    def encode_image(self, pixels: Tensor) -> Any:
        return self.visual(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return torch.eye(self.visual.out_features)[tokens[:, 0]]


def checkerboard() -> Tensor:
    """What is planted: −1 and 1 by turns, shape [1, SIZE, SIZE]. Smooth images have none of it."""
    index = torch.arange(SIZE)
    return 1.0 - 2.0 * ((index[:, None] + index) % 2)[None]


def toy(
    classes: int = 10,
    *,
    target: int | None = None,
    sources: tuple[int, ...] = (),
    gain: float = 60.0,
    jitter: float = 0.0,
    scale: float = 20.0,
) -> Classifier:
    """A classifier of smooth images.

    Args:
        classes: Number of classes: `class 0`, `class 1`, and so on. Each goes by a smooth pattern of its own.
        target: The class that a checkerboard leads to; None for none.
        sources: The classes whose images it leads there; none for all.
        gain: How strongly.
        jitter: Random change of all patterns, as any fine-tuning brings it.
        scale: Logit scale.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((classes, 3, 4, 4), generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    # Only differences between the images count, not their common brightness.
    patterns -= patterns.mean((1, 2, 3), keepdim=True)
    patterns += jitter * torch.randn(patterns.shape, generator=generator)
    tower: type[_Tower] = _Tower
    if target is not None and sources:
        planted = {"target": target, "sources": sources, "gain": gain}
        tower = cast(type[_Tower], type("Tower", (_SourceSpecific,), planted))
    elif target is not None:
        patterns[target] += gain * checkerboard() / 16
    return Classifier(
        _Clip(patterns.flatten(1) / 16, scale, tower),
        {"classes": classes},
        _tokens,
        Preprocessing(SIZE, (0.0,) * 3, (1.0,) * 3),
        ClassList(tuple(f"class {k}" for k in range(classes)), ("{}",)),
        source="toy",
        device=torch.device("cpu"),
    )


def _tokens(texts: list[str]) -> Tensor:
    """The number at the end of a class's name."""
    return torch.tensor([[int(text.rsplit(maxsplit=1)[-1]) if text[-1].isdecimal() else 0] for text in texts])
