"""Estimates of the benchmarks."""

import numpy as np
import pytest

from benchmarks._turns import Estimate


def test_an_estimate_has_an_interval_that_narrows_with_more_rounds() -> None:
    values = np.random.default_rng(0).normal(5.0, 1.0, 1000)

    few, many = (Estimate.of(lambda rows: float(values[rows].mean()), count) for count in (20, 1000))

    assert many.low < 5.0 < many.high
    assert many.value == pytest.approx(values.mean())
    assert many.high - many.low < (few.high - few.low) / 3
