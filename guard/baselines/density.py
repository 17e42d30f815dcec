"""Density scores: how thinly the clean bank is populated around an input, by k-distance, SLOF, LID and DAO.

The scores are those of Huang et al., "Detecting Backdoor Samples in Contrastive Language Image Pretraining", ICLR 2025,
who rank training pairs by them. They have the interface of scikit-learn's estimators, except for the sign:

    LARGER IS MORE SUSPICIOUS. scikit-learn's `score_samples` is larger where a sample is more normal.

Notation: N_k(x) are the k rows of the bank that are nearest to x, d_i(x) is the distance to the i-th of them. For a row
of the bank, the row itself is left out. Distances below 1e-6 count as zero, because float32 does not resolve them.

`compat=True` reproduces the released code (HanxunH/Detect-CLIP-Backdoor-Samples, ff2399a), in which the batch is its
own
bank: `fit(batch).within()` gives what its detectors give for a batch of images. It departs from the formulas:

- x's own distance is that to its (k+1)-th neighbour, while d_k(o) of a bank row is that to its k-th;
- a neighbour o that comes after x in the batch is read at o − 1, so that d_k and LID are those of the row before it (x
  is cut out of the distances, and positions among the rest are used to look up in the whole);
- ratios in the LID have 1e-4 added, and that of a bank row counts the row itself as its first neighbour;
- embeddings are taken as the tower gives them, not normalised;
- SLOF and DAO turn NaN and +∞ (where bank rows coincide) into 1000 and −∞ into 0; the other scores leave them as they
  are. Among rows at exactly the same distance its sort takes any, so that batches with copies need not give the same
  scores.
"""

from abc import ABC, abstractmethod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from guard.screening.neighbours import Embeddings, Nearest, Neighbours

Scores = NDArray[np.float32]

_FLOOR = 1e-6
_SMALLEST_LOG = 1e-4
_COMPAT_OFFSET = 1e-4
_COMPAT_UNDEFINED = 1000.0


class DensityScore(ABC):
    """A score of embeddings against a fixed bank; larger is more suspicious.

    Args:
        k: Number of neighbours.
        compat: Whether to reproduce the released code instead of the formulas, with embeddings of any norm.

    Raises:
        ValueError: k is too small.
    """

    _smallest_k = 1

    def __init__(self, k: int = 16, *, compat: bool = False) -> None:
        if k < self._smallest_k:
            raise ValueError(f"k = {k} is too small, {type(self).__name__} needs at least {self._smallest_k}")
        self.k = k
        self.compat = compat
        self._bank: Neighbours | None = None

    @property
    def reach(self) -> int:
        """Number of neighbours that `score` needs."""
        return self.k + self.compat

    def fit(self, bank: Embeddings | Neighbours, *, within: Nearest | None = None) -> Self:
        """Set the bank, and compute everything that depends on it alone.

        Args:
            bank: Shape [N, D], L2-normalised; or a search in such a bank, which several scores may share.
            within: `Neighbours.within(k)` of this bank, for this or a larger k, where it is known already. SLOF and DAO
                need it, and it costs a product of the bank with itself.

        Raises:
            ValueError: The bank is not a matrix of unit vectors, or is too small for k.
        """
        neighbours = bank if isinstance(bank, Neighbours) else Neighbours(bank, unit=not self.compat)
        if self.reach > neighbours.size:
            raise ValueError(f"k = {self.k} needs a bank of at least {self.reach} embeddings, it has {neighbours.size}")
        self._fit(neighbours, within)
        self._bank = neighbours
        return self

    def score_samples(self, embeddings: Embeddings) -> Scores:
        """Return scores of embeddings that are not in the bank; larger is more suspicious, unlike scikit-learn's.

        Args:
            embeddings: Shape [M, D], L2-normalised.

        Returns:
            Shape [M].

        Raises:
            ValueError: There is no bank yet, or the embeddings are not finite vectors of the bank's dimension.
        """
        return self.score(self._fitted.search(embeddings, self.reach))

    def within(self) -> Scores:
        """Return scores of the bank's rows, each among the others; shape [N].

        Raises:
            ValueError: There is no bank yet, or it is too small for k.
        """
        nearest = self._fitted.within(self.reach)
        if self.compat:
            shifted = nearest.indices - (nearest.indices > np.arange(len(nearest.indices))[:, None])
            nearest = Nearest(nearest.distances, shifted)
        return self.score(nearest)

    def score(self, nearest: Nearest) -> Scores:
        """Return scores from neighbours that were found already, so that one search serves several scores.

        Args:
            nearest: Neighbours in the fitted bank, shape [M, reach] or wider.

        Returns:
            Shape [M].

        Raises:
            ValueError: There is no bank yet, or there are fewer than `reach` neighbours.
        """
        _ = self._fitted
        return self._score(_narrow(nearest, self.reach)).astype(np.float32)

    @property
    def _fitted(self) -> Neighbours:
        if self._bank is None:
            raise ValueError(f"{type(self).__name__} has no bank yet; call fit first")
        return self._bank

    def _fit(self, neighbours: Neighbours, within: Nearest | None) -> None:  # noqa: B027  # some scores need nothing
        """Precompute what depends on the bank alone."""

    @abstractmethod
    def _score(self, nearest: Nearest) -> NDArray[np.float64]: ...


