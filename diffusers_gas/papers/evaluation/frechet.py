"""Frechet distance between Gaussians fitted to features, and sums over samples from which they are fitted.

With the features of an Inception network it is the Frechet inception distance (Heusel et al., arXiv 1706.08500). torchmetrics
computes it from images; here references are files of statistics, and the sums are those of several processes.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ...schedulers.configs import METADATA_KEY
from ...utils.files import load_safetensors, save_safetensors
from ...utils.tensors import FLOAT64


class Gaussian(NamedTuple):
    """A distribution of features, in float64.

    Attributes:
        mean (`Tensor` of shape `(num_features,)`): The mean.
        covariance (`Tensor` of shape `(num_features, num_features)`): The covariance, of any rank.
    """

    mean: Tensor
    covariance: Tensor


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, 1982, equation 6).

    `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`. The eigenvalues of `S_a S_b` are those of the symmetric
    `S_a^(1/2) S_b S_a^(1/2)`.

    Raises:
        ValueError: If the numbers of features differ, or if entries are not finite.
    """
    _check(a)
    _check(b)
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"Statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared: use the same feature "
            "extractor for both."
        )
    eigenvalues, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    product = root @ b.covariance @ root
    # Eigenvalues of zero, and distances of zero, may be computed as small negative numbers.
    root_trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return max(distance.item(), 0.0)


def _check(gaussian: Gaussian) -> None:
    mean, covariance = gaussian
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            "A Gaussian has a mean of shape (num_features,) and a covariance of shape (num_features, num_features), "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}."
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("Statistics have NaN or infinite entries: a sampler diverged, or the file is damaged.")


@dataclass
class FeatureStatistics:
    """Sums over samples, from which the mean and the covariance of their features follow.

    Attributes:
        count: Number of samples.
        sum (`Tensor` of shape `(num_features,)`): Sum of the features, float64 on the CPU.
        outer_sum (`Tensor` of shape `(num_features, num_features)`): Sum of the outer products of each sample's features with
            themselves, float64 on the CPU.
    """

    count: int
    sum: Tensor
    outer_sum: Tensor

    @classmethod
    def empty(cls, num_features: int) -> "FeatureStatistics":
        """Statistics of no samples."""
        return cls.from_features(torch.empty(0, num_features, **FLOAT64))

    @classmethod
    def from_features(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of samples with features of shape `(num_samples, num_features)`.

        Raises:
            ValueError: If the shape is another, or if entries are not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"Features must have shape (num_samples, num_features), got {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError("Features have NaN or infinite entries: look for these in the images.")
        features = features.detach().cpu().double()
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of the samples of both."""
        if self.sum.shape != other.sum.shape:
            raise ValueError(f"Statistics of {len(self.sum)} and of {len(other.sum)} features cannot be added.")
        return FeatureStatistics(self.count + other.count, self.sum + other.sum, self.outer_sum + other.outer_sum)

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> "FeatureStatistics":
        """Statistics of the samples of all processes. `reduce` sums a float64 tensor over the processes."""
        total = reduce(torch.cat([torch.tensor([self.count], **FLOAT64), self.sum, self.outer_sum.flatten()])).cpu()
        count, total_sum, outer_sum = total.split([1, self.sum.numel(), self.outer_sum.numel()])
        return FeatureStatistics(round(count.item()), total_sum, outer_sum.view_as(self.outer_sum))

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance.

        Raises:
            ValueError: If there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 samples, got {self.count}.")
        mean = self.sum / self.count
        return Gaussian(mean, (self.outer_sum - self.count * mean.outer(mean)) / (self.count - 1))

    def save(self, path: str | os.PathLike, record: Mapping[str, Any]) -> None:
        """Writes a safetensors file, with a record of images and features, in JSON's types, in its metadata."""
        tensors = {"count": torch.tensor(self.count, device="cpu"), "sum": self.sum, "outer_sum": self.outer_sum}
        save_safetensors(tensors, Path(path), {METADATA_KEY: json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple["FeatureStatistics", dict[str, Any]]:
        """Statistics and record that `save` has written.

        Raises:
            ValueError: If the file has no such statistics.
        """
        try:
            tensors, metadata = load_safetensors(Path(path))
            count, total_sum, outer_sum = (tensors[name] for name in ("count", "sum", "outer_sum"))
            return cls(int(count), total_sum, outer_sum), dict(json.loads(metadata[METADATA_KEY]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold feature statistics of this package ({error}).") from error


def load_npz_reference(path: str | os.PathLike) -> Gaussian:
    """Reference statistics in the format of EDM and others: a NumPy archive with arrays `mu` and `sigma`.

    Raises:
        ValueError: If the file is not such an archive. Pickled objects in it are refused.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            arrays = [np.asarray(archive[name], dtype=np.float64) for name in ("mu", "sigma")]
    except KeyError as error:
        raise ValueError(f"{path} must have arrays 'mu' and 'sigma', it has {names}.") from error
    except (ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is not a NumPy archive with arrays 'mu' and 'sigma' ({error}).") from error
    gaussian = Gaussian(*map(torch.from_numpy, arrays))
    _check(gaussian)
    return gaussian
