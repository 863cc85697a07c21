"""A sampler as a table of numbers, the one rule that applies it, and the Generalized Solver that learns such a table.

Every deterministic sampler of this package is a [`SolverTable`]: the times of its states, the times that the network is told,
and the weights of one sum per step. Sampling, driving, differentiating and finite differences all apply it with [`History`].
[`GeneralizedSolver`] (GS, arXiv 2510.17699) makes a table of a few dozen learned numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from .noise_schedules import NoiseSchedule, data_prediction_weights
from .utils.tensors import FLOAT32, FLOAT64


# Keeps every factor of the time grid strictly between 0 and 1, so that the times stay distinct.
GRID_MARGIN = 1e-5

# A bound on the memory that a number of steps can ask for: a table has its square of weights.
MOST_STEPS = 1000

Weights: TypeAlias = Tensor | Sequence[Sequence[float]]
"""A row of weights for every step: plain numbers to sample with, or a tensor to differentiate."""

FORGOTTEN = torch.empty(0, **FLOAT32)


@dataclass(frozen=True)
class SolverTable:
    """The sampler `x[k+1] = w[k, 0] x[k] + w[k, 1] x[0] + sum_j w[k, 2 + j] D[j]` for steps k = 0 .. n-1.

    x[0] is the initial noise and D[j] the data (x0) prediction at step j <= k. The newest state x[k] has a weight of its own
    because a pipeline may change it between two steps (inpainting). All tensors are float64.

    Attributes:
        times (`Tensor` of shape `(n + 1,)`): Time of every state in the noise schedule, descending. The last is NaN for a
            sampler that ends at sigma = 0, a noise level that most noise schedules do not have.
        evaluation_times (`Tensor` of shape `(n,)`): Time that the network is told at every step, one that it can be told.
        weights (`Tensor` of shape `(n, n + 2)`): w. Weights of predictions that do not exist yet are 0.
    """

    times: Tensor
    evaluation_times: Tensor
    weights: Tensor

    def prediction_weights(self, noise_schedule: NoiseSchedule, prediction_type: str) -> Tensor:
        """Weights (p, q) of `D[k] = p[k] x[k] + q[k] output[k]`, shape `(n, 2)`; see [`data_prediction_weights`].

        Raises:
            ValueError: If the network's output does not determine the data at one of the steps.
        """
        pairs = data_prediction_weights(prediction_type, noise_schedule, self.times[:-1], self.evaluation_times)
        weights = torch.stack(pairs, dim=1)
        if not weights.isfinite().all():
            raise ValueError(
                f"A `prediction_type` of '{prediction_type}' does not determine the data where the noise schedule has "
                f"alpha = 0, as it has at t = {self.times[0].item()}."
            )
        return weights

    def of_outputs(self, prediction_weights: Tensor) -> "SolverTable":
        """The same sampler with the network's outputs in the place of the data predictions, and no weight on x[k].

        A step is then a sum of x[0] and the outputs alone, so that its derivatives by the weights are x[0] and the outputs.

        Args:
            prediction_weights (`Tensor` of shape `(n, 2)`): Those of this table.
        """
        n = len(self.weights)
        unit = torch.eye(n + 1, **FLOAT64)
        state, predictions = unit[0], []  # in terms of x[0], output[0], ..., output[n-1]
        rows = []
        for k, (p, q) in enumerate(prediction_weights):
            predictions.append(p * state + q * unit[k + 1])
            newest, first, *others = self.weights[k]
            state = newest * state + first * unit[0] + sum(w * D for w, D in zip(others, predictions))
            rows.append(torch.cat([state.new_zeros(1), state]))
        return SolverTable(self.times, self.evaluation_times, torch.stack(rows))


class History:
    """What a sampling remembers: its first state and its data predictions. `step` is the one rule that applies a table.

    Args:
        weights (`(n, n + 2)`): Of the table; plain numbers, or a tensor whose gradients are wanted.
        prediction_weights (`(n, 2)`): Likewise. `None` stands for the network's outputs themselves, p = 0 and q = 1.
        last_uses (`Sequence[int]`, *optional*): See [`last_uses`]; what no later step needs is then forgotten.
    """

    def __init__(
        self, weights: Weights, prediction_weights: Weights | None = None, last_uses: Sequence[int] | None = None
    ):
        self.weights, self.prediction_weights, self.last_uses = weights, prediction_weights, last_uses
        self.known: list[Tensor] = []
        """x[0], D[0], D[1], ...; an empty tensor in the place of one that no later step needs."""

    @property
    def num_steps_begun(self) -> int:
        """How many data predictions have been made."""
        return max(0, len(self.known) - 1)

    def after(self, num_steps: int) -> "History":
        """The history as it was after some steps, to go on from there in another way. Both share their tensors."""
        other = History(self.weights, self.prediction_weights, self.last_uses)
        other.known = self.known[: num_steps + 1]
        return other

    def step(self, state: Tensor, model_output: Tensor) -> Tensor:
        """The next state from the newest one and what the network returned for it."""
        self.predict(state, model_output)
        return self.update(state)

    def predict(self, state: Tensor, model_output: Tensor) -> Tensor:
        """First half of a step: the data prediction, in the precision of `state`."""
        if not self.known:
            self.known.append(state.clone())  # a pipeline may write into its tensor later on
        weights = (0.0, 1.0) if self.prediction_weights is None else self.prediction_weights[self.num_steps_begun]
        self.known.append(weighted_sum(weights, [state, model_output]))
        return self.known[-1]

    def update(self, state: Tensor) -> Tensor:
        """Second half of a step: the next state."""
        k = self.num_steps_begun - 1
        next_state = weighted_sum(self.weights[k], [state, *self.known])
        if self.last_uses is not None:
            self.known = [FORGOTTEN if last <= k else tensor for last, tensor in zip(self.last_uses, self.known)]
        return next_state


def last_uses(weights: Sequence[Sequence[float]]) -> list[int]:
    """The last step that needs x[0], D[0], D[1], ... by a table's weights.

    Every prediction is kept for one step after its own, because a decision on the order of that step may need it.
    """
    last_step = len(weights) - 1
    uses = [[k for k, row in enumerate(weights) if row[1 + column] != 0] for column in range(len(weights) + 1)]
    return [max([min(column, last_step), *steps]) for column, steps in enumerate(uses)]


def weighted_sum(weights: Tensor | Sequence[float | Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """`sum(weight * tensor)` as a new tensor in the precision of the first tensor.

    Tensors whose weight is the number 0 are not read. Weights beyond the last tensor are not used.
    """
    dtype, total = tensors[0].dtype, None
    for weight, tensor in zip(weights, tensors):
        if isinstance(weight, Tensor):
            # Devices may lack float64, also for gradients.
            term = weight.to(dtype) * tensor.to(dtype)
            total = term if total is None else total + term
        elif weight != 0:
            total = weight * tensor.to(dtype) if total is None else total.add_(tensor, alpha=weight)
    return torch.zeros_like(tensors[0]) if total is None else total


class GeneralizedSolver(nn.Module):
    """Learnable linear multistep solver of the probability-flow ODE.

    Parameters (float64), n = `num_inference_steps`; entry `[k, i]` belongs to step k and to the history item i steps back
    from the newest, and is used where `i <= min(k, order - 1)`:

    - `timestep_logits` `(n - 1,)`: time grid between the fixed ends `t_start` and `t_end`;
    - `timestep_offsets` `(n,)`: added to a step's time when the network is asked, and nowhere else;
    - `state_coefficients` `(n, order)`, `data_coefficients` `(n, order)`: corrections of the theory solver, the papers'
      `a_{i+1}_diff` and `c_{i+1}_diff`. At zero the solver is exact theory: DDIM, or DPM-Solver++ 2M or 3M.

    Args:
        num_inference_steps (`int`): Number of steps and of network evaluations, n.
        order (`int`, *optional*): Length of the history that a step may use; n by default.
        theory_order (`int`, defaults to 2): Order of the theory solver, 1 (DDIM), 2 (DPM-Solver++ 2M) or 3 (3M as
            published, which converges with order 2; see [`ExponentialIntegrator`]).
        lower_order_final (`bool`, defaults to `True`): Whether the theory solver's last step is of first order and the
            one before it at most of second.
        t_start (`float`, defaults to 1): Time of the initial noise. For some time below 1 the diffused data hardly differ
            from noise, and a few steps are better spent after that time. (In the paper always 1.)
        t_end (`float`, defaults to 1e-3): Time at which integration ends (the papers' t_eps).
        times (`Tensor` of shape `(n + 1,)`, *optional*): Initial time grid, descending from `t_start` to `t_end`; uniform
            by default. See [`initial_times`].
        parameterization (`"theory"` or `"linear_multistep"`): Whether the coefficients are corrections of the theory solver
            or the whole update; for the latter see [`initialize_linear_multistep`].

    The published initial solver is `theory_order=3, lower_order_final=False`. `provenance` is a JSON-like record of what
    trained the solver, kept in its file.
    """

    theory_orders: Tensor

    def __init__(
        self,
        num_inference_steps: int,
        order: int | None = None,
        *,
        theory_order: int = 2,
        lower_order_final: bool = True,
        t_start: float = 1.0,
        t_end: float = 1e-3,
        times: Tensor | None = None,
        parameterization: Literal["theory", "linear_multistep"] = "theory",
    ):
        super().__init__()
        n, order = num_inference_steps, num_inference_steps if order is None else order
        if not 1 <= n <= MOST_STEPS:
            raise ValueError(f"`num_inference_steps` must be from 1 to {MOST_STEPS}, got {n}.")
        if not 1 <= order <= n:
            raise ValueError(f"`order` must be between 1 and `num_inference_steps` = {n}, got {order}.")
        if theory_order not in (1, 2, 3):
            raise ValueError(f"`theory_order` (`solver_order` of a scheduler) must be 1, 2 or 3, got {theory_order}.")
        if not 0 <= t_end < t_start <= 1:
            raise ValueError(f"Times must be 0 <= `t_end` < `t_start` <= 1, got t_end = {t_end}, t_start = {t_start}.")
        if parameterization not in ("theory", "linear_multistep"):
            raise ValueError(f"`parameterization` must be 'theory' or 'linear_multistep', got '{parameterization}'.")
        t_start, t_end = float(t_start), float(t_end)
        self.num_inference_steps, self.order, self.t_start, self.t_end = n, order, t_start, t_end
        self.parameterization = parameterization
        self.provenance: dict[str, Any] = {}

        orders = torch.arange(1, n + 1, device="cpu").clamp(max=min(order, theory_order))
        if lower_order_final:
            orders = torch.minimum(orders, torch.arange(n, 0, -1, device="cpu"))
        self.register_buffer("theory_orders", orders)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, **FLOAT64))

        self.timestep_logits = parameter(n - 1)
        self.timestep_offsets = parameter(n)
        self.state_coefficients = parameter(n, order)
        self.data_coefficients = parameter(n, order)
        self.set_times(torch.linspace(t_start, t_end, n + 1, **FLOAT64) if times is None else times)

    @property
    def num_learned(self) -> int:
        """How many of the parameters' entries are used."""
        n = self.num_inference_steps
        return 2 * n - 1 + 2 * sum(min(k + 1, self.order) for k in range(n))

    def config(self) -> dict[str, Any]:
        """What, beside the tensors of `state_dict`, makes the solver; see [`from_tensors`]."""
        names = ("num_inference_steps", "order", "t_start", "t_end", "parameterization")
        return {name: getattr(self, name) for name in names}

    def content(self) -> tuple[bytes, ...]:
        """Config and parameters as bytes: equal for solvers with equal tables."""
        tensors = (tensor.detach().cpu().numpy().tobytes() for tensor in self.state_dict().values())
        return repr(self.config()).encode(), *tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **config: Any) -> "GeneralizedSolver":
        """The solver of a `state_dict` and a `config`; a `ValueError` names what is missing, extra or misshapen."""
        offsets, n = tensors.get("timestep_offsets"), config.get("num_inference_steps")
        if offsets is not None and offsets.numel() != n:
            raise ValueError(f"its record says {n} steps, tensor 'timestep_offsets' is of {offsets.numel()}")
        solver = cls(**config)
        expected = solver.state_dict()
        if tensors.keys() != expected.keys():
            raise ValueError(f"expected the tensors {sorted(expected)}, got {sorted(tensors)}")
        for name, value in tensors.items():
            if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
                raise ValueError(
                    f"tensor '{name}' should be {expected[name].dtype} of shape {tuple(expected[name].shape)}, got "
                    f"{value.dtype} of shape {tuple(value.shape)}"
                )
        limits = torch.arange(1, solver.num_inference_steps + 1, device="cpu").clamp(max=min(solver.order, 3))
        if not ((tensors["theory_orders"] >= 1) & (tensors["theory_orders"] <= limits)).all():
            raise ValueError(
                f"theory_orders should be from 1 to {limits.tolist()}, got {tensors['theory_orders'].tolist()}"
            )
        if (tensors["timestep_offsets"].abs() > 1).any():
            raise ValueError(f"timestep_offsets should be from -1 to 1, got {tensors['timestep_offsets'].tolist()}")
        solver.load_state_dict(tensors)
        return solver

    @torch.no_grad()
    def set_times(self, times: Tensor) -> None:
        """Sets `timestep_logits` so that the time grid is `times`, `(n + 1,)`, descending from `t_start` to `t_end`."""
        times = times.to(**FLOAT64)
        remaining = (self.t_start - times[1:-1].flip(0)) / (self.t_start - self.t_end)  # P_j, see `times`
        factors = remaining / torch.cat([remaining.new_ones(1), remaining[:-1]])
        logits = torch.logit((factors - GRID_MARGIN) / (1 - 2 * GRID_MARGIN))
        ends = torch.tensor([self.t_start, self.t_end], **FLOAT64)
        valid = len(times) == self.num_inference_steps + 1 and torch.allclose(times[[0, -1]], ends, rtol=0, atol=1e-9)
        if not valid or not logits.isfinite().all():
            raise ValueError(
                f"`times` must be {self.num_inference_steps + 1} numbers that descend from t_start = {self.t_start} to "
                f"t_end = {self.t_end} without (nearly) equal neighbours, got {times.tolist()}."
            )
        self.timestep_logits.copy_(logits)

    def times(self) -> Tensor:
        """Time grid `(n + 1,)`: interior times cut fractions 1 - P_j, P_j a product of sigmoids, off [t_end, t_start]."""
        factors = GRID_MARGIN + (1 - 2 * GRID_MARGIN) * torch.sigmoid(self.timestep_logits)
        ascending = self.t_end + (self.t_start - self.t_end) * (1 - torch.cumprod(factors, dim=0))
        start, end = (ascending.new_full((1,), t) for t in (self.t_start, self.t_end))
        return torch.cat([start, ascending.flip(0), end])

    @torch.no_grad()
    def with_one_more_step(self) -> "GeneralizedSolver":
        """A warm start: a solver of one step more, times and offsets distributed like these, coefficients those of the
        default theory."""
        n = self.num_inference_steps
        fractions = torch.linspace(0, n, n + 2, **FLOAT64)
        left = fractions.long().clamp(max=n - 1)
        times = self.times()
        times = torch.lerp(times[left], times[left + 1], fractions - left)
        solver = GeneralizedSolver(n + 1, t_start=self.t_start, t_end=self.t_end, times=times)
        offsets = self.timestep_offsets
        solver.timestep_offsets.copy_(
            torch.lerp(offsets[left], offsets[(left + 1).clamp(max=n - 1)], fractions - left)[:-1]
        )
        return solver

    def table(self, noise_schedule: NoiseSchedule, begin: int = 0) -> SolverTable:
        """The solver as a table for a noise schedule, differentiable in every parameter; `begin` as in `coefficients`."""
        times = self.times()
        weights = weights_of_coefficients(*self.coefficients(noise_schedule, begin))
        evaluation_times = noise_schedule.evaluation_time(times[:-1] + self.timestep_offsets)
        return SolverTable(times[begin:], evaluation_times[begin:], weights)

    def coefficients(self, noise_schedule: NoiseSchedule, begin: int = 0) -> tuple[Tensor, Tensor]:
        """The published form of the update: `x[k+1] = sum_j A[k, j] x[j] + sum_j C[k, j] D[j]`, D[j] the prediction at x[j].

        With `begin` > 0 the coefficients are those of the steps from there on (image-to-image). The history before `begin`
        does not exist. It is taken to be what first-order theory says: every earlier data prediction equals D[begin], and
        the earlier states lie on the solution through x[begin] with that prediction.

        Returns:
            `tuple[Tensor, Tensor]`: A and C, lower triangular float64 of shape `(n - begin, n - begin)`, differentiable.
        """
        times, n = self.times(), self.num_inference_steps
        integrator = ExponentialIntegrator.on_times(noise_schedule, times)
        rows = [self._step_weights(integrator, k) for k in range(n)]
        states, data = (
            torch.stack([_newest_last(row, k, n) for k, row in enumerate(weights)]) for weights in zip(*rows)
        )
        if begin == 0:
            return states, data
        alpha, sigma = noise_schedule.alpha(times), noise_schedule.sigma(times)
        # x[j] = of_state[j] x[begin] + of_data[j] D[begin] for j < begin.
        of_state = sigma[:begin] / sigma[begin]
        of_data = alpha[:begin] - of_state * alpha[begin]
        missing, missing_data = states[begin:, :begin], data[begin:, :begin]
        first = torch.eye(n - begin, **FLOAT64)[0]
        return (
            states[begin:, begin:] + torch.outer(missing @ of_state, first),
            data[begin:, begin:] + torch.outer(missing @ of_data + missing_data.sum(dim=1), first),
        )

    @torch.no_grad()
    def set_weights(self, noise_schedule: NoiseSchedule, weights: Tensor) -> None:
        """Sets the coefficients to the smallest with which the solver samples as a table does.

        Its states are the same sums of x[0] and data predictions. The weight of the newest state may be another, because that
        state is itself such a sum.

        Args:
            noise_schedule: The noise schedule.
            weights (`Tensor` of shape `(n, n + 2)`): Those of a [`SolverTable`] on the times of this solver.

        Raises:
            ValueError: If no coefficients sample so, as may be with an `order` less than n, or if they are no corrections of
                theory.
        """
        if self.parameterization != "theory":
            raise ValueError("Weights can be set where the coefficients are corrections of theory only.")
        n, integrator = self.num_inference_steps, ExponentialIntegrator.on_times(noise_schedule, self.times())
        unit = torch.eye(n + 1, **FLOAT64)
        self.state_coefficients.zero_()
        self.data_coefficients.zero_()
        known = [unit[0]]  # x[j] in terms of x[0], D[0], ..., D[n-1]
        for k, (newest, *past) in enumerate(weights.double()):
            m = min(k + 1, self.order)
            states, data = torch.stack(known[::-1][:m]), unit[1 : k + 2].flip(0)[:m]
            theory_states, theory_data = self._step_weights(integrator, k)
            corrections = torch.stack([integrator.correction_weights(k, c) for c in torch.eye(m, **FLOAT64)])
            next_state = newest * known[k] + torch.stack(past)
            missing = next_state - theory_states @ states - theory_data @ data
            columns = torch.cat([states, corrections @ data]).T
            found = torch.linalg.lstsq(columns, missing[:, None], driver="gelsd").solution[:, 0]
            tolerance = 1e-9 * max(1, next_state.abs().max().item())
            if not torch.allclose(columns @ found, missing, rtol=0, atol=tolerance):
                raise ValueError(
                    f"No coefficients of a solver of order {self.order} sample as the weights of step {k}."
                )
            self.state_coefficients[k, :m], self.data_coefficients[k, :m] = found[:m], found[m:]
            known.append(next_state)

    def _step_weights(self, integrator: "ExponentialIntegrator", k: int) -> tuple[Tensor, Tensor]:
        """Weights of past states and data predictions in step k, newest first (the published updates, GS section 3)."""
        m = min(k + 1, self.order)
        a, c = self.state_coefficients[k, :m], self.data_coefficients[k, :m]
        newest = torch.eye(m, **FLOAT64)[0]
        if self.parameterization == "linear_multistep":
            # As published: the ratio of sigmas acts twice, and both sets of coefficients multiply data predictions.
            ratio, scale = integrator.sigma_ratio[k], integrator.data_scale[k]
            return ratio**2 * newest, scale * (ratio * c + a)
        state = integrator.sigma_ratio[k] * newest + a
        return state, integrator.theory_weights(k, int(self.theory_orders[k]), m) + integrator.correction_weights(k, c)

    @torch.no_grad()
    def initialize_linear_multistep(self, noise_schedule: NoiseSchedule) -> None:
        """The published start of the `"linear_multistep"` form: c from the theory solver on the current grid, a = 0."""
        integrator = ExponentialIntegrator.on_times(noise_schedule, self.times())
        self.state_coefficients.zero_()
        self.data_coefficients.zero_()
        for k in range(self.num_inference_steps):
            m = min(k + 1, self.order)
            theory = integrator.theory_weights(k, int(self.theory_orders[k]), m)
            self.data_coefficients[k, :m] = theory / integrator.data_scale[k]


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


