"""Search for triggers of classes that are known to be targets, besides those that vetting reconstructed."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from guard.repair.cases import Case, TargetedTrigger
from guard.triggers import FAMILIES
from guard.vetting.budgets import InspectionSettings
from guard.vetting.inspection import RADII, Inspector
from guard.vetting.lead import Lead

SEARCH = InspectionSettings(steps=16, batch=32)
"""A search that is short, since its triggers are trained on and prove nothing."""


def search_triggers(
    case: Case,
    targets: Sequence[int],
    settings: InspectionSettings = SEARCH,
    *,
    starts: int = 1,
    families: Sequence[str] = tuple(FAMILIES),
) -> tuple[list[TargetedTrigger], int]:
    """Search for triggers of limited strength on the suspect of a case.

    Args:
        case: The suspect and its images.
        targets: Classes that they shall lead to.
        settings: How each search is done; its seed is that of the case.
        starts: Number of starts in each family.
        families: Names from `guard.triggers.FAMILIES`.

    Returns:
        A trigger for each class, family and start; and the number of image passes that they cost.
    """
    lead = Lead(case.suspect, case.images.pixels)
    found, passes = [], 0
    rounds = [(name, start) for start in range(starts) for name in families]
    for done, (name, start) in enumerate(rounds):
        inspector = Inspector(lead, FAMILIES[name], torch.tensor(targets), replace(settings, seed=case.seed + start))
        for each in inspector.run(settings.steps, targets):
            raw = {part: values[None] for part, values in each.raw.items()}
            trigger = FAMILIES[name].constrain(raw).limited(RADII[name])[0]
            found.append(TargetedTrigger(f"{name}-{each.target}-{start}", trigger.to(case.suspect.device), each.target))
            passes += each.passes
        case.progress("searching for more triggers", done + 1, len(rounds))
    return found, passes
