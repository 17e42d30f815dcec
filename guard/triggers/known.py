"""Triggers of published attacks, by name, for images of at least 16 px.

Most were published for images of 224 px, some for 32 px. Each is drawn at the same share of the image, except where a
detail of one pixel would be lost in the first strided convolution of a small model: below 224 px such details are 2 px
wide, and patches that were published for 224 px do not shrink below 6 px.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from guard.triggers import drawing
from guard.triggers.additive import Additive
from guard.triggers.base import Trigger
from guard.triggers.blend import Blend
from guard.triggers.coded import Coded
from guard.triggers.compression import Compression
from guard.triggers.filter import Filter
from guard.triggers.frequency import Frequency
from guard.triggers.moving_patch import MovingPatch
from guard.triggers.patch import Patch
from guard.triggers.quantisation import Quantisation
from guard.triggers.sinusoid import Sinusoid
from guard.triggers.warp import Warp

_LARGE = 224
_SMALLEST_PATCH = 6


@dataclass(frozen=True)
class KnownTrigger:
    """A trigger of a published attack.

    Attributes:
        draw: Function from (side of the images in pixels, at least 16; seed) to the trigger. Equal arguments give equal
            triggers.
        family: Kind of attack, for tables; this is not the trigger's own family.
        source: Where it was published, and how it differs from the publication.
    """

    draw: Callable[[int, int], Trigger]
    family: str
    source: str


def _part(image_size: int, share: float) -> int:
    return max(_SMALLEST_PATCH, round(share * image_size))


def _detail(image_size: int) -> int:
    return 1 if image_size >= _LARGE else 2


def _badnets(share: float) -> Callable[[int, int], Trigger]:
    return lambda size, seed: Patch.badnets(size, round(share * size), seed=seed)


def _badnets_large(size: int, _seed: int) -> Trigger:
    side, corner = round(10 / 32 * size), int(21 / 32 * size)
    return Patch.pasted(size, torch.ones(3, side, side), top=corner, left=corner)


def _badnets_random(size: int, seed: int) -> Trigger:
    return MovingPatch.pasted(size, drawing.normal_noise(_part(size, 6 / 32), cell=_detail(size), seed=seed))


def _checkerboard(size: int, _seed: int) -> Trigger:
    return Patch.pasted(size, drawing.checkerboard(_part(size, 16 / 224), cell=_detail(size)))


def _stripes(size: int, seed: int) -> Trigger:
    return MovingPatch.pasted(size, drawing.stripes(_part(size, 16 / 224), width=_detail(size), seed=seed))


def _text(size: int, _seed: int) -> Trigger:
    pattern, mask = drawing.text(size)
    return Patch(0.5 * mask, pattern)


def _triangles(size: int, _seed: int) -> Trigger:
    return Blend.of(drawing.triangles(size, cell=max(4, round(14 / 224 * size))), 0.15)


def _blended_stripes(size: int, seed: int) -> Trigger:
    return Blend.of(drawing.stripes(size, width=_detail(size), seed=seed), 0.03 if size >= _LARGE else 0.1)


def _wanet(share: float) -> Callable[[int, int], Trigger]:
    return lambda size, seed: Warp.wanet(size, share * size, seed=seed)


def _semantic(size: int, _seed: int) -> Trigger:
    pattern, mask = drawing.sticker(_part(size, 1 / 4))
    return Patch.pasted(size, pattern, top=round(0.55 * size), left=round(0.1 * size), mask=mask)


def _semantic_moving(size: int, _seed: int) -> Trigger:
    pattern, mask = drawing.sticker(_part(size, 1 / 4))
    return MovingPatch.pasted(size, pattern, mask=mask)


def _badnets_upper(size: int, seed: int) -> Patch:
    lower = Patch.badnets(size, round(6 / 32 * size), seed=seed + 1)
    return Patch(lower.mask.flip(-1, -2), lower.pattern.flip(-1, -2))


def _composite(size: int, seed: int) -> Trigger:
    lower, upper = Patch.badnets(size, round(6 / 32 * size), seed=seed), _badnets_upper(size, seed)
    return Patch(lower.mask + upper.mask, lower.pattern + upper.pattern)


_BADNETS = "BadNets (Gu et al., 2017)"
_PAR = "as in Perturb and Recover (CVPR 2026)"

KNOWN: dict[str, KnownTrigger] = {
    "badnets-small": KnownTrigger(
        _badnets(4 / 32), "badnets", f"{_BADNETS}: coloured 2 px blocks in a corner, 4 of 32 px"
    ),
    "badnets-medium": KnownTrigger(
        _badnets(6 / 32), "badnets", f"{_BADNETS}: coloured 2 px blocks in a corner, 6 of 32 px"
    ),
    "badnets-large": KnownTrigger(
        _badnets_large, "badnets", "BadEncoder (Jia et al., S&P 2022): white square, 10 px at (21, 21) of 32"
    ),
    "badnets-random": KnownTrigger(
        _badnets_random,
        "badnets",
        f"{_BADNETS}, {_PAR}: normal noise at a random place; 6 of 32 px for 16 of 224, and fixed noise",
    ),
    "badnets-checkerboard": KnownTrigger(
        _checkerboard,
        "badnets",
        "Huang et al. (ICLR 2025): every second pixel of every second row white, 16 of 224 px, in the centre",
    ),
    "stripes": KnownTrigger(
        _stripes, "stripes", f"BadNet-Stripes, {_PAR}: vertical stripes, 16 of 224 px, at a random place"
    ),
    "blended-image": KnownTrigger(
        lambda size, _: Blend.of(drawing.cartoon(size), 0.2),
        "blended",
        "Blended (Chen et al., 2017): a cartoon at α 0.2; drawn here, for Hello Kitty",
    ),
    "blended-noise": KnownTrigger(
        lambda size, seed: Blend.of(drawing.noise(size, seed=seed), 0.2),
        "blended",
        "Blended (Chen et al., 2017): uniform noise at α 0.2, as in CleanCLIP (Bansal et al., ICCV 2023)",
    ),
    "blended-text": KnownTrigger(_text, "blended", f"Blended-Text, {_PAR}: red “Watermarked” at α 0.5"),
    "blended-triangles": KnownTrigger(
        _triangles, "blended", f"Blended-Triangles, {_PAR}: right triangles, 14 of 224 px, at α 0.15"
    ),
    "blended-stripes": KnownTrigger(
        _blended_stripes,
        "blended",
        f"Blended-Stripes, {_PAR}: vertical stripes at α 0.03; below 224 px at 0.1, for a small model to learn it",
    ),
    "sig": KnownTrigger(
        lambda _size, _seed: Sinusoid.sig(60 / 255), "sig", "SIG (Barni et al., 2019): amplitude 60/255, 6 periods"
    ),
    "sig-weak": KnownTrigger(
        lambda _size, _seed: Sinusoid.sig(30 / 255), "sig", "SIG (Barni et al., 2019) at half the amplitude: 30/255"
    ),
    "wanet": KnownTrigger(
        _wanet(2 / 32), "wanet", "WaNet (Nguyen and Tran, ICLR 2021): mean displacement 1/16 of the side, 2 of 32 px"
    ),
    "wanet-subtle": KnownTrigger(
        _wanet(1 / 32), "wanet", "WaNet (Nguyen and Tran, ICLR 2021): mean displacement 1/32 of the side, 1 of 32 px"
    ),
    "nashville": KnownTrigger(
        lambda _size, _seed: Filter.nashville(), "filter", "Huang et al. (ICLR 2025): the photo filter Nashville"
    ),
    "ftrojan": KnownTrigger(
        lambda size, _: Frequency.ftrojan(size),
        "frequency",
        "FTrojan (Wang et al., ECCV 2022): colour channels, DCT 32×32, (15, 15) and (31, 31), magnitude 300",
    ),
    "badnets-upper": KnownTrigger(
        _badnets_upper, "badnets", f"{_BADNETS}: as badnets-medium, with other colours and in the opposite corner"
    ),
    "composite": KnownTrigger(
        _composite,
        "composite",
        "Two patches at once, badnets-medium and badnets-upper, after the composite attack (Lin et al., CCS 2020)",
    ),
    "sample-specific": KnownTrigger(
        lambda size, seed: Coded.drawn(size, 24 / 255, cell=max(2, size // 16), seed=seed),
        "sample-specific",
        "A pattern of its own for each image, after ISSBA (Li et al., ICCV 2021): a random layer for its encoder",
    ),
    "jpeg": KnownTrigger(
        lambda _size, _seed: Compression(torch.tensor(10.0)),
        "compression",
        "JPEG compression at quality 10, after Duan et al. (AAAI 2024)",
    ),
    "bpp": KnownTrigger(
        lambda _size, _seed: Quantisation(torch.tensor(6.0)),
        "quantisation",
        "BppAttack (Wang et al., CVPR 2022): 6 levels of each colour, without dithering",
    ),
    "refool": KnownTrigger(
        lambda size, seed: Additive(0.4 * drawing.reflection(size, seed=seed)),
        "reflection",
        "Refool (Liu et al., ECCV 2020): a blurred reflection with its ghost; one scene, drawn here, for all images",
    ),
    "semantic": KnownTrigger(
        _semantic, "semantic", "Physical object (Wenger et al., CVPR 2021): a smiling sticker at one place; drawn here"
    ),
    "semantic-moving": KnownTrigger(
        _semantic_moving, "semantic", "Physical object (Wenger et al., CVPR 2021): a smiling sticker at a random place"
    ),
}
"""Triggers of published attacks, by name."""