def _newest_last(row: Tensor, k: int, n: int) -> Tensor:
    """Step k's weights, newest first, as row k of an n by n table whose columns count from the oldest."""
    return nn.functional.pad(row.flip(0), (k + 1 - len(row), n - k - 1))


def weights_of_coefficients(states: Tensor, data: Tensor) -> Tensor:
    """Weights `(n, n + 2)` of a [`SolverTable`] from the published coefficients A and C.

    Every past state is itself a sum of x[0] and data predictions. Only the newest state keeps a weight of its own.
    """
    n = len(states)
    known = [torch.eye(n + 1, **FLOAT64)[0]]  # x[j] in terms of x[0], D[0], ..., D[n-1]
    rows = []
    for k in range(n):
        past = nn.functional.pad(data[k], (1, 0)) + sum(states[k, j] * known[j] for j in range(k))
        newest = states[k, k]
        rows.append(torch.cat([newest[None], past]))
        known.append(newest * known[k] + past)
    return torch.stack(rows)


def initial_times(
    spacing: Literal["uniform", "logsnr", "karras"],
    num_inference_steps: int,
    noise_schedule: NoiseSchedule,
    t_start: float = 1.0,
    t_end: float = 1e-3,
) -> Tensor:
    """Usual time grids, float64 `(num_inference_steps + 1,)` descending from `t_start` to `t_end`.

    `"uniform"` in t, `"logsnr"` uniform in lambda (DPM-Solver), `"karras"` uniform in (sigma / alpha)^(1/7) (EDM). The
    last two need alpha(t_start) > 0.
    """
    ramp = torch.linspace(0, 1, num_inference_steps + 1, **FLOAT64)
    ends = torch.tensor([t_start, t_end], **FLOAT64)
    if spacing == "uniform":
        return torch.lerp(ends[0], ends[1], ramp)
    lambdas = noise_schedule.lambda_(ends)
    if not lambdas.isfinite().all():
        raise ValueError(
            f"'{spacing}' spacing (`use_karras_sigmas`, `use_lu_lambdas`) needs a finite log-SNR at t = {t_start} and "
            f"t = {t_end}; use 'uniform'."
        )
    if spacing == "logsnr":
        inner = torch.lerp(lambdas[0], lambdas[1], ramp)
    elif spacing == "karras":
        roots = (-lambdas / 7).exp()
        inner = -7 * torch.lerp(roots[0], roots[1], ramp).log()
    else:
        raise ValueError(f"`spacing` must be 'uniform', 'logsnr' or 'karras', got '{spacing}'.")
    times = noise_schedule.inverse_lambda(inner)
    times[[0, -1]] = ends
    return times
