"""`SDMPlan`: the noise levels of an `SDMScheduler` and the index of its first second-order step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..adaptive.solvers import (
    cosine_weights,
    linear_weights,
    multistep_table,
    single_step_table,
    step_orders,
    step_weights,
)
from ..noise_schedules import FlowMatchSchedule, NoiseSchedule, check_choice, pchip
from ..solver_table import MOST_STEPS, SolverTable
from ..utils.files import check_tensors
from ..utils.tensors import FLOAT64


Solver: TypeAlias = Literal["heun", "dpmsolver++", "dpmsolver++3m", "unipc"]
Blend: TypeAlias = Literal["step", "linear", "cosine"]

SOLVERS: tuple[Solver, ...] = get_args(Solver)


@dataclass(frozen=True, eq=False)
class SDMPlan:
    """N steps: of first order before `switch_index`, of higher order from there on, and of first order to the last level.

    With `"heun"` a second-order step takes two evaluations, one at either end (EDM, arXiv 2206.00364, algorithm 1). The others
    take one and use those before: `"dpmsolver++"` (DPM-Solver++(2M), arXiv 2211.01095, algorithm 2), `"dpmsolver++3m"` (3M as in
    Diffusers) and `"unipc"` (arXiv 2302.04867, as [`adaptive_unipc`]). A first-order step is DDIM's with all of them.

    Args:
        sigmas (`Tensor` of shape `(N + 1,)`): Noise levels sigma / alpha, float64, descending to 0, or to a level that others
            have published. For flow matching they are those before the shift, t / (1 - t). The pipeline's noise is taken to be
            that of the first.
        switch_index (`int`): From 0 (`"heun"`) or 1 (multistep solvers, which need a step before) to N - 1. With N - 1 all
            steps are of first order. A plan of one step has 0.
        solver (`"heun"`, `"dpmsolver++"`, `"dpmsolver++3m"` or `"unipc"`, defaults to `"heun"`): Kind of the steps of higher order.
        blend (`"step"`, `"linear"` or `"cosine"`, defaults to `"step"`): Share of the first-order step from the switch on: none,
            or falling to none at the last step (SDM, arXiv 2602.12624, its smooth schedules). A blend begins at the first step,
            so that its `switch_index` is 1.
        provenance: JSON-like record of how the plan was found, kept in its file.
    """

    sigmas: Tensor
    switch_index: int
    solver: Solver = "heun"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    blend: Blend = "step"

    def __post_init__(self) -> None:
        sigmas, n = self.sigmas, len(self.sigmas) - 1
        if n > MOST_STEPS:
            raise ValueError(f"A plan has at most {MOST_STEPS} steps, got {n}.")
        check_choice("solver", self.solver, Solver)
        check_choice("blend", self.blend, Blend)
        if sigmas.dtype != torch.float64 or sigmas.ndim != 1 or n < 1 or not _descend(sigmas):
            raise ValueError(f"`sigmas` must be float64 and descend to >= 0, got {sigmas.dtype} {sigmas.tolist()}.")
        first = 0 if self.solver == "heun" else min(1, n - 1)
        last = n - 1 if self.blend == "step" else min(1, n - 1)
        first = first if self.blend == "step" else last
        if not first <= self.switch_index <= last:
            raise ValueError(
                f"`switch_index` must be from {first} to {last} for {n} steps of '{self.solver}' with the blend '{self.blend}', "
                f"got {self.switch_index}."
            )

    @property
    def num_steps(self) -> int:
        """N, the number of steps."""
        return len(self.sigmas) - 1

    @property
    def num_inference_steps(self) -> int:
        """Number of network evaluations: 2 N - 1 - `switch_index` with `"heun"`, else N."""
        return len(self.evaluation_sigmas())

    @property
    def orders(self) -> list[int]:
        """Order of each of the N steps."""
        return step_orders(self.num_steps, self.switch_index, 3 if self.solver == "dpmsolver++3m" else 2)

    @property
    def weights(self) -> Tensor:
        """Weight of the first-order candidate in each step, `(N,)`, as for the solvers of `adaptive/`; 1 at the last."""
        n = self.num_steps
        weights = {
            "step": step_weights(n, self.switch_index),
            "linear": linear_weights(n),
            "cosine": cosine_weights(n),
        }
        return torch.cat([weights[self.blend][:-1], torch.ones(1, **FLOAT64)])

    def evaluation_sigmas(self) -> Tensor:
        """Noise level of every evaluation: once up to the switch, and with `"heun"` in pairs after it."""
        levels = self.sigmas[:-1]
        if self.solver != "heun":
            return levels
        repeats = 1 + (torch.arange(self.num_steps, device="cpu") > self.switch_index).long()
        return levels.repeat_interleave(repeats)

    def __eq__(self, other: object) -> bool:
        """Whether two plans sample alike. Their provenance may differ."""
        if not isinstance(other, SDMPlan):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[Any, ...]:
        return tuple(self.sigmas.tolist()), self.switch_index, self.solver, self.blend

    def times(self, noise_schedule: NoiseSchedule) -> Tensor:
        """Time of every step's start in a noise schedule, float64 of shape `(N,)`."""
        return times_of_levels(self.sigmas[:-1], noise_schedule)

    def table(self, noise_schedule: NoiseSchedule, begin: int = 0) -> SolverTable:
        """The plan as a table, with one row for every evaluation.

        With `begin` > 0 it is the table of the evaluations from there on (image-to-image). Without the evaluation before
        `begin` there is no change of the data prediction. The first step is then of first order, and at the second half of
        a Heun step the state stays where it is.
        """
        levels = self.sigmas * flow_shift(noise_schedule)
        if self.solver == "heun":
            rows = single_step_table(self.weights, levels[:-1], levels[1:])
            states, (earlier, data) = rows.weights[begin:, :2], rows.weights[begin:, 2:].tensor_split([begin], dim=1)
            data[:, 0] += earlier.sum(1)
            weights = torch.cat([states, data], dim=1)
        else:
            highest, corrected = 3 if self.solver == "dpmsolver++3m" else 2, self.solver == "unipc"
            weights = multistep_table(self.weights[begin:], levels[begin:], highest, corrected).weights
        states = torch.cat([self.evaluation_sigmas()[begin:], self.sigmas[-1:]])
        times = times_of_levels(states, noise_schedule).where(states > 0, torch.nan)
        # The rows are those of the unscaled states x / alpha, and alpha is 1 at sigma = 0.
        alphas = noise_schedule.alpha(times).nan_to_num(1.0)
        weights = weights * alphas[1:, None]
        weights[:, 0] /= alphas[:-1]
        return SolverTable(times, noise_schedule.evaluation_time(times[:-1]), weights)

    def for_evaluations(self, num_inference_steps: int, noise_schedule: NoiseSchedule) -> "SDMPlan":
        """The plan for another number of evaluations: of the same kind, the time interpolated between its steps.

        The switch stays at its share of the steps, and is nowhere if there was none. Heun's number of steps grows likewise, and
        the switch is then where the number of evaluations is met.
        """
        n = steps = num_inference_steps
        if n == self.num_inference_steps:
            return self
        if self.solver == "heun":
            steps = min(max(round(n * self.num_steps / self.num_inference_steps), n // 2 + 1), n)
            switch_index = 2 * steps - 1 - n
        else:
            later = max(0, self.switch_index - 1) / max(1, self.num_steps - 2)
            switch_index = min(1, steps - 1) + round(later * max(0, steps - 2))
        times = times_of_levels(torch.cat([self.sigmas[:-1], torch.zeros(1, **FLOAT64)]), noise_schedule)
        levels = levels_at(at_equal_shares(times, steps)[:-1], noise_schedule)
        return replace(self, sigmas=torch.cat([levels, self.sigmas[-1:]]), switch_index=switch_index, provenance={})

    def state_dict(self) -> dict[str, Tensor]:
        """The plan as tensors, beside its `config`; see [`from_tensors`]."""
        return {"sigmas": self.sigmas, "switch_index": torch.tensor(self.switch_index, device="cpu")}

    def config(self) -> dict[str, str]:
        """What, beside the tensors, makes the plan. Files from before there were blends have the solver only."""
        return {"solver": self.solver, **({} if self.blend == "step" else {"blend": self.blend})}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> "SDMPlan":
        """The plan of a `state_dict` and a `config`; a `ValueError` says what is wrong with them."""
        number = torch.zeros((), dtype=torch.int64, device="cpu")
        check_tensors(tensors, {"sigmas": tensors.get("sigmas", number), "switch_index": number})
        solver, blend = config["solver"], config.get("blend", "step")
        return cls(tensors["sigmas"], int(tensors["switch_index"]), solver, provenance, blend)


def _descend(sigmas: Tensor) -> bool:
    # Two levels that differ by rounding only would make a second-order step of rounding errors.
    descend = (sigmas[1:] < sigmas[:-1] * (1 - 1e-6)).all()
    return bool(descend) and bool(sigmas[0].isfinite()) and sigmas[-1].item() >= 0


def at_equal_shares(times: Tensor, num_steps: int) -> Tensor:
    """Times `(num_steps + 1,)` between the same ends as given ones, at equal shares of their steps, interpolated."""
    positions = torch.linspace(0, len(times) - 1, num_steps + 1, **FLOAT64)
    found = pchip(torch.arange(len(times), **FLOAT64), times, positions)
    found[[0, -1]] = times[[0, -1]]
    return found


def levels_at(t: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """Noise levels as in [`SDMPlan`], sigma / alpha before the shift, at times of a noise schedule."""
    return (-noise_schedule.lambda_(t)).exp() / flow_shift(noise_schedule)


def times_of_levels(sigmas: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """The inverse of [`levels_at`]."""
    return noise_schedule.inverse_lambda(-(sigmas * flow_shift(noise_schedule)).log())


def flow_shift(noise_schedule: NoiseSchedule) -> float:
    """The factor by which the shift of flow matching multiplies sigma / alpha; 1 for other schedules."""
    return noise_schedule.shift if isinstance(noise_schedule, FlowMatchSchedule) else 1.0


def uncalibrated_plan(
    num_inference_steps: int,
    grid: Callable[[int], Tensor],
    *,
    solver: Solver,
    tau: float = 2e-4,
    sigma_data: float = 1.0,
) -> SDMPlan:
    """The plan for a number of evaluations on given noise levels, without any measurement.

    A multistep solver's steps of second order cost no more than those of first order, and are taken from the second step on.
    Heun's cost another evaluation. The published rule takes them where the measured relative curvature of the step before
    reaches tau. Here the curvature is that of isotropic Gaussian data, see [`plan_on_levels`].

    Args:
        num_inference_steps (`int`): Number of evaluations, exactly.
        grid (`Callable`): Noise levels `(N + 1,)` of N steps.
        solver (`str`): Kind of the second-order steps, as in [`SDMPlan`].
        tau (`float`): Curvature from which Heun's steps are taken, in 1 / sigma.
        sigma_data (`float`): Standard deviation of the data.
    """
    n = num_inference_steps
    if solver != "heun":
        return plan_on_levels(grid(n), solver)

    def missed_by(plan: SDMPlan) -> int:
        return plan.switch_index - plan_on_levels(plan.sigmas, solver, tau, sigma_data).switch_index

    # N steps with the switch at k take 2 N - 1 - k evaluations. Of two plans as near the later switch has the shorter steps.
    plans = [SDMPlan(grid(steps), 2 * steps - 1 - n) for steps in range(n // 2 + 1, n + 1)]
    return min(plans, key=lambda plan: (abs(missed_by(plan)), -plan.num_steps))


def plan_on_levels(sigmas: Tensor, solver: Solver, tau: float = 2e-4, sigma_data: float = 1.0) -> SDMPlan:
    """The plan on the given noise levels `(N + 1,)` that switches by the rule of [`uncalibrated_plan`].

    The curvature of isotropic Gaussian data is sigma_data^2 / (sigma (sigma^2 + sigma_data^2)).
    """
    last = len(sigmas) - 2
    if solver != "heun":
        return SDMPlan(sigmas, min(1, last), solver)
    between = (sigmas[:-2] * sigmas[1:-1]).sqrt()
    curvature = sigma_data**2 / (between * (between**2 + sigma_data**2))
    return SDMPlan(sigmas, min(1 + int((curvature < tau).sum()), last))
