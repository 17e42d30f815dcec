"""A generator: a small network that computes a perturbation for each image."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import conv2d, leaky_relu, pixel_shuffle

from guard.triggers.base import InvertibleTrigger, Raw
from guard.triggers.forms import GENERATOR_SLOPE

_CHANNELS = 8
_WRITTEN = 12
"""Channels of the last convolution: red, green and blue of 2 × 2 pixels."""
_START_RADIUS = 16 / 255
_RAW_SCALE = 8.0
"""Standard deviation of raw weights at the start. The search takes steps of about 0.4, which suit sigmoids; with this
scale, a step is 5 % of a weight."""


@dataclass(frozen=True, eq=False)
class Generator(InvertibleTrigger):
    """x ↦ clip(x + radius · tanh(g(x)), 0, 1), with a convolutional network g.

    This family is for attacks that make a different trigger for each image (input-aware, Nguyen and Tran, NeurIPS 2020;
    LIRA, Doan et al., ICCV 2021), and for triggers that no other family can express. g is far smaller than theirs:
    three 3 × 3 convolutions with leaky ReLUs between them, at half the resolution, which takes a quarter of the time;
    the last one writes 2 × 2 pixels at once. Besides the image it gets two channels with the position along x and y in
    [−1, 1], so that it can act at one place. Its receptive field, 11 px, does not grow with the image.

    Attributes:
        first: Weights from image and position to C channels: shape [C, 5, 3, 3] or [K, C, 5, 3, 3].
        first_bias: Shape [C] or [K, C].
        second: Shape [C, C, 3, 3] or [K, C, C, 3, 3].
        second_bias: Shape [C] or [K, C].
        third: Weights to red, green and blue of 2 × 2 pixels: shape [12, C, 3, 3] or [K, 12, C, 3, 3].
        third_bias: Shape [12] or [K, 12].
        radius: Largest change of a value, in [0, 1]: shape [] or [K].
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    third: Tensor
    third_bias: Tensor
    radius: Tensor

    family: ClassVar[str] = "generator"
    norm_unit: ClassVar[str] = "/255 ℓ∞"
    strength: ClassVar[str] = "radius"

    def apply(self, images: Tensor) -> Tensor:
        """Run the network (or K networks side by side, as groups of channels), add its output and clip."""
        count, _, height, width = images.shape
        lead = self.radius.shape
        groups = lead.numel()
        y, x = (torch.linspace(-1, 1, side, device=images.device, dtype=images.dtype) for side in (height, width))
        place = torch.stack((x.expand(height, width), y[:, None].expand(height, width)))
        seen = torch.cat((2 * images - 1, place.expand(count, -1, -1, -1)), 1)
        weights, biases = (
            [tensor.flatten(0, len(lead)) for tensor in tensors]
            for tensors in (
                (self.first, self.second, self.third),
                (self.first_bias, self.second_bias, self.third_bias),
            )
        )
        hidden = leaky_relu(conv2d(seen, weights[0], biases[0], stride=2, padding=1), GENERATOR_SLOPE)
        hidden = leaky_relu(conv2d(hidden, weights[1], biases[1], padding=1, groups=groups), GENERATOR_SLOPE)
        written = conv2d(hidden, weights[2], biases[2], padding=1, groups=groups)
        small = written.reshape(count, *lead, *self.third_bias.shape[-1:], *written.shape[-2:])
        delta = pixel_shuffle(small, 2)[..., :height, :width].tanh().movedim(0, len(lead))
        return (images + self.radius[..., None, None, None, None] * delta).clamp(0, 1)

    def norm(self) -> Tensor:
        """Return the radius in steps of 1/255, which bounds the ℓ∞ norm of the change for every image."""
        return 255 * self.radius

    @classmethod
    def start(cls, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Raw:  # noqa: ARG003 - any size
        """Start with random networks and a radius of 16/255."""
        device, channels = generator.device, _CHANNELS
        sizes = {
            "first": (channels, 5, 3, 3),
            "second": (channels, channels, 3, 3),
            "third": (_WRITTEN, channels, 3, 3),
        }
        raw = {}
        for name, size in sizes.items():
            raw[name] = _RAW_SCALE * torch.randn((count, *size), device=device, generator=generator)
            raw[f"{name}_bias"] = torch.zeros((count, size[0]), device=device)
        raw["radius"] = torch.full((count,), _START_RADIUS, device=device).logit()
        return raw

    @classmethod
    def random(cls, channels: int, radius: float, generator: torch.Generator) -> Self:
        """Return a random network for an attacker, with weights as He et al. (ICCV 2015) draw them.

        Args:
            channels: C.
            radius: Largest change of a value, in [0, 1].
            generator: The only source of randomness.
        """
        tensors = {}
        for name, size in (
            ("first", (channels, 5, 3, 3)),
            ("second", (channels, channels, 3, 3)),
            ("third", (_WRITTEN, channels, 3, 3)),
        ):
            weights = torch.randn(size, generator=generator, device=generator.device)
            tensors[name] = weights * math.sqrt(2 / weights[0].numel())
            tensors[f"{name}_bias"] = torch.zeros(size[0], device=generator.device)
        return cls(**tensors, radius=torch.tensor(radius, device=generator.device))

    @classmethod
    def constrain(cls, raw: Raw) -> Self:
        """Return the trigger that the parameters stand for.

        Weights are scaled by √(2 / inputs) (He et al., ICCV 2015), so that tanh starts neither saturated nor linear.
        """
        weights = {
            name: raw[name] * (math.sqrt(2 / raw[name][0, 0].numel()) / _RAW_SCALE)
            for name in ("first", "second", "third")
        }
        biases = {name: raw[name] / _RAW_SCALE for name in ("first_bias", "second_bias", "third_bias")}
        return cls(**weights, **biases, radius=raw["radius"].sigmoid())
