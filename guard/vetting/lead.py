"""The distance of a candidate class from winning, which every search minimises."""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.classifiers.prompts import PromptedClassifier
from guard.errors import ModelError
from guard.triggers import InvertibleTrigger
from guard.vetting.memory import images_at_once

RIVALS = 4
"""Number of classes that a candidate class is compared with in a search where each class costs a pass of the text tower
(CoCoOp): for each image those that are strongest without a trigger. Checks on held-out images look at all classes."""


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the strongest other logit minus the target's: negative where the target wins (CLIP-Inspector, 2026, §3).

    Args:
        logits: Shape [K, B, C].
        targets: int64, shape [K]: one class for each of the K rows.

    Returns:
        Shape [K, B].
    """
    index = targets[:, None, None].expand(-1, logits.shape[1], 1)
    target = logits.gather(-1, index).squeeze(-1)
    return logits.scatter(-1, index, -torch.inf).amax(-1) - target


def of_distinct_classes(classifier: Classifier, logits: Tensor) -> Tensor:
    """Logits without those of classes that only repeat another class's row of the head: there they are −∞.

    A class never leads its own double. Left in, a class list that names the attacker's class twice would hide it.

    Args:
        classifier: Its head says which classes these are.
        logits: Shape [..., C].
    """
    distinct = classifier.distinct
    return logits if distinct is None else logits.masked_fill(~distinct, -torch.inf)


class Lead:
    """The distance of each image from each candidate class, on the suspect alone or against a reference model.

    A distance is the margin in units of the median margin by which the classifier's own answers on these images win,
    so that it means the same for every logit scale: about 1 for an image without a trigger, negative where the class
    wins.

    With a reference model, the distance that the trigger gains *there* is added, so that a perturbation that moves both
    models alike gains nothing. A universal adversarial perturbation, or a natural feature of the class, moves both; a
    planted backdoor moves only the suspect. This is a search for the difference of two models, and it tells more than
    the difference of two searches: where the base model has a natural shortcut to the target, the latter puts the class
    within the spread of the others.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W]: images that triggers are put on.
        reference_model: The model that the suspect is compared with; None for none.

    Attributes:
        classifier: The suspect.
        images: The images.
        models: The suspect and, if there is one, the reference model.
    """

    def __init__(self, classifier: Classifier, images: Tensor, reference_model: Classifier | None = None) -> None:
        self.classifier, self.images = classifier, images
        self.models = [model for model in (classifier, reference_model) if model is not None]
        self._views = [_View(model, images) for model in self.models]
        self._shared = reference_model is not None and looks_at(classifier) is looks_at(reference_model)
        """Whether a prompt learner is compared with its own towers under other prompts: images pass them once."""

    @property
    def towers(self) -> int:
        """Number of image towers that each stamped image passes through: 1, or 2 with a reference model of its own."""
        return 1 if self._shared else len(self._views)

    @property
    def predicted(self) -> Tensor:
        """The suspect's answers on the images without a trigger: int64, shape [N], on the CPU."""
        return self._views[0].predicted

    def eligible(self, index: Tensor, targets: Tensor) -> Tensor:
        """Return, for each target, which images are in another class without a trigger: float 0 or 1, shape [K, B]."""
        away = [view.predicted[index] != targets.cpu()[:, None] for view in self._views]
        return torch.stack(away).all(0).float().to(self.classifier.device)

    def pixels(self, index: Tensor) -> Tensor:
        """Return these images as floats in [0, 1], shape [B, 3, H, W], on the classifier's device."""
        return self.images[index].to(self.classifier.device).float() / 255

    def distance(self, stamped: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        """Return the distances of stamped images from the targets; differentiable.

        Args:
            stamped: Shape [K, B, 3, H, W], values in [0, 1].
            index: Indices of these images, shape [B].
            targets: int64, shape [K].

        Returns:
            Shape [K, B].
        """
        flat = stamped.flatten(0, 1)
        suspect, *references = self._views
        images = suspect.embedded(flat)
        distance = suspect.distance(images, index, targets)
        for reference_model in references:
            there = reference_model.distance(images if self._shared else reference_model.embedded(flat), index, targets)
            distance = distance + (reference_model.untouched(index, targets) - there).relu()
        return distance

    def descend(
        self,
        triggers: InvertibleTrigger,
        index: Tensor,
        targets: Tensor,
        cost: Callable[[Tensor, slice, slice], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Put triggers on images, and measure their distances and what they cost, in parts that fit into memory.

        At 224 pixels the activations of ten classes and 32 images alone may take more than ten gigabytes. So each part
        goes through the towers and back to the triggers before the next one.

        Args:
            triggers: K triggers, with the graph that led to them.
            index: Indices of the images, shape [B].
            targets: int64, shape [K].
            cost: From the distances of a part, which classes (rows) they are of and which images (columns), to their
                cost; shape []. The costs of all parts are added up.

        Returns:
            The distances, shape [K, B], detached; and a scalar that has the gradient of the cost, though not its value.
        """
        leaves = {
            name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in triggers.tensors().items()
        }
        distances = torch.empty(len(targets), len(index), device=targets.device)
        rows, columns = max(1, self._at_once // len(index)), min(len(index), self._at_once)
        for classes in (slice(k, k + rows) for k in range(0, len(targets), rows)):
            for images in (slice(k, k + columns) for k in range(0, len(index), columns)):
                own = type(triggers)(**{name: tensor[classes] for name, tensor in leaves.items()})
                stamped = own.apply(self.pixels(index[images]))
                distance = self.distance(stamped, index[images], targets[classes])
                cost(distance, classes, images).backward()
                distances[classes, images] = distance.detach()
        pull = [
            (tensor * leaf.grad).sum()
            for tensor, leaf in zip(triggers.tensors().values(), leaves.values(), strict=True)
            if leaf.grad is not None
        ]
        return distances, torch.stack(pull).sum()

    @cached_property
    def _at_once(self) -> int:
        return images_at_once(self.models)

    def untouched(self, index: Tensor, targets: Tensor) -> Tensor:
        """Return the distances of images without a trigger from the targets, shape [K, B]."""
        return self._views[0].untouched(index, targets)

    def check_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make sure that the last backward pass gave numbers: a step along others would end the search in silence.

        Raises:
            ModelError: A gradient is not finite, since a model overflows.
        """
        if not all(each.grad is None or bool(each.grad.isfinite().all()) for each in parameters):
            raise ModelError(f"{self.classifier.source} computes no finite numbers: gradients of its scores overflow")


def looks_at(model: Classifier) -> Classifier:
    """The classifier whose image tower sees the pixels as they are: that of the towers, where contexts were learned."""
    return model.towers if isinstance(model, PromptedClassifier) and model.learner.kind != "visual" else model


class _View:
    """One model, and what it says about the images without a trigger."""

    def __init__(self, model: Classifier, images: Tensor) -> None:
        self._model, self._images = model, images

    @cached_property
    @torch.no_grad()
    def clean(self) -> Tensor:
        """Logits of the images without a trigger, shape [N, C]."""
        return self._logits(self._model.embed(self._images).to(self._model.device))

    def _logits(self, embeddings: Tensor) -> Tensor:
        return of_distinct_classes(self._model, self._model.logits(embeddings))

    @cached_property
    def predicted(self) -> Tensor:
        return self.clean.argmax(-1).cpu()

    @cached_property
    def unit(self) -> Tensor:
        first, second = self.clean.topk(2).values.unbind(-1)
        # Relative to the scale of the scores, which changes no answer: it belongs to the suspect, who may set it.
        return (first - second).median().clamp(min=1e-6 * self._model.logit_scale)

    def untouched(self, index: Tensor, targets: Tensor) -> Tensor:
        """Return the distances of images without a trigger from the targets: shape [K, B]."""
        logits = self.clean[index.to(self.clean.device)]
        return margin(logits.expand(len(targets), -1, -1), targets) / self.unit

    def embedded(self, flat: Tensor) -> Tensor:
        """Return what the image tower gives for stamped images, shape [K · B, 3, H, W]."""
        with self._model.autocast():
            return self._model.tower_embeddings(flat)

    def distance(self, images: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        """Return the distances of stamped images from the targets, shape [K, B], from what the image tower gives."""
        if self._model.prompts_per_image and self.clean.shape[1] > RIVALS + 1:
            return self._among_rivals(images, index, targets)
        with self._model.autocast():
            embeddings = self._model.answered(images)
        return margin(self._logits(embeddings).unflatten(0, (len(targets), -1)), targets) / self.unit

    def _among_rivals(self, images: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        """`distance`, where the strongest other class is looked for among the strongest without a trigger."""
        logits = self.clean[index.to(self.clean.device)].expand(len(targets), -1, -1)
        own = targets[:, None, None].expand(-1, len(index), 1)
        rivals = logits.scatter(-1, own, -torch.inf).topk(RIVALS).indices
        with self._model.autocast():
            scores = self._model.scores_of(images, torch.cat([own, rivals], -1).flatten(0, 1))
        target, others = scores.unflatten(0, (len(targets), -1)).split([1, RIVALS], -1)
        distance: Tensor = (others.amax(-1) - target.squeeze(-1)) / self.unit
        return distance
