"""The Generalized Solver (GS, arXiv 2510.17699): a sampler's table from a few dozen learned numbers."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .noise_schedules import NoiseSchedule
from .solver_table import MOST_STEPS, ExponentialIntegrator, SolverTable
from .utils.files import check_tensors
from .utils.tensors import FLOAT64


# Keeps every factor of the time grid strictly between 0 and 1, so that the times stay distinct.
GRID_MARGIN = 1e-5

# The times of a network that is asked span 1.
MOST_OFFSET = 1


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
        parameterization (`"theory"` or `"linear_multistep"`, defaults to `"theory"`): Whether the coefficients are corrections
            of the theory solver or the whole update, as in some published solvers.

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

    def at(self, scale: float | None = None) -> "GeneralizedSolver":
        """The solver for a guidance scale: this one, for every scale. See [`GuidedSolver.at`]."""
        return self

    @torch.no_grad()
    def clamp_offsets(self) -> None:
        """Keeps `timestep_offsets` within what a file may hold, for fits: a network that hardly depends on time leaves them undetermined."""
        self.timestep_offsets.clamp_(-MOST_OFFSET, MOST_OFFSET)

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
        check_tensors(tensors, solver.state_dict())
        limits = torch.arange(1, solver.num_inference_steps + 1, device="cpu").clamp(max=min(solver.order, 3))
        orders, offsets = tensors["theory_orders"], tensors["timestep_offsets"]
        if not ((orders >= 1) & (orders <= limits)).all():
            raise ValueError(f"theory_orders should be from 1 to {limits.tolist()}, got {orders.tolist()}")
        if (offsets.abs() > MOST_OFFSET).any():
            raise ValueError(f"timestep_offsets should be within {MOST_OFFSET} of 0, got {offsets.tolist()}")
        solver.load_state_dict(tensors)
        return solver

    @classmethod
    @torch.no_grad()
    def from_table(cls, table: SolverTable, noise_schedule: NoiseSchedule) -> "GeneralizedSolver":
        """The solver that samples as a table does, at the shift of a noise schedule. At another one it is adapted.

        Raises:
            ValueError: If the times of the table do not descend.
        """
        times = table.times
        solver = cls(len(times) - 1, t_start=times[0].item(), t_end=times[-1].item(), times=times)
        solver.timestep_offsets.copy_(table.evaluation_times - solver.times()[:-1])
        solver.set_weights(noise_schedule, table.weights)
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
        n, offsets = self.num_inference_steps, self.timestep_offsets
        columns = torch.stack([self.times(), torch.cat([offsets, offsets[-1:]])])[None]
        times, offsets = nn.functional.interpolate(columns, size=n + 2, mode="linear", align_corners=True)[0]
        solver = GeneralizedSolver(n + 1, t_start=self.t_start, t_end=self.t_end, times=times)
        solver.timestep_offsets.copy_(offsets[:-1])
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
        past_states = [unit[0]]  # x[j] in terms of x[0], D[0], ..., D[n-1]
        for k, (newest, *past) in enumerate(weights.double()):
            m = min(k + 1, self.order)
            states, data = torch.stack(past_states[::-1][:m]), unit[1 : k + 2].flip(0)[:m]
            theory_states, theory_data = self._step_weights(integrator, k)
            corrections = torch.stack([integrator.correction_weights(k, c) for c in torch.eye(m, **FLOAT64)])
            next_state = newest * past_states[k] + torch.stack(past)
            missing = next_state - theory_states @ states - theory_data @ data
            columns = torch.cat([states, corrections @ data]).T
            found = torch.linalg.lstsq(columns, missing[:, None], driver="gelsd").solution[:, 0]
            tolerance = 1e-9 * max(1, next_state.abs().max().item())
            if not torch.allclose(columns @ found, missing, rtol=0, atol=tolerance):
                raise ValueError(f"No coefficients of order {self.order} sample as the weights of step {k}.")
            self.state_coefficients[k, :m], self.data_coefficients[k, :m] = found[:m], found[m:]
            past_states.append(next_state)

    def _step_weights(self, integrator: ExponentialIntegrator, k: int) -> tuple[Tensor, Tensor]:
        """Weights of past states and data predictions in step k, newest first (the published updates, GS section 3)."""
        m = min(k + 1, self.order)
        a, c = self.state_coefficients[k, :m], self.data_coefficients[k, :m]
        newest = torch.eye(1, m, **FLOAT64)[0]
        if self.parameterization == "linear_multistep":
            # As published: the ratio of sigmas acts twice, and both sets of coefficients multiply data predictions.
            ratio, scale = integrator.sigma_ratio[k], integrator.data_scale[k]
            return ratio**2 * newest, scale * (ratio * c + a)
        state = integrator.sigma_ratio[k] * newest + a
        return state, integrator.theory_weights(k, int(self.theory_orders[k]), m) + integrator.correction_weights(k, c)


def _newest_last(row: Tensor, k: int, n: int) -> Tensor:
    """Step k's weights, newest first, as row k of an n by n table whose columns count from the oldest."""
    return nn.functional.pad(row.flip(0), (k + 1 - len(row), n - k - 1))


def weights_of_coefficients(states: Tensor, data: Tensor) -> Tensor:
    """Weights `(n, n + 2)` of a [`SolverTable`] from the published coefficients A and C.

    Every past state is itself a sum of x[0] and data predictions. Only the newest state keeps a weight of its own.
    """
    n = len(states)
    past_states = [torch.eye(n + 1, **FLOAT64)[0]]  # x[j] in terms of x[0], D[0], ..., D[n-1]
    rows = []
    for k in range(n):
        past = nn.functional.pad(data[k], (1, 0)) + states[k, :k] @ torch.stack(past_states)[:k]
        newest = states[k, k]
        rows.append(torch.cat([newest[None], past]))
        past_states.append(newest * past_states[k] + past)
    return torch.stack(rows)


def weights_of_velocities(lengths: Tensor, weights: Tensor, sigmas: Tensor) -> Tensor:
    """Weights `(n, n + 2)` of the flow-matching sampler `x[k+1] = x[k] + lengths[k] sum_j weights[k, j] v[j]`.

    Args:
        lengths (`Tensor` of shape `(n,)`): Step sizes in sigma, negative.
        weights (`Tensor` of shape `(n, n)`): Lower triangular.
        sigmas (`Tensor` of shape `(n,)`): Noise levels of the evaluations, where v[j] = (x[j] - D[j]) / sigma[j].
    """
    of_data = -lengths[:, None] * weights / sigmas
    return weights_of_coefficients(torch.eye(len(lengths), **FLOAT64) - of_data, of_data)
