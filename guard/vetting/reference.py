"""A reference model made from the suspect itself, for when there is no trusted base."""

import copy

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.vetting.budgets import DerivedReferenceSettings


def derive_reference(
    classifier: Classifier, images: Tensor, settings: DerivedReferenceSettings
) -> tuple[Classifier, int]:
    """The suspect with its image tower disturbed, and taught again what it said about clean images.

    Noise damages what is planted and what is natural alike; the recovery, towards the suspect's own embeddings of
    clean images, brings back only what clean images use. The idea is that of Perturb and Recover (PAR, Singh et al.,
    2026), with noise in the weights instead of a loss that pushes embeddings away, and with the suspect's embeddings
    instead of captions, since vetting has no labels.

    What was tried on the digits zoo instead, and was worse: fine-tuning on clean images alone (a backdoor survives it);
    twice the noise (the reference model drifts away from the suspect in all classes); and training against universal
    triggers of all classes (it removes the backdoor best, from 100 % to 3 to 38 % of images, but hardens every class
    by nature differently, and the target drowns in that).

    Args:
        classifier: The suspect; left as it is.
        images: uint8, shape [N, 3, H, W]: clean images, unlabelled.
        settings: How.

    Returns:
        The reference model, and the images pushed through image towers.
    """
    model = copy.deepcopy(classifier.model)
    tower = model.visual
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(settings.noise * parameter.std() * noise)
    reference_model = Classifier(
        model,
        classifier.config,
        classifier.tokenizer,
        classifier.preprocessing,
        classifier.classes,
        source=f"derived reference of {classifier.source}",
        device=classifier.device,
    )
    parameters = [parameter.requires_grad_() for parameter in tower.parameters() if parameter.is_floating_point()]
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    taught = classifier.embed(images)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, 2 * (settings.steps - step) / settings.steps)
        index = torch.randint(len(images), (settings.batch,), generator=generator)
        with reference_model.autocast():
            embeddings = reference_model.encode_images(images[index].to(reference_model.device).float() / 255)
        loss = (1 - (embeddings * taught[index].to(reference_model.device)).sum(-1)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    model.requires_grad_(requires_grad=False)
    return reference_model, len(images) + settings.steps * settings.batch
