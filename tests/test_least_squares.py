"""Losses as weighted least squares."""

import pytest
import torch

from diffusers_gas.least_squares import Loss


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_reweighted_least_squares_has_the_gradient_of_the_loss(kind):
    loss = Loss(kind)
    residual = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss.value(residual).sum(), residual)
    torch.testing.assert_close(2 * loss.weight(residual) * residual, gradient)


def test_features_are_compared_instead_of_states():
    loss = Loss(features=lambda x: x.mean(dim=(2, 3)))
    residual = loss.residual(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    assert residual.shape == (2, 3)
    assert torch.equal(residual, torch.ones(2, 3))


def test_an_exact_fit_does_not_get_an_infinite_weight():
    assert Loss("l1").weight(torch.zeros(2, 5)).isfinite().all()


def test_unknown_kind():
    with pytest.raises(ValueError, match="'l2', 'l1' or 'mixed', got 'l3'"):
        Loss("l3")
