import numpy as np

from guard.baselines import Lorex


def test_a_shifted_share_of_the_traffic_is_the_axis() -> None:
    generator = np.random.default_rng(0)
    clean = generator.normal(size=(2000, 16)).astype(np.float32)
    traffic = generator.normal(size=(1000, 16)).astype(np.float32)
    shifted = traffic[:300] + 6 * np.eye(16, dtype=np.float32)[3]
    mixed = Lorex(clean, np.concatenate([shifted, traffic[300:]]))
    scores = mixed.score_samples(shifted)
    assert (scores > np.quantile(mixed.score_samples(clean), 0.99)).mean() > 0.9
    assert mixed.eigenvalue > 1.5 * Lorex(clean, traffic).eigenvalue
