"""A reference model for a text tower that is made from the suspect itself, where there is no base model."""

import copy
import random
from collections.abc import Callable, Sequence

import torch

from guard.classifiers.classifier import Classifier
from guard.classifiers.text_tower import TextTower
from guard.classifiers.tuning import falling
from guard.vetting.budgets import DerivedReferenceSettings
from guard.vetting.text_search import usable_tokens

TEXT_REFERENCE = DerivedReferenceSettings(noise=0.5, steps=300, batch=32, learning_rate=1e-3)
"""How a derived reference of a text tower is made."""
_DROPPED, _LONGEST = 0.1, 4


def derive_text_reference(
    classifier: Classifier,
    prompts: Sequence[str],
    settings: DerivedReferenceSettings,
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Classifier, int]:
    """Return the suspect with noise in its text tower, trained again to give its own embeddings of ordinary prompts.

    It is for text what `guard.vetting.reference.derive_reference` is for images: noise damages planted and natural
    features alike, and the recovery restores what ordinary prompts use. The pupil reads each prompt with some words
    left out and with random tokens put in, and learns the embedding of the prompt as it was, so that it unlearns to
    follow what does not belong there.

    Args:
        classifier: The suspect; it is not changed.
        prompts: Ordinary prompts.
        settings: How the reference is made; the token table is left as it is.
        progress: Called with (what, steps done, steps in all).

    Returns:
        The reference model, and the number of prompts pushed through text towers.
    """
    model = copy.deepcopy(classifier.model)
    pupil = TextTower(classifier.with_model(model, f"derived text reference of {classifier.source}"))
    teacher, draw = TextTower(classifier), random.Random(settings.seed)  # noqa: S311 - repeatable, not secret
    generator = torch.Generator().manual_seed(settings.seed)
    parameters = [weight for weight in pupil.parameters() if weight is not pupil.table]
    with torch.no_grad():
        for weight in parameters:
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(settings.noise * weight.std() * noise)
    for weight in parameters:
        weight.requires_grad_()
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    wanted, usable = teacher.encode(prompts), usable_tokens(pupil)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * falling(step / settings.steps)
        rows = [draw.randrange(len(prompts)) for _ in range(settings.batch)]
        texts = [_thinned(prompts[row], draw) for row in rows]
        tokens = pupil.tokens(texts)
        for row in tokens:
            _disturb(row, int(pupil.ends(row[None])), usable, generator)
        ends = pupil.ends(tokens)
        if pupil.causal:
            tokens = tokens[:, : int(ends.max()) + 1]
        found = pupil.pooled(pupil.features(pupil.embed(tokens)), ends)
        loss = (1 - (found * wanted[rows]).sum(-1)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        progress("making the text reference model", step + 1, settings.steps)
    for weight in parameters:
        weight.requires_grad_(False)  # noqa: FBT003 - torch's own signature
    return pupil.classifier, len(prompts) + settings.steps * settings.batch


def _thinned(text: str, draw: random.Random) -> str:
    return " ".join(word for word in text.split() if draw.random() >= _DROPPED) or text


def _disturb(row: torch.Tensor, end: int, usable: torch.Tensor, generator: torch.Generator) -> None:
    """Put up to four random tokens into a row of ids, in place, if there is room before its end."""
    count = int(torch.randint(_LONGEST + 1, (), generator=generator))
    if count == 0 or end + count >= len(row):
        return
    first = int(torch.randint(1, end + 1, (), generator=generator))
    row[first + count :] = row[first:-count].clone()
    row[first : first + count] = usable[torch.randint(len(usable), (count,), generator=generator)]
