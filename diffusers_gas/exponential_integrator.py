"""The theory solvers DDIM and DPM-Solver++, as weights of data predictions."""

import torch
from torch import Tensor, nn

from .noise_schedules import NoiseSchedule
from .utils.tensors import FLOAT64


class ExponentialIntegrator:
    """Exponential integrators for every step from t_k to t_{k+1} (DPM-Solver++, arXiv 2211.01095).

    The third order is the published 3M. It gives the second difference half of its weight in Taylor's formula, and so
    converges with order 2 and a smaller constant than 2M.

    History items are counted from the newest. Step sizes appear as inverse ratios. Where alpha = 0 puts the oldest lambda at
    -inf, such a ratio is 0 and the step falls to a lower order, its limit, without NaN. Where sigma = 0 puts the last lambda
    at +inf, no higher order exists: the theory is of first order, and the differences are not scaled by the step size.

    Args:
        alpha, sigma, lambdas (`Tensor` of shape `(n + 1,)`): The noise schedule at the states, lambda = log(alpha / sigma).
    """

    def __init__(self, alpha: Tensor, sigma: Tensor, lambdas: Tensor):
        self.lambdas, self.alpha_next = lambdas, alpha[1:]
        self.h = self.lambdas[1:] - self.lambdas[:-1]
        self.sigma_ratio = sigma[1:] / sigma[:-1]
        self.data_scale = self.alpha_next * -torch.expm1(-self.h)  # -alpha_{k+1} phi_1(h), the first-order weight

    @classmethod
    def on_times(cls, noise_schedule: NoiseSchedule, times: Tensor) -> "ExponentialIntegrator":
        return cls(noise_schedule.alpha(times), noise_schedule.sigma(times), noise_schedule.lambda_(times))

    def differences(self, k: int, m: int) -> tuple[Tensor, Tensor]:
        """First and second divided differences at the newest of m >= 2 data predictions, as weights `(m,)` of them."""
        unit = torch.eye(m, **FLOAT64)
        newest_gap = self.lambdas[k] - self.lambdas[k - 1]
        first, h = unit[0] - unit[1], newest_gap
        if self.h[k].isfinite():
            h = self.h[k]
            first = h / newest_gap * first
        if m == 2:
            return first, torch.zeros(m, **FLOAT64)
        older = h / (self.lambdas[k - 1] - self.lambdas[k - 2]) * (unit[1] - unit[2])
        second = h / (self.lambdas[k] - self.lambdas[k - 2]) * (first - older)
        return first + newest_gap / h * second, second

    def theory_weights(self, k: int, order: int, m: int) -> Tensor:
        """Weights `(m,)` of the data predictions in DPM-Solver++ of an order <= m."""
        newest = torch.eye(m, **FLOAT64)[0]
        if order == 1 or not self.h[k].isfinite():
            return self.data_scale[k] * newest
        if order == 2:
            difference, _ = self.differences(k, 2)
            return self.data_scale[k] * (newest + nn.functional.pad(difference, (0, m - 2)) / 2)
        h = self.h[k]
        phi_2 = torch.expm1(-h) / h + 1
        phi_3 = phi_2 / h - 0.5
        first, second = self.differences(k, m)
        return self.data_scale[k] * newest + self.alpha_next[k] * (phi_2 * first - phi_3 * second)

    def correction_weights(self, k: int, c: Tensor) -> Tensor:
        """Weights `(m,)` of the data predictions that the coefficients c `(m,)` add, with the published signs.

        c_1 to c_3 act on the value and the divided differences, later coefficients on single predictions.
        """
        m = len(c)
        weights = torch.cat([-c[:1], torch.zeros(min(m, 3) - 1, **FLOAT64), c[3:]])
        if m == 1:
            return weights
        first, second = self.differences(k, m)
        return weights - c[1] * first if m == 2 else weights + c[1] * first - c[2] * second
