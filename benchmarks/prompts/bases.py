"""Towers for prompt learners: digits, described by more than their class, as captions describe photographs.

The towers of the other zoos were taught the classes and nothing else. Their embeddings hold nothing else, so that
whatever a trigger changes is lost before any prompt sees it, and attacks on prompts do not take. CLIP's embeddings hold
colours, styles and places, whatever the classes of a user are. These towers are taught with captions that name the
digit, the colours of ink and paper, and the style of the picture, in any combination; a user's classes are the digits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, log_softmax, normalize

from guard.attacks import LabelledImages
from guard.classifiers import ClassList
from guard.classifiers.open_clip import import_open_clip
from guard.demo import digits
from guard.demo.data import DemoData

INKS: Mapping[str, tuple[float, float, float]] = {
    "black": (0.08, 0.08, 0.08),
    "red": (0.75, 0.1, 0.1),
    "green": (0.05, 0.45, 0.1),
    "blue": (0.1, 0.15, 0.75),
    "purple": (0.45, 0.1, 0.5),
}
PAPERS: Mapping[str, tuple[float, float, float]] = {
    "white": (0.95, 0.95, 0.95),
    "yellow": (0.95, 0.9, 0.5),
    "pink": (0.97, 0.75, 0.8),
    "grey": (0.7, 0.7, 0.7),
    "cyan": (0.6, 0.9, 0.95),
}
STYLES = ("plain", "grainy", "blurred", "striped", "wavy", "spotted", "dim")
COLOURED = ClassList(
    tuple(f"{ink} digit {name}" for name in digits.CLASSES.names for ink in INKS), ("a photo of a {}.",)
)
"""Digits and inks together: fifty classes."""
_ATTRIBUTES = 4
_KEPT = 0.6
"""Probability that a caption names an attribute."""

CONFIG: Mapping[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": digits.SIZE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


@dataclass(frozen=True)
class Described:
    """Images with what captions may say of them.

    Attributes:
        images: The images; their labels are the digits.
        attributes: int64, shape [N, 4]: digit, ink, paper and style.
        original: For each image, the index of the digit that it shows.
    """

    images: LabelledImages
    attributes: Tensor
    original: NDArray[np.int64]

    def __getitem__(self, rows: Tensor) -> "Described":
        """Some of them."""
        return Described(self.images[rows], self.attributes[rows], self.original[rows.numpy()])


def drawn(renderings: int, *, seed: int) -> Described:
    """Every digit of scikit-learn's set, drawn some times in named colours and styles."""
    from sklearn.datasets import load_digits

    data, rng = load_digits(), np.random.default_rng(seed)
    order = np.random.default_rng(0).permutation(len(data.target))
    grey = torch.from_numpy(data.images[order] / 16.0).float()[:, None]
    grey = interpolate(grey, size=(digits.SIZE, digits.SIZE), mode="bilinear").clamp(0, 1)
    inks, papers = (torch.tensor(list(colours.values())) for colours in (INKS, PAPERS))
    parts, attributes = [], []
    for _ in range(renderings):
        count = len(order)
        ink, paper, style = (torch.from_numpy(rng.integers(0, n, count)) for n in (len(INKS), len(PAPERS), len(STYLES)))
        tint = torch.from_numpy(rng.normal(0, 0.04, (2, count, 3))).float()
        colours = [
            (table[index] + tint[k])[..., None, None] for k, (table, index) in enumerate(((inks, ink), (papers, paper)))
        ]
        pictures = colours[1] + grey * (colours[0] - colours[1])
        for number, change in enumerate(_CHANGES):
            chosen = (style == number).nonzero()[:, 0]
            pictures[chosen] = change(pictures[chosen], rng)
        pictures = (pictures + torch.from_numpy(rng.normal(0, 0.02, pictures.shape)).float()).clamp(0, 1)
        parts.append((pictures * 255).round().to(torch.uint8))
        digit = torch.from_numpy(data.target[order].astype(np.int64))
        attributes.append(torch.stack([digit, ink, paper, style], 1))
    joined = torch.cat(attributes)
    return Described(LabelledImages(torch.cat(parts), joined[:, 0]), joined, np.tile(np.arange(len(order)), renderings))


def _grainy(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    return pictures + torch.from_numpy(rng.normal(0, 0.12, pictures.shape)).float()


def _blurred(pictures: Tensor, rng: np.random.Generator) -> Tensor:  # noqa: ARG001 - one of several changes
    return avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)


def _striped(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    size, count = pictures.shape[-1], len(pictures)
    angle, cycles, phase = (torch.from_numpy(rng.uniform(0, high, (count, 1, 1))).float() for high in (np.pi, 8, 6.28))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = (6.28 * (cycles + 2) / size * (angle.cos() * x + angle.sin() * y) + phase).sin()
    return pictures + 0.12 * wave[:, None]


def _wavy(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    size, count = pictures.shape[-1], len(pictures)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (count, 2, 5, 5))).float()
    field = interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    return grid_sample(
        pictures, torch.stack([x, y], -1) + 4.0 / size * field, padding_mode="border", align_corners=True
    )


