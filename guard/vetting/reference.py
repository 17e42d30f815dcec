"""The derived reference: a reference model that is made from the suspect itself where there is no base model."""

import copy

import torch
from torch import Tensor

from guard.classifiers.classifier import Classifier
from guard.vetting.budgets import DerivedReferenceSettings


def derive_reference(
    classifier: Classifier, images: Tensor, settings: DerivedReferenceSettings
) -> tuple[Classifier, int]:
    """Return the suspect with noise in its image tower, trained again to give its own embeddings of clean images.

    Noise damages planted and natural features alike. The recovery, towards the suspect's own embeddings of clean
    images, restores only what clean images use. The idea is that of Perturb and Recover (PAR, Singh et al., 2026), with
    noise in the weights instead of a loss that pushes embeddings away, and with the suspect's embeddings instead of
    captions, since vetting has no labels.

    Three alternatives were tried on the digits zoo and were worse: fine-tuning on clean images alone (a backdoor
    survives it); twice the noise (the reference model drifts away from the suspect in all classes); and training
    against universal triggers of all classes (it removes the backdoor best, from 100 % to 3 to 38 % of images, but it
    hardens every class to a different degree, and the target is lost in that spread).

    Args:
        classifier: The suspect; it is not changed.
        images: uint8, shape [N, 3, H, W]: clean images, unlabelled.
        settings: How the reference is made.

    Returns:
        The reference model, and the number of images pushed through image towers.
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
    wanted = classifier.embed(images)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, 2 * (settings.steps - step) / settings.steps)
        index = torch.randint(len(images), (settings.batch,), generator=generator)
        with reference_model.autocast():
            embeddings = reference_model.encode_images(images[index].to(reference_model.device).float() / 255)
        loss = (1 - (embeddings * wanted[index].to(reference_model.device)).sum(-1)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    model.requires_grad_(requires_grad=False)
    return reference_model, len(images) + settings.steps * settings.batch
