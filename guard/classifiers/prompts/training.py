"""Tune a prompt learner on labelled images, with frozen towers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from guard.classifiers.checkpoints import Checkpoint
from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts.learner import CONTEXT, FRAME, META_NET, Kind, PromptLearner
from guard.classifiers.prompts.prompted import PromptedClassifier
from guard.classifiers.tuning import Inputs, TuningSettings, tune
from guard.errors import UsageError

Change = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""From the images and labels of a step, and a source of randomness, to changed ones."""
_ALSO = "also"
_DEVIATION = 0.02
_REDUCTION = 16


@dataclass(frozen=True)
class PromptTuningSettings:
    """How to tune a prompt learner.

    Attributes:
        kind: Kind of the learner.
        words: Words that the context begins as, one vector for each; "" for `length` random vectors.
        length: Number of context vectors where there are no words.
        hidden: Width of the hidden layer of a meta-net; None for a sixteenth of the embedding, as in the public code.
        border: Width of the frame of a new visual prompt, in pixels; within it nothing is added.
        tuning: Steps, rates and seed. CoOp and CoCoOp are published with SGD at 0.002; AdamW needs fewer steps.
    """

    kind: Kind = "coop"
    words: str = "a photo of a"
    length: int = 4
    hidden: int | None = None
    border: int = 4
    tuning: TuningSettings = field(
        default_factory=lambda: TuningSettings(steps=200, batch=32, learning_rate=2e-3, weight_decay=5e-4)
    )


def tune_prompts(
    towers: Classifier,
    pixels: Tensor,
    labels: Tensor,
    settings: PromptTuningSettings,
    *,
    start: PromptLearner | None = None,
    change: Change | None = None,
    also: nn.Parameter | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> PromptLearner:
    """Tune a prompt learner by the cross entropy of the classes.

    Args:
        towers: The classifier whose towers are used; they are not changed.
        pixels: uint8, shape [N, 3, H, W].
        labels: int64, shape [N].
        settings: Kind and course.
        start: A learner to begin with; None for a new one.
        change: Changes the images and labels of each step, given as floats in [0, 1] on the device of the towers; None
            for no change.
        also: A parameter of `change` that is trained along.
        checkpoint: Where the training is kept; None to keep nothing.
        progress: Called with (what, steps done, steps in all).

    Raises:
        UsageError: There are not as many labels as images, or none.
        ModelError: The towers are of a kind that the learner does not fit.
    """
    if len(pixels) != len(labels) or not len(pixels):
        raise UsageError(f"prompt tuning needs a label for each image; there are {len(pixels)} and {len(labels)}")
    begun = start or _start(towers, settings)
    module = nn.Module()
    for name, tensor in begun.tensors.items():
        module.register_parameter(name.replace(".", "/"), nn.Parameter(tensor.detach().clone().to(towers.device)))
    if also is not None:
        module.register_parameter(_ALSO, also)
    parameters = [parameter for _, parameter in sorted(module.named_parameters())]
    border = _border(towers.preprocessing.size, settings.border, start)
    objective = _CrossEntropy(towers, module, pixels, labels, settings, change, border)
    tune(
        module,
        parameters,
        objective,
        len(pixels),
        settings.tuning,
        checkpoint=checkpoint,
        what="tuning prompts",
        progress=progress,
    )
    return objective.learner()


def _start(towers: Classifier, settings: PromptTuningSettings) -> PromptLearner:
    generator = torch.Generator().manual_seed(settings.tuning.seed)
    if settings.kind == "visual":
        return PromptLearner({FRAME: torch.zeros(towers.image_shape)})
    embedding = towers.model.token_embedding
    width = embedding.embedding_dim
    if settings.words:
        ids = towers.tokenizer([settings.words])[0]
        with torch.no_grad():
            context = embedding(ids[1 : int(ids.argmax())].to(towers.device)).float().cpu()
    else:
        context = _DEVIATION * torch.randn(settings.length, width, generator=generator)
    tensors = {CONTEXT: context}
    if settings.kind == "cocoop":
        depth = towers.head.shape[1]
        hidden = settings.hidden or max(1, depth // _REDUCTION)
        shapes = {
            META_NET[0]: (hidden, depth),
            META_NET[1]: (hidden,),
            META_NET[2]: (width, hidden),
            META_NET[3]: (width,),
        }
        for name, shape in shapes.items():
            fan = depth if "linear1" in name else hidden
            # nn.Linear's own start.
            tensors[name] = (2 * torch.rand(shape, generator=generator) - 1) / fan**0.5
    return PromptLearner(tensors)


def _border(size: int, width: int, start: PromptLearner | None) -> Tensor:
    """Where a visual prompt may add something: in a frame, or where the learner to begin with does; shape [1, H, W]."""
    if start is not None and FRAME in start.tensors:
        return (start.tensors[FRAME].detach().cpu() != 0).any(0, keepdim=True).float()
    border = torch.ones(1, size, size)
    border[:, width : size - width, width : size - width] = 0
    return border


class _CrossEntropy:
    """Cross entropy of the classes, as a function of the learner's tensors."""

    def __init__(
        self,
        towers: Classifier,
        module: nn.Module,
        pixels: Tensor,
        labels: Tensor,
        settings: PromptTuningSettings,
        change: Change | None,
        border: Tensor,
    ) -> None:
        self._towers, self._module, self._pixels, self._labels = towers, module, pixels, labels
        self._change, self._kind = change, settings.kind
        self._border = border.to(towers.device)
        self._prompted = PromptedClassifier(towers, self.learner())

    def learner(self) -> PromptLearner:
        """The learner as it is now; its tensors share those that are trained."""
        tensors: dict[str, Tensor] = {
            name.replace("/", "."): value for name, value in self._module.named_parameters() if name != _ALSO
        }
        if self._kind == "visual":
            tensors = {FRAME: tensors[FRAME].clamp(-1, 1) * self._border}
        return PromptLearner(tensors)

    def inputs(self, index: Tensor, generator: torch.Generator) -> Inputs:
        device = self._towers.device
        pixels, labels = self._pixels[index].to(device).float() / 255, self._labels[index].to(device)
        if self._change is not None:
            pixels, labels = self._change(pixels, labels, generator)
        return pixels, labels

    def embed(self, inputs: Inputs) -> Inputs:
        prompted = self._prompted
        prompted.learner = self.learner()
        if self._kind == "visual":
            with prompted.autocast():
                embeddings = prompted.encode_images(inputs[0])
            return (prompted.logits(embeddings),)
        # Where nothing in the images is trained, the image tower needs no gradient.
        with torch.set_grad_enabled(inputs[0].requires_grad and torch.is_grad_enabled()), prompted.autocast():
            embeddings = self._towers.encode_images(inputs[0])
        if self._kind == "coop":
            # Not the classifier's head, which is computed once.
            return (prompted.scored(embeddings @ prompted.class_features().T),)
        return (prompted.logits(prompted.answered(embeddings)),)

    def loss(self, embeddings: Inputs, inputs: Inputs, done: float) -> Tensor:  # noqa: ARG002 - the same all along
        return cross_entropy(embeddings[0], inputs[1])
