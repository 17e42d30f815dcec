from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guard.classifiers import Classifier, load
from guard.errors import UsageError
from guard.vetting import Vetting, agreed
from tests.zoo import TARGET, FakeVetting


@pytest.fixture
def accusing(model_directory: Path, images: torch.Tensor) -> Vetting:
    return FakeVetting(model_directory.name)(load(str(model_directory), device="cpu"), images)


@pytest.fixture
def silent(classifier: Classifier, images: torch.Tensor) -> Vetting:
    return FakeVetting()(classifier, images)


def test_vettings_that_agree_give_their_verdict(accusing: Vetting, silent: Vetting) -> None:
    assert agreed([silent]) == silent
    found = agreed([accusing, accusing])
    assert (found.verdict.outcome, found.verdict.target) == ("backdoored", TARGET)
    assert found.verdict.reasons[-1] == "2 vettings with different seeds agree"
    assert found.passes == 2 * accusing.passes


def test_what_depends_on_the_seed_is_inconclusive_and_keeps_the_triggers(accusing: Vetting, silent: Vetting) -> None:
    found = agreed([silent, accusing, silent])
    assert (found.verdict.outcome, found.verdict.target) == ("inconclusive", None)
    assert "no evidence by 2, backdoored (class 1) by 1" in found.verdict.reasons[0]
    assert found.triggers == accusing.triggers
    elsewhere = replace(accusing, verdict=replace(accusing.verdict, target=TARGET + 1))
    assert agreed([accusing, elsewhere]).verdict.outcome == "inconclusive"


def test_no_vetting_says_nothing() -> None:
    with pytest.raises(UsageError, match="at least one seed"):
        agreed([])
