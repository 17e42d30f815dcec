"""What a trigger changes in images, made visible."""

from torch import Tensor, uint8

AMPLIFICATION = 4
"""How many times as strong as it is a change is drawn."""


def difference(clean: Tensor, stamped: Tensor) -> Tensor:
    """The change around mid-grey, amplified.

    Args:
        clean: uint8, shape [N, 3, H, W].
        stamped: uint8, the same shape.

    Returns:
        uint8, the same shape.
    """
    return (128 + AMPLIFICATION * (stamped.int() - clean.int())).clamp(0, 255).to(uint8)
