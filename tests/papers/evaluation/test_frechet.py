"""Frechet distances against closed forms and SciPy, and references in files."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusers_gas.papers.evaluation.frechet import (
    Gaussian,
    frechet_distance,
    load_reference,
    save_reference,
)


def random_gaussian(num_features: int, rank: int | None = None) -> Gaussian:
    factor = torch.randn(num_features, rank or num_features, dtype=torch.float64)
    return Gaussian(torch.randn(num_features, dtype=torch.float64), factor @ factor.T / num_features)


def random_orthogonal(num_features: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(num_features, num_features, dtype=torch.float64))[0]


def gaussian_1d(mean: float, deviation: float) -> Gaussian:
    return Gaussian(torch.tensor([mean]).double(), torch.tensor([[deviation**2]]).double())


def test_one_dimension():
    """(m_a - m_b)^2 + (s_a - s_b)^2."""
    assert frechet_distance(gaussian_1d(1.0, 2.0), gaussian_1d(-2.0, 0.5)) == pytest.approx(9 + 2.25, rel=1e-12)
    assert frechet_distance(gaussian_1d(1.0, 0.0), gaussian_1d(1.0, 3.0)) == pytest.approx(9, rel=1e-12)


def test_commuting_covariances():
    """|m_a - m_b|^2 + sum of (sqrt(l_a) - sqrt(l_b))^2 over common eigenvectors."""
    basis = random_orthogonal(6)
    a, b = torch.rand(2, 6, dtype=torch.float64)
    mean = torch.randn(6, dtype=torch.float64)
    first = Gaussian(torch.zeros(6).double(), basis * a @ basis.T)
    second = Gaussian(mean, basis * b @ basis.T)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("num_features", [2, 7, 40])
def test_against_scipy(num_features):
    a, b = random_gaussian(num_features), random_gaussian(num_features)
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_equal_distributions_have_no_distance():
    for rank in (None, 3):
        a = random_gaussian(20, rank)
        assert 0 <= frechet_distance(a, a) < 1e-6


def test_rank_deficient_covariances_are_the_limit_of_regular_ones():
    a, b = random_gaussian(10, rank=2), random_gaussian(10, rank=4)
    noise = 1e-10 * torch.eye(10, dtype=torch.float64)
    limit = frechet_distance(*(Gaussian(g.mean, g.covariance + noise) for g in (a, b)))
    assert frechet_distance(a, b) == pytest.approx(limit, abs=1e-3)
    # Orthogonal supports: nothing of the covariances is shared.
    first, second = (Gaussian(torch.zeros(2).double(), torch.diag(torch.tensor(d)).double()) for d in ([2, 0], [0, 3]))
    assert frechet_distance(first, second) == pytest.approx(5, rel=1e-12)


def test_symmetry_and_invariances():
    a, b = random_gaussian(12), random_gaussian(12)
    expected = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    rotation, shift = random_orthogonal(12), torch.randn(12, dtype=torch.float64)
    moved = (Gaussian(rotation @ g.mean + shift, rotation @ g.covariance @ rotation.T) for g in (a, b))
    assert frechet_distance(*moved) == pytest.approx(expected, rel=1e-10)
    scaled = (Gaussian(3 * g.mean, 9 * g.covariance) for g in (a, b))
    assert frechet_distance(*scaled) == pytest.approx(9 * expected, rel=1e-10)


def test_statistics_are_those_of_numpy():
    features = 5 + torch.randn(50, 4) @ torch.randn(4, 4)
    gaussian = Gaussian.of_features(features)
    np.testing.assert_allclose(gaussian.mean, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


def test_estimates_converge():
    """Samples of known Gaussians have about their distance."""
    a, b = random_gaussian(3), random_gaussian(3)
    estimates = []
    for gaussian in (a, b):
        root = torch.linalg.cholesky(gaussian.covariance)
        samples = gaussian.mean + torch.randn(20_000, 3, dtype=torch.float64) @ root.T
        estimates.append(Gaussian.of_features(samples))
    assert frechet_distance(*estimates) == pytest.approx(frechet_distance(a, b), rel=0.05)


def test_save_and_load(tmp_path):
    gaussian = Gaussian.of_features(torch.randn(10, 3))
    save_reference(gaussian, "digits", tmp_path / "statistics.npz")
    loaded, feature_extractor = load_reference(tmp_path / "statistics.npz")
    assert (
        feature_extractor == "digits"
        and torch.equal(loaded.mean, gaussian.mean)
        and torch.equal(loaded.covariance, gaussian.covariance)
    )


def test_a_reference_of_other_programs(tmp_path):
    gaussian = random_gaussian(4)
    np.savez(tmp_path / "a.npz", mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy(), further=np.zeros(3))
    loaded, feature_extractor = load_reference(tmp_path / "a.npz")
    assert (
        feature_extractor is None
        and torch.equal(loaded.mean, gaussian.mean)
        and torch.equal(loaded.covariance, gaussian.covariance)
    )


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_objects_are_refused(tmp_path):
    mark = tmp_path / "executed"
    np.savez(tmp_path / "a.npz", mu=np.array([Malicious(mark)], dtype=object), sigma=np.eye(1))
    (tmp_path / "b.npz").write_bytes(__import__("pickle").dumps(Malicious(mark)))
    for name in ("a.npz", "b.npz"):
        mark.unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"{name} is not a NumPy archive"):
            load_reference(tmp_path / name)
        assert not mark.exists()


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mean": np.zeros(2), "sigma": np.eye(2)}, "arrays 'mu' and 'sigma' .*mu is not"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"got \(2,\) and \(3, 3\)"),
        ({"mu": np.zeros((1, 2)), "sigma": np.eye(2)}, r"got \(1, 2\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "NaN"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "not a NumPy archive"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_reference(tmp_path / "a.npz")


def test_npz_that_is_none(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(2))
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("a.npy", "empty.npz"):
        with pytest.raises(ValueError, match="is not a NumPy archive"):
            load_reference(tmp_path / name)


def test_errors():
    for features in (torch.zeros(1, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"at least 2 samples, got \(\d,"):
            Gaussian.of_features(features)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            Gaussian.of_features(torch.full((4, 3), value))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Gaussian(torch.full((3,), math.nan).double(), torch.eye(3).double())
