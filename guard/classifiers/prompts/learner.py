"""What a prompt learner has learned: a few named tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self

import torch
from torch import Tensor

from guard.errors import ModelError
from guard.triggers.forms import TensorForm

Kind = Literal["coop", "cocoop", "visual"]
"""`coop`: context vectors in place of words. `cocoop`: the same, and a meta-net that shifts them for each image.
`visual`: a frame that is added to each image."""
CONTEXT, FRAME = "ctx", "frame"
META_NET = ("meta_net.linear1.weight", "meta_net.linear1.bias", "meta_net.linear2.weight", "meta_net.linear2.bias")
"""Names of the meta-net's tensors, as in the public code of CoCoOp."""
FORMS: Mapping[Kind, Mapping[str, TensorForm]] = MappingProxyType(
    {
        "coop": {CONTEXT: TensorForm("context width")},
        "cocoop": {
            CONTEXT: TensorForm("context width"),
            META_NET[0]: TensorForm("hidden embedding"),
            META_NET[1]: TensorForm("hidden"),
            META_NET[2]: TensorForm("width hidden"),
            META_NET[3]: TensorForm("width"),
        },
        "visual": {FRAME: TensorForm("3 size size", -1, 1)},
    }
)
"""Kind → tensor → form. Contexts of each class's own (CoOp's CSC) have one dimension more."""
_OWN_CONTEXTS = TensorForm("classes context width")


@dataclass(frozen=True, eq=False)
class PromptLearner:
    """A prompt learner by its tensors.

    Attributes:
        tensors: float32, by name: `ctx` (shape [n, width], or [classes, n, width] with contexts of each class's own),
            the four of the meta-net, or `frame` (shape [3, H, W], in units of pixels in [0, 1]).

    Raises:
        ModelError: The names are those of no kind of learner, or a tensor is not of its form.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        try:
            for name, form in FORMS[self.kind].items():
                tensor = self.tensors[name]
                own = name == CONTEXT and self.kind == "coop" and tensor.ndim == 3
                (_OWN_CONTEXTS if own else form).check(name, tensor.detach(), sizes)
        except ValueError as error:
            raise ModelError(f"the prompt learner cannot be used: {error}") from error

    @property
    def kind(self) -> Kind:
        """The kind, which follows from the names of the tensors."""
        names = set(self.tensors)
        kind = next((kind for kind, forms in FORMS.items() if names == set(forms)), None)
        if kind is None:
            raise ModelError(
                f"no prompt learner has the tensors {', '.join(sorted(names))[:200] or '(none)'}; guard knows "
                f"{CONTEXT} (CoOp), {CONTEXT} with meta_net.linear1 and meta_net.linear2 (CoCoOp), and {FRAME} (visual)"
            )
        return kind

    @property
    def length(self) -> int:
        """Number of context vectors; 0 for a visual prompt."""
        return self.tensors[CONTEXT].shape[-2] if CONTEXT in self.tensors else 0

    @property
    def depth(self) -> int:
        """Length of the embeddings that the meta-net takes; 0 without one."""
        return self.tensors[META_NET[0]].shape[1] if META_NET[0] in self.tensors else 0

    @property
    def hidden(self) -> int | None:
        """Width of the hidden layer of the meta-net; None without one."""
        return self.tensors[META_NET[0]].shape[0] if META_NET[0] in self.tensors else None

    def to(self, device: torch.device) -> Self:
        """The same learner on a device."""
        return type(self)({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def token(self, embeddings: Tensor) -> Tensor:
        """What the meta-net adds to each context vector.

        Args:
            embeddings: Image embeddings of length 1, shape [N, D].

        Returns:
            Shape [N, width].
        """
        first, first_bias, second, second_bias = (self.tensors[name] for name in META_NET)
        hidden = torch.nn.functional.linear(embeddings, first, first_bias).relu()
        return torch.nn.functional.linear(hidden, second, second_bias)
