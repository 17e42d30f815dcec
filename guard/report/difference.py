"""The change that a trigger makes to images, made visible."""

from torch import Tensor, uint8

AMPLIFICATION = 4
"""Factor by which a change is amplified when it is drawn."""


def difference(clean: Tensor, stamped: Tensor) -> Tensor:
    """Return the amplified change around mid-grey.

    Args:
        clean: uint8, shape [N, 3, H, W].
        stamped: uint8, the same shape.

    Returns:
        uint8, the same shape.
    """
    return (128 + AMPLIFICATION * (stamped.int() - clean.int())).clamp(0, 255).to(uint8)