class KDistance(DensityScore):
    """d_k(x): the distance to the k-th nearest row of the bank, in [0, 2].

    scikit-learn's `NearestNeighbors(n_neighbors=k).kneighbors` gives the same number.
    """

    def _score(self, nearest: Nearest) -> NDArray[np.float64]:
        return nearest.distances[:, -1].astype(np.float64)


class LID(DensityScore):
    """Local intrinsic dimensionality: how fast the number of neighbours grows with the distance from x.

    The maximum-likelihood estimate −k / Σ_{i≤k} log(d_i(x) / d_k(x)) (Amsaleg et al., KDD 2015), in [0.07, 10⁴]. At a
    point that occurs k times in the bank it is 0.07, the smallest value, because a point has no dimension; where
    all k neighbours lie at the same distance it is 10⁴ instead of infinite.

    Args:
        k: At least 2; the estimate is coarse below 20.
        compat: See the documentation of the module.
    """

    _smallest_k = 2

    def __init__(self, k: int = 64, *, compat: bool = False) -> None:
        super().__init__(k, compat=compat)

    def _score(self, nearest: Nearest) -> NDArray[np.float64]:
        if self.compat:
            return released_dimension(nearest.distances[:, :-1], nearest.distances[:, -1:])
        return dimension(nearest.distances)


class SLOF(DensityScore):
    """Simplified local outlier factor: mean over o in N_k(x) of d_k(x) / d_k(o) (Schubert et al., 2014).

    About 1 where the bank is as dense around x as around its neighbours. Distances are taken to be at least 1e-6, so
    that the ratio is finite at points that occur more than k times. scikit-learn's LocalOutlierFactor is LOF, which
    smooths the distances (reachability) and gives other numbers.
    """

    def _fit(self, neighbours: Neighbours, within: Nearest | None) -> None:
        self._radii = _within(neighbours, self.k, within).distances[:, -1].astype(np.float64)

    def _score(self, nearest: Nearest) -> NDArray[np.float64]:
        near = nearest.indices[:, : self.k]
        return slof(nearest.distances[:, -1], self._radii[near], compat=self.compat)


