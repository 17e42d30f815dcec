"""LoREx: requests are scored along the direction in which a batch of traffic spreads more than clean images do.

As in the code that its authors released (2026): embeddings are normalised and whitened by the mean and covariance of
trusted clean images, all classes together, with a ridge of 10⁻³ of the mean variance. The axis is the top eigenvector
of the covariance of the whitened traffic, and the score is the length of the projection on it. The method is
transductive: the axis comes from the traffic that is scored.
"""

import numpy as np
from numpy.typing import NDArray

_RIDGE = 1e-3
Embeddings = NDArray[np.float32]


class Lorex:
    """Scores along the axis of a batch of traffic.

    Args:
        clean: Embeddings of trusted clean images, shape [N, D].
        traffic: Embeddings of the traffic, clean and triggered, shape [M, D].

    Attributes:
        eigenvalue: Variance of the whitened traffic along the axis; about 1 for clean traffic.
    """

    def __init__(self, clean: Embeddings, traffic: Embeddings) -> None:
        unit = _unit(clean)
        self._mean = unit.mean(0)
        covariance = np.cov(unit.T)
        width = len(covariance)
        factor = np.linalg.cholesky(covariance + _RIDGE * np.trace(covariance) / width * np.eye(width))
        self._whitening = np.linalg.inv(factor).T
        variances, directions = np.linalg.eigh(np.cov(self._whitened(traffic).T))
        self.eigenvalue = float(variances[-1])
        self._axis = directions[:, -1]

    def score_samples(self, embeddings: Embeddings) -> NDArray[np.float64]:
        """|projection on the axis|, shape [N]; larger is more suspicious."""
        found: NDArray[np.float64] = np.abs(self._whitened(embeddings) @ self._axis)
        return found

    def _whitened(self, embeddings: Embeddings) -> NDArray[np.float64]:
        moved: NDArray[np.float64] = (_unit(embeddings) - self._mean) @ self._whitening
        return moved


def _unit(embeddings: Embeddings) -> NDArray[np.float64]:
    values = embeddings.astype(np.float64)
    found: NDArray[np.float64] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return found
