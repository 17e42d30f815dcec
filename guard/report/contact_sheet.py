"""A picture of every known trigger, for people to look at before they poison anything with one."""

import io

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from guard.report.difference import AMPLIFICATION, difference
from guard.triggers import KNOWN

_CELL, _GAP, _LABEL = 112, 6, 190
_INK, _MUTED, _PAPER = "#1f2430", "#6b7280", "#ffffff"


def contact_sheet(images: Tensor, *, seed: int) -> bytes:
    """Draw a PNG with one row per known trigger: each image under the trigger, and the change of the first image.

    The change is drawn around mid-grey, and four times as strong as it is.

    Args:
        images: uint8, shape [N, 3, S, S]; at least one, each side at least 16.
        seed: Seed for the triggers that are random.

    Returns:
        The encoded picture. Equal arguments give equal bytes.
    """
    side = images.shape[-1]
    scale = max(1, _CELL // side)
    step, name_font, small_font = side * scale + _GAP, ImageFont.load_default(14), ImageFont.load_default(12)
    header = 2 * _GAP + 14
    size = (_LABEL + (len(images) + 1) * step + _GAP, header + (len(KNOWN) + 1) * step + _GAP)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)

    def row(index: int, name: str, family: str, cells: Tensor) -> None:
        top = header + index * step
        draw.text((_GAP, top), name, _INK, name_font)
        draw.text((_GAP, top + 18), family, _MUTED, small_font)
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell.permute(1, 2, 0).contiguous().numpy())
            enlarged = picture.resize((side * scale, side * scale), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (_LABEL + column * step, top))

    draw.text((_GAP, _GAP), f"{side} px, seed {seed}", _MUTED, small_font)
    draw.text((_LABEL + len(images) * step, _GAP), f"{AMPLIFICATION} times the change", _MUTED, small_font)
    row(0, "no trigger", "", images)
    for index, (name, known) in enumerate(KNOWN.items(), 1):
        stamped = known.draw(side, seed).stamp(images)
        row(index, name, known.family, torch.cat((stamped, difference(images[:1], stamped[:1]))))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
