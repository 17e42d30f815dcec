from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from guard.triggers import FORMS, KINDS, check_tensors


def test_every_family_has_a_form_for_each_of_its_tensors() -> None:
    assert FORMS.keys() == KINDS.keys()
    for name, family in KINDS.items():
        assert [field.name for field in fields(family)] == list(FORMS[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])
def test_arrays_of_numpy_and_tensors_of_torch_are_checked_alike(library: Any) -> None:
    shapes = {"alpha": (1, 1, 1), "pattern": (3, 8, 8)}
    good = {name: library.zeros(shape, dtype=library.float32) for name, shape in shapes.items()}
    check_tensors("blend", good)
    with pytest.raises(ValueError, match=r"^pattern has shape \[3, 8\], not \[3, height, width\]$"):
        check_tensors("blend", {**good, "pattern": good["pattern"][..., 0]})
    with pytest.raises(ValueError, match=r"^alpha has a value outside 0 to 1$"):
        check_tensors("blend", {**good, "alpha": good["alpha"] - 1})
    with pytest.raises(ValueError, match=r"^alpha has a value that is not finite$"):
        check_tensors("blend", {**good, "alpha": good["alpha"] + float("nan")})
    with pytest.raises(ValueError, match=r"^it has the tensors 'alpha', not 'alpha', 'pattern'$"):
        check_tensors("blend", {"alpha": good["alpha"]})


def test_a_type_that_numpy_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="delta is bfloat16, not float32"):
        check_tensors("additive", {"delta": torch.zeros(3, 4, 4, dtype=torch.bfloat16)})