class DAO(DensityScore):
    """Dimensionality-aware outlier score: mean over o in N_k(x) of LID(o) · log(d_k(x) / d_k(o)).

    About 0 where the bank is as dense around x as around its neighbours. Anderberg et al. (SDM 2024), who derive it,
    average the ratios (d_k(x) / d_k(o))^LID(o) themselves. Here their logarithms are averaged, as the code of Huang et
    al. does: with the LID of image embeddings, easily above 50, a mean of such powers is dominated by one neighbour,
    and exceeds the range of float32 at a ratio of 6. The limits of SLOF and LID apply.

    Args:
        k: At least 2; for the bank's LID as well as for distances.
        compat: See the documentation of the module.
    """

    _smallest_k = 2

    def _fit(self, neighbours: Neighbours, within: Nearest | None) -> None:
        distances = _within(neighbours, self.k, within).distances
        self._radii = distances[:, -1].astype(np.float64)
        if self.compat:
            itself = np.zeros((len(distances), 1), np.float32)
            self._dimensions = released_dimension(np.hstack([itself, distances[:, :-1]]), distances[:, -1:])
        else:
            self._dimensions = dimension(distances)

    def _score(self, nearest: Nearest) -> NDArray[np.float64]:
        near = nearest.indices[:, : self.k]
        return dao(nearest.distances[:, -1], self._radii[near], self._dimensions[near], compat=self.compat)


def _within(neighbours: Neighbours, k: int, known: Nearest | None) -> Nearest:
    if known is None:
        return neighbours.within(k)
    if len(known.distances) != neighbours.size:
        raise ValueError(f"neighbours of {len(known.distances)} rows are not those of a bank of {neighbours.size}")
    return _narrow(known, k)


def _narrow(nearest: Nearest, k: int) -> Nearest:
    if nearest.distances.shape[1] < k:
        raise ValueError(f"{k} neighbours are needed, there are {nearest.distances.shape[1]}")
    return Nearest(nearest.distances[:, :k], nearest.indices[:, :k])


def slof(distance: NDArray[np.floating], radii: NDArray[np.floating], *, compat: bool = False) -> NDArray[np.float64]:
    """SLOF of points whose neighbours are known.

    Args:
        distance: d_k(x) of each point, shape [M].
        radii: d_k(o) of each of its neighbours, shape [M, k].
        compat: See the documentation of the module.
    """
    if compat:
        with np.errstate(divide="ignore", invalid="ignore"):
            return _compat_defined(_mean(_wide(distance) / radii.astype(np.float64)))
    return _mean(np.maximum(_wide(distance), _FLOOR) / np.maximum(radii.astype(np.float64), _FLOOR))


def dao(
    distance: NDArray[np.floating],
    radii: NDArray[np.floating],
    dimensions: NDArray[np.float64],
    *,
    compat: bool = False,
) -> NDArray[np.float64]:
    """DAO of points whose neighbours are known.

    Args:
        distance: d_k(x) of each point, shape [M].
        radii: d_k(o) of each of its neighbours, shape [M, k].
        dimensions: LID(o) of each of them, shape [M, k].
        compat: See the documentation of the module.
    """
    if compat:
        with np.errstate(divide="ignore", invalid="ignore"):
            return _compat_defined(_mean(dimensions * np.log(_wide(distance) / radii.astype(np.float64))))
    ratios = np.maximum(_wide(distance), _FLOOR) / np.maximum(radii.astype(np.float64), _FLOOR)
    return _mean(dimensions * np.log(ratios))


def _wide(distance: NDArray[np.floating]) -> NDArray[np.float64]:
    return distance.astype(np.float64)[:, None]


def dimension(distances: NDArray[np.float32]) -> NDArray[np.float64]:
    """LID of points whose distances to their k neighbours are known, nearest first; shape [M, k]."""
    exact = distances.astype(np.float64)
    radii = exact[:, -1:]
    ratios = np.divide(exact, radii, out=np.zeros_like(exact), where=radii >= _FLOOR)
    return 1 / np.maximum(-_mean(np.log(np.maximum(ratios, _FLOOR))), _SMALLEST_LOG)


def released_dimension(distances: NDArray[np.float32], radii: NDArray[np.float32]) -> NDArray[np.float64]:
    """LID as the released code computes it: from k distances, shape [M, k], relative to a radius, shape [M, 1]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -1 / _mean(np.log(distances.astype(np.float64) / radii.astype(np.float64) + _COMPAT_OFFSET))


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = values.mean(axis=1)
    return mean


def _compat_defined(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    defined: NDArray[np.float64] = np.nan_to_num(scores, nan=_COMPAT_UNDEFINED, posinf=_COMPAT_UNDEFINED, neginf=0.0)
    return defined
