from dataclasses import replace

import pytest

from guard.cli.calibrate import _opinion
from guard.profiles.document import SecondOpinionRecord

RECORD = SecondOpinionRecord("base", "a base", "0" * 64, 16, 20.0, 1.0, 0.97)


@pytest.mark.parametrize(
    ("kind", "advice"), [("base", "--reference student may do better"), ("student", "a trusted --base may do better")]
)
def test_a_reference_model_that_often_disagrees_is_called_weak(kind: str, advice: str) -> None:
    assert "that is little" not in _opinion(RECORD)
    weak = replace(RECORD, kind=kind, agreement=0.72)  # type: ignore[arg-type]
    assert "which gives the same answer to 72.0% of clean images" in _opinion(weak)
    assert advice in _opinion(weak)
