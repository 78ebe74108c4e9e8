"""Mahalanobis distances to groups of one covariance (Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution
Samples and Adversarial Attacks, arXiv 1807.03888, section 2.1).

The covariance is shrunk as Ledoit and Wolf do (A well-conditioned estimator for large-dimensional covariance matrices, 2004), for
there may be fewer examples than features. It is stored by its largest directions and one variance for all others.
"""

from dataclasses import dataclass

import numpy as np

from unihema.errors import InputError


# Directions of the covariance that are kept.
_RANK = 64
# Of a channel, as part of the root mean square of all channels' spreads.
_LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class TiedGaussians:
    """Gaussians of groups, with one mean a group and one covariance for all.

    Args:
        means (`np.ndarray`): `[groups, D]`.
        scale (`np.ndarray`): `[D]`, by which a difference to a mean is divided first.
        vectors (`np.ndarray`): `[D, rank]`, directions of the largest variances of such differences.
        variances (`np.ndarray`): `[rank]`.
        rest (`float`): Variance in every other direction.
    """

    means: np.ndarray
    scale: np.ndarray
    vectors: np.ndarray
    variances: np.ndarray
    rest: float

    @classmethod
    def fit(cls, features: np.ndarray, groups: np.ndarray, rank: int = _RANK) -> "TiedGaussians":
        """
        Args:
            features (`np.ndarray`): `[n, D]`.
            groups (`np.ndarray`): `[n]`, the number of each one's group, from 0 without gaps.
            rank (`int`): Directions to keep.

        Raises:
            ValueError: Fewer than two features in every group: no spread to learn.
        """
        features, groups = np.asarray(features, float), np.asarray(groups, int)
        count = int(groups.max(initial=-1)) + 1
        if len(features) <= count:
            raise InputError(f"{len(features)} images in {count} groups say nothing about spread; give more images.")
        means = np.stack([features[groups == group].mean(0) for group in range(count)])
        differences = features - means[groups]
        spread = differences.std(0)
        # A channel that was silent on every image would make the least sound of another one infinitely far.
        scale = np.maximum(spread, _LEAST_SPREAD * np.sqrt((spread**2).mean())) + 1e-6
        differences /= scale
        values, vectors = np.linalg.eigh(_shrunk_covariance(differences))
        values, vectors = values[::-1], vectors[:, ::-1]
        kept = min(rank, len(values) - 1)
        return cls(means, scale, vectors[:, :kept], values[:kept], float(values[kept:].mean()))

    def distances(self, features: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """Mahalanobis distances, over the root of D so that they are near 1 inside a group.

        Args:
            features (`np.ndarray`): `[n, D]`.
            groups (`np.ndarray`, *optional*): `[n]`, the group of each.

        Returns:
            `np.ndarray`: To each group `[n, groups]`, or to the one that is given `[n]`.
        """
        features = np.asarray(features, float)
        differences = (features[:, None] - self.means if groups is None else features - self.means[groups]) / self.scale
        along = differences @ self.vectors
        beside = np.maximum((differences**2).sum(-1) - (along**2).sum(-1), 0)
        return np.sqrt(((along**2 / self.variances).sum(-1) + beside / self.rest) / len(self.scale))


def _shrunk_covariance(centred: np.ndarray) -> np.ndarray:
    """Covariance of centred rows `[n, D]`, drawn towards a multiple of the identity (Ledoit and Wolf 2004, section 3.3)."""
    number, size = centred.shape
    sample = centred.T @ centred / number
    level = np.trace(sample) / size
    spread = ((sample - level * np.eye(size)) ** 2).sum()
    error = ((centred**2).sum(1) ** 2).sum() / number**2 - (sample**2).sum() / number
    weight = min(max(error, 0.0) / spread, 1.0) if spread > 0 else 1.0
    return (1 - weight) * sample + (weight * level + 1e-6) * np.eye(size)


__all__ = ["TiedGaussians"]
