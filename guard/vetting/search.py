"""A search that names no class: a trigger under which the suspect sees all images alike, and the reference does not.

DECREE (Feng et al., CVPR 2023) searches an image encoder without a class list for a trigger under which the embeddings
of different images agree, by their mean pairwise cosine. Here the concentration on the reference model is subtracted,
as for `guard.vetting.lead`, and any family of triggers is searched. Which class the images then go to is read off
afterwards, so that the cost does not depend on the number of classes. What was found is taken out of the embeddings
before the next start, so that a second target is not hidden by the first.

A prompt learner without a meta-net and the prompts that it is compared with share one image tower, whose embeddings are
then the same on both sides. There it is predicted probabilities whose concentration is measured.

It finds most patches, blends and warps, and hardly any sinusoid or compression, for which there are probes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers.classifier import Classifier
from guard.triggers import FAMILIES, InvertibleTrigger
from guard.vetting.batches import batches
from guard.vetting.budgets import TargetSearchSettings
from guard.vetting.inspection import RADII
from guard.vetting.lead import Lead, looks_at, of_distinct_classes
from guard.vetting.probes import EXAMINED, gains, sharpening
from guard.vetting.results import FoundTarget

METHOD = "target search 2"
"""Name and version of the method; it changes when results are no longer comparable."""


def search_targets(
    classifier: Classifier,
    images: Tensor,
    family: str,
    settings: TargetSearchSettings,
    *,
    reference_model: Classifier | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[FoundTarget]:
    """Search the triggers of one family, one start after the other.

    Args:
        classifier: The suspect.
        images: uint8, shape [N, 3, H, W]: clean images.
        family: Name from `guard.triggers.FAMILIES`; the norm is at most `guard.vetting.inspection.RADII`.
        settings: How much work to do.
        reference_model: The model that the suspect is compared with; None for none.
        progress: Called with the number of starts that are done.

    Returns:
        What each start ended at, in order.
    """
    models = [model for model in (classifier, reference_model) if model is not None]
    factors = None
    if len({id(looks_at(model)) for model in models}) < len(models) and not classifier.prompts_per_image:
        factors = [sharpening(_scores(model, images[:EXAMINED])) for model in models]
    found: list[FoundTarget] = []
    for start in range(settings.starts):
        found.append(_search(models, images, FAMILIES[family], settings, settings.seed + start, found, factors))
        progress(start + 1)
    return found


def _search(
    models: Sequence[Classifier],
    images: Tensor,
    family: type[InvertibleTrigger],
    settings: TargetSearchSettings,
    seed: int,
    before: Sequence[FoundTarget],
    factors: Sequence[float] | None,
) -> FoundTarget:
    """Search from one start.

    Args:
        models: The suspect and, if there is one, the reference model.
        images: uint8, shape [N, 3, H, W].
        family: Family of triggers.
        settings: How much work to do.
        seed: Seed of this start.
        before: What earlier starts ended at.
        factors: For each model, what its scores are sharpened by, where their answers are compared; None where
            embeddings are.
    """
    suspect = models[0]
    taken = _taken(before, None if factors is None else len(suspect.classes.names))
    generator = torch.Generator(suspect.device).manual_seed(seed)
    raw = {name: each.requires_grad_() for name, each in family.start(1, suspect.image_shape, generator).items()}
    optimiser = torch.optim.Adam(raw.values(), lr=settings.learning_rate, betas=(0.5, 0.9))
    lead = Lead(suspect, images)
    order = batches(len(images), settings.batch, seed)
    directions = None if taken is None else torch.linalg.qr(taken.to(suspect.device))[0]
    value, passes = 0.0, 0
    for _ in range(settings.steps):
        stamped = family.constrain(raw).limited(RADII[family.family]).apply(lead.pixels(next(order)))[0]
        concentrations = []
        for place, model in enumerate(models):
            with model.autocast():
                embeddings = model.encode_images(stamped)
            if factors is not None:
                scores = factors[place] * of_distinct_classes(model, model.logits(embeddings))
                embeddings = normalize(scores.softmax(-1), dim=-1)
            if directions is not None and model is suspect:
                basis = directions.to(embeddings)
                embeddings = embeddings - embeddings @ basis @ basis.T
            concentrations.append(concentration(embeddings))
        objective = concentrations[0] - sum(concentrations[1:])
        optimiser.zero_grad(set_to_none=True)
        (-objective).backward()
        lead.check_gradients(raw.values())
        optimiser.step()
        value, passes = float(objective.detach()), passes + len(stamped) * len(models)
    with torch.no_grad():
        trigger = family.constrain(raw).limited(RADII[family.family])[0].detach()
        shown = images[:EXAMINED]
        gained = gains(models, shown, trigger.apply)
        feature = normalize(suspect.embed(trigger.stamp(shown)).mean(0), dim=0)
    usable = not bool(gained.isnan().all())
    target = int(gained.nan_to_num(-2).argmax())
    passes += (2 * len(models) + 1) * len(shown)
    return FoundTarget(
        family.family,
        target if usable else None,
        float(gained[target]) if usable else 0.0,
        value,
        feature,
        passes,
    )


def _scores(model: Classifier, images: Tensor) -> Tensor:
    """Scores of images as they are, shape [N, C]."""
    with torch.no_grad():
        return of_distinct_classes(model, model.logits(model.embed(images).to(model.device)))


def _taken(before: Sequence[FoundTarget], classes: int | None) -> Tensor | None:
    """The directions of what was found before, as columns; among probabilities of so many classes, those of targets."""
    if classes is None:
        return torch.stack([each.feature for each in before], 1) if before else None
    targets = sorted({each.target for each in before if each.target is not None})
    return torch.eye(classes)[:, targets] if targets else None


def concentration(embeddings: Tensor) -> Tensor:
    """Return the mean product of different rows, which for unit vectors is their mean pairwise cosine; shape [].

    Args:
        embeddings: Shape [B, D], at least two rows.
    """
    count = len(embeddings)
    total = embeddings.sum(0).square().sum() - embeddings.square().sum()
    return total / (count * (count - 1))
