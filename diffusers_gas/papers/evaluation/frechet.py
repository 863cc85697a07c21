"""Frechet distance between Gaussians fitted to features.

With the features of an Inception network it is the Frechet inception distance (Heusel et al., arXiv 1706.08500). torchmetrics and
torch-fidelity compute it from images only; here references are also files of statistics.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ...utils.files import replacing


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A distribution of features, in float64.

    Attributes:
        mean (`Tensor` of shape `(num_features,)`): The mean.
        covariance (`Tensor` of shape `(num_features, num_features)`): The covariance, of any rank.

    Raises:
        ValueError: If shapes are others, or if entries are not finite.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                "A Gaussian has a mean of shape (num_features,) and a covariance of shape (num_features, num_features), "
                f"got {tuple(self.mean.shape)} and {tuple(self.covariance.shape)}."
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("Statistics have NaN or infinite entries: a sampler diverged, or the file is damaged.")

    @classmethod
    def of_features(cls, features: Tensor) -> "Gaussian":
        """Mean and unbiased covariance of features of shape `(num_samples, num_features)`.

        Raises:
            ValueError: If the shape is another, or if there are fewer than two samples.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"Features must be `(N, num_features)` of at least 2 samples, got {tuple(features.shape)}."
            )
        features = features.cpu().double()
        return cls(features.mean(0), torch.atleast_2d(features.T.cov()))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, 1982, equation 6).

    `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`. The eigenvalues of `S_a S_b` are those of the symmetric
    `S_a^(1/2) S_b S_a^(1/2)`.
    """
    eigenvalues, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    product = root @ b.covariance @ root
    # Eigenvalues of zero, and distances of zero, may be computed as small negative numbers.
    root_trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return max(distance.item(), 0.0)


def save_reference(gaussian: Gaussian, feature_extractor: str, path: Path) -> None:
    """Writes statistics in the format of EDM and others, a NumPy archive with arrays `mu` and `sigma`, and their features' name."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, mu=gaussian.mean, sigma=gaussian.covariance, feature_extractor=np.array(feature_extractor))


def load_reference(path: str | os.PathLike) -> tuple[Gaussian, str | None]:
    """Statistics in the format of [`save_reference`], and the name of their feature extractor if the file has it.

    Raises:
        ValueError: If the file is not such an archive. Pickled objects in it are refused.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = (torch.from_numpy(archive[name].astype(np.float64)) for name in ("mu", "sigma"))
            feature_extractor = str(archive["feature_extractor"]) if "feature_extractor" in archive else None
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is not a NumPy archive with arrays 'mu' and 'sigma' ({error}).") from error
    return Gaussian(mean, covariance), feature_extractor