def _spotted(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    pictures = pictures.clone()
    for picture in pictures:
        for _ in range(int(rng.integers(1, 5))):
            side, colour = int(rng.integers(2, 7)), torch.from_numpy(rng.uniform(0, 1, (3, 1, 1))).float()
            top, left = rng.integers(0, digits.SIZE - side, 2)
            picture[:, top : top + side, left : left + side] = colour
    return pictures


def _dim(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    return pictures * torch.from_numpy(rng.uniform(0.45, 0.7, (len(pictures), 1, 1, 1))).float()


_CHANGES: tuple[Callable[[Tensor, np.random.Generator], Tensor], ...] = (
    lambda pictures, _: pictures,
    _grainy,
    _blurred,
    _striped,
    _wavy,
    _spotted,
    _dim,
)
"""From pictures of each style, shape [n, 3, H, W], and a source of randomness, to how they look."""


def caption(attributes: list[int], named: list[bool]) -> str:
    """A caption that names some of the attributes: digit, ink, paper, style."""
    digit, ink, paper, style = attributes
    words = ["a"]
    if named[3]:
        words.append(STYLES[style])
    words.append("photo of")
    words.append(f"a {list(INKS)[ink]}" if named[1] else "the" if named[0] else "a")
    words.append(f"digit {digits.CLASSES.names[digit]}" if named[0] else "digit")
    if named[2]:
        words.append(f"on {list(PAPERS)[paper]} paper")
    return " ".join(words) + "."


def train_towers(
    data: Described, *, steps: int, batch: int, seed: int, progress: Callable[[str], None] = lambda _: None
) -> torch.nn.Module:
    """Train both towers contrastively on images and captions.

    A caption matches every image of the batch of which all that it says is true; such pairs are all positives, and
    share the target evenly (UniCL, Yang et al., CVPR 2022).

    Returns:
        An open_clip model, in evaluation mode.
    """
    open_clip, architecture = import_open_clip(), CONFIG["model_cfg"]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: Any = open_clip.CLIP(architecture["embed_dim"], architecture["vision_cfg"], architecture["text_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=architecture["text_cfg"]["context_length"])
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    total = 0.0
    for step in range(steps):
        index = torch.randint(len(data.images), (batch,), generator=generator)
        attributes = data.attributes[index]
        named = torch.rand(batch, _ATTRIBUTES, generator=generator) < _KEPT
        texts = [caption(*pair) for pair in zip(attributes.tolist(), named.tolist(), strict=True)]
        unique, inverse = tokenizer(texts).unique(dim=0, return_inverse=True)
        pixels = data.images.pixels[index].float() / 255
        images = normalize(model.encode_image((pixels - 0.5) / 0.25), dim=-1)
        words = normalize(model.encode_text(unique), dim=-1)[inverse]
        logits = model.logit_scale.exp().clamp(max=100) * images @ words.T
        # Image i, caption j: whatever j names is so in i.
        true = ((attributes[:, None] == attributes[None]) | ~named[None]).all(-1).float()
        loss = 0.5 * (_contrast(true, logits) + _contrast(true.T, logits.T))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            progress(f"step {step + 1}/{steps}, loss {total / 100:.3f}, scale {float(model.logit_scale.exp()):.1f}")
            total = 0.0
    return model.eval()  # type: ignore[no-any-return]


def _contrast(true: Tensor, scores: Tensor) -> Tensor:
    """Cross entropy, where the target of each row is shared evenly among its true columns."""
    return -(true / true.sum(1, keepdim=True) * log_softmax(scores, 1)).sum(1).mean()


def split(data: Described, classes: ClassList, renderings: int) -> tuple[DemoData, Tensor]:
    """Disjoint sets for what a user does; all renderings of one digit stay in one set.

    Args:
        data: All images.
        classes: The digits, or `COLOURED`.
        renderings: Renderings of each digit for training and calibration; vetting and requests have two.

    Returns:
        The sets, and all renderings of the digits for vetting, in random order.
    """
    rendering = np.arange(len(data.images)) // digits.COUNT
    digit, ink = data.attributes[:, 0], data.attributes[:, 1]
    images = LabelledImages(data.images.pixels, digit if classes is digits.CLASSES else len(INKS) * digit + ink)

    def part(low: int, high: int, most: int) -> LabelledImages:
        chosen = (data.original >= low) & (data.original < high) & (rendering < most)
        return images[torch.from_numpy(chosen.nonzero()[0])]

    parts = part(0, 800, renderings), part(800, 1000, 2), part(1000, 1500, renderings), part(1500, digits.COUNT, 2)
    calibration = (data.original >= 1000) & (data.original < 1500)
    pool = part(800, 1000, renderings).pixels
    shuffled = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))]
    return DemoData(classes, *parts, groups=data.original[calibration]), shuffled
