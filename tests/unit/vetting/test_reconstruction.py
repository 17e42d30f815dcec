from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from guard.triggers import InvertibleTrigger, Raw
from guard.vetting.budgets import SearchSettings
from guard.vetting.inversion import Reconstruction
from guard.vetting.probes import Probe
from guard.vetting.reconstruction import reconstruct_suspects
from guard.vetting.results import PROBES, Check, ReconstructedTrigger
from guard.vetting.searches import Searches
from guard.vetting.verdict import judge
from tests.conftest import CLASSES
from tests.zoo import TARGET, attack_trigger, evidence_of

SINUSOID = Probe("sinusoid", lambda images: images)


class Reconstructing:
    """Stands for the searches: every trigger for all images that it finds is far too strong, and every probe works.

    Attributes:
        tried: The families in which triggers were searched for, in order, with the classes on whose images.
    """

    classifier = SimpleNamespace(classes=CLASSES, distinct=None)

    def __init__(self, near: Mapping[str, float] = MappingProxyType({})) -> None:
        self.tried: list[tuple[str, tuple[int, ...]]] = []
        self._near = near

    def reconstruct(
        self,
        family: str,
        start: Mapping[int, Raw],
        _settings: SearchSettings,
        what: str,
        sources: tuple[int, ...] = (),
    ) -> list[Reconstruction]:
        if "strengthened" not in what:
            self.tried.append((family, sources))
        norm = 0.1 if sources and family == "patch" else 1e3
        return [
            Reconstruction(target, attack_trigger(), norm, reached=True, success=0.9, reference_success=0.0, passes=1)
            for target in start
        ]

    def nearest_sources(self, family: str, *_: object) -> tuple[float, tuple[int, ...]]:
        return self._near.get(family, 1.0), (1, 2)

    def target_feature(self, _: InvertibleTrigger, sources: tuple[int, ...]) -> Tensor:
        assert sources == (1, 2)
        return torch.ones(4)

    def probe_effects(self, probe: Probe, target: int) -> tuple[float, float]:
        assert (probe, target) == (SINUSOID, TARGET)
        return 0.58, 0.27


def suspected(p_values: Mapping[str, float]) -> Sequence[Any]:
    """Results in which the target has these uncorrected p-values, and the other classes do not stand out."""
    return [
        evidence_of([p_value if k == TARGET else 0.6 for k in range(len(CLASSES.names))], family=family)
        for family, p_value in p_values.items()
    ]


def reconstructed(
    searches: Reconstructing, results: Sequence[Any]
) -> tuple[tuple[Check, ...], tuple[ReconstructedTrigger, ...]]:
    """What the stand-in's searches lead to, against a base."""
    return reconstruct_suspects(
        cast(Searches, searches),
        results,
        lambda *_: {"raw": torch.zeros(1)},
        lambda _: SINUSOID,
        SearchSettings(),
        "base",
        everything=False,
    )


@pytest.mark.parametrize(("under_probes", "outcome"), [(0.02, "inconclusive"), (0.005, "backdoored")])
def test_a_probe_accuses_only_a_class_that_stands_out_under_probes(under_probes: float, outcome: str) -> None:
    """A natural feature of the class may work as a probe too, while the class stands out for something else."""
    results = suspected({"colour map": 1e-5, "patch": 0.02, "warp": 0.4, PROBES: under_probes})
    searches = Reconstructing()
    checks, triggers = reconstructed(searches, results)
    assert searches.tried == [("colour map", ()), ("patch", ())], "under warps the class does not stand out"
    assert (judge(results, checks).outcome, triggers) == (outcome, ())


def test_where_no_trigger_for_all_images_works_one_for_some_classes_is_tried() -> None:
    """First in the families under which their images come nearest, and no longer once one is enough to accuse."""
    results = suspected({"colour map": 1e-5, "patch": 0.2, "warp": 0.4, "blend": 0.4, PROBES: 0.5})
    searches = Reconstructing({"warp": -0.2, "patch": 0.1, "blend": 0.4})
    checks, triggers = reconstructed(searches, results)
    assert searches.tried == [("colour map", ()), ("warp", (1, 2)), ("patch", (1, 2))]
    assert [check.sources for check in checks] == [(), *[(CLASSES.names[1], CLASSES.names[2])] * 2]
    verdict = judge(results, checks)
    assert (verdict.outcome, verdict.target) == ("backdoored", TARGET)
    assert [trigger.target for trigger in triggers] == [TARGET]
