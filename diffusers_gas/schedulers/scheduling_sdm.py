"""`SDMScheduler`: adaptive order and measured time steps (SDM, arXiv 2602.12624) as a Diffusers scheduler."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import Tensor

from ..adaptive.solvers import SIGMA_TIME, CurvatureSwitch, Watch
from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import EDMSchedule, FlowMatchSchedule, NoiseSchedule, VESchedule, sigma_grid
from ..solver_table import History
from ..utils.tensors import FLOAT64
from .scheduling_gas import GASScheduler
from .scheduling_utils import FLOW_T_START, ODEScheduler, RequestedSteps
from .sdm_plan import SDMPlan, Solver, at_equal_shares, levels_at, plan_on_levels, uncalibrated_plan


logger = logging.get_logger(__name__)

# Below this many evaluations no choice of steps helps much.
FEWEST_RECOMMENDED = 5


class OnlineTimesteps(Tensor):
    """Times of a sampling whose length is decided during the sampling. NaN stands where no time is planned yet.

    Iteration and length end at the first NaN. A pipeline iterates over this tensor and sees what is filled in meanwhile.
    """

    def __new__(cls, timesteps: Tensor) -> "OnlineTimesteps":
        return timesteps.as_subclass(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnlineTimesteps":
        return type(self)(self.as_subclass(Tensor).clone())

    def __len__(self) -> int:
        return int(self.as_subclass(Tensor).isfinite().sum())

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int):  # counted from the last time that is planned
            return self.as_subclass(Tensor)[: len(self)][index]
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Tensor]:
        for timestep in self.as_subclass(Tensor).unbind():
            if timestep.isnan():
                return
            yield timestep


class SDMScheduler(ODEScheduler):
    """Samples with first-order steps while the trajectory is straight and second-order steps once it bends.

    `num_inference_steps` counts network evaluations. A plan ([`SDMPlan`]) says how they are spent: it has the noise levels
    and the index of the first step of second order. A Heun step takes two evaluations. [`diffusers_gas.calibrate`] measures
    plans on a pipeline. A scheduler without plans (`from_config`) takes steps of DPM-Solver++ 2M at equal steps of time; with
    `solver="heun"` it follows the published settings. A scheduler with plans samples other numbers of evaluations, up to a third
    more or less, as the nearest plan does, with its solver and its time grid interpolated. Sampling is deterministic, and does not
    depend on the rest of the batch unless `online` is set.

    This model inherits from [`SchedulerMixin`] and [`ConfigMixin`]. Check the superclass documentation for the generic
    methods the library implements for all schedulers such as loading and saving.

    Args:
        num_train_timesteps (`int`, defaults to 1000), beta_start (`float`, defaults to 0.0001), beta_end (`float`,
        defaults to 0.02), beta_schedule (`str`, defaults to `"linear"`), trained_betas (`list[float]`, *optional*),
        rescale_betas_zero_snr (`bool`, defaults to `False`), snr_shift_scale (`float`, defaults to 1.0):
            The variance-preserving noise schedule, as in Diffusers' other schedulers (the last one CogVideoX').
        prediction_type (`"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`, defaults to `"epsilon"`):
            What the network predicts.
        use_flow_sigmas (`bool`, defaults to `False`), flow_shift (`float`, defaults to 1.0), use_dynamic_shifting
        (`bool`, defaults to `False`), time_shift_type (`"exponential"` or `"linear"`, defaults to `"exponential"`):
            Flow matching instead, its shift, and whether pipelines pass the shift as `mu`.
        invert_sigmas (`bool`, defaults to `False`):
            Whether the network's times run backwards and it predicts data - noise, as in `FlowMatchEulerDiscreteScheduler`
            (Mochi).
        shift_terminal (`float`, *optional*):
            Noise level of the last evaluation, to which those of an uncalibrated plan are stretched, as in
            `FlowMatchEulerDiscreteScheduler`.
        sigma_data (`float`, *optional*), sigma_min (`float`, *optional*), sigma_max (`float`, *optional*), rho (`float`,
        defaults to 7.0):
            With `sigma_data` EDM preconditioning instead, as in `EDMEulerScheduler`, by default from sigma = 80 to 0.002. For
            other networks the limits have no meaning here. `rho` is the exponent of Karras' noise levels, which uncalibrated
            plans of EDM networks have, and those with `"heun"`.
        edm_timestep (`"log"` or `"atan"`, defaults to `"log"`):
            What EDM networks are told, log(sigma) / 4 or atan(sigma) in quarter turns (Stable Audio).
        variance_type (`"learned"` or `"learned_range"`, *optional*):
            Set for networks whose second half of the output channels is a variance. These channels are dropped.
        exploding_sigmas (`list[float]`, *optional*):
            Lowest and highest noise level of pipelines whose states are data + sigma noise, and which precondition their
            networks themselves (Cosmos Predict 2).
        thresholding (`bool`, defaults to `False`), dynamic_thresholding_ratio (`float`, defaults to 0.995), sample_max_value
        (`float`, defaults to 1.0):
            Dynamic thresholding of data predictions, as in Diffusers (DeepFloyd IF); for pixels only.
        round_timesteps (`bool`, defaults to `False`):
            Whether networks are told whole times, for programs that hand them integers.
        t_end (`float`, defaults to 1e-3):
            Time of the last evaluation, at least the first trained one, 1 / `num_train_timesteps`; EDM networks have
            `sigma_min`. A first-order step then leads to sigma = 0.
        solver (`"dpmsolver++"`, `"dpmsolver++3m"`, `"unipc"` or `"heun"`, defaults to `"dpmsolver++"`):
            Kind of the steps of higher order in uncalibrated and online sampling: those of DPM-Solver++ 2M or 3M or of UniPC with
            one evaluation each, at equal steps of time, or the published settings, which are for 18 evaluations and more:
            Heun's steps of two evaluations on Karras' noise levels (for flow matching at equal steps of time).
        tau (`float`, defaults to 2e-4):
            Relative curvature, in 1 / sigma, from which Heun's steps of uncalibrated sampling, and all steps of online sampling,
            are of second order.
        online (`bool`, defaults to `False`):
            Decide during sampling, by the mean curvature of the batch, from which step on steps are of second order. The
            noise levels are those of the plan, or the usual ones. With `"heun"` fewer than `num_inference_steps` evaluations
            may be spent; afterwards `scheduler.num_inference_steps` is their number.
    """

    learned_kind = "plan"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        edm_timestep: Literal["log", "atan"] = "log",
        variance_type: str | None = None,
        exploding_sigmas: list[float] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        round_timesteps: bool = False,
        t_end: float = 1e-3,
        solver: Solver = "dpmsolver++",
        tau: float = 2e-4,
        online: bool = False,
    ):
        super().__init__()
        tau, rho = self.config.tau, self.config.rho
        if not tau > 0:
            raise ValueError(f"`tau` must be positive, got {tau}; with a tiny one steps are of second order at once.")
        if not 0.1 <= rho <= 100:
            raise ValueError(f"`rho` must be from 0.1 to 100, got {rho}.")
        self._watch: Watch | None = None
        self._interpolated: set[int] = set()

    @property
    def plans(self) -> dict[int, SDMPlan]:
        """The calibrated plans by their numbers of evaluations."""
        return self.learned

    def add_plan(self, plan: SDMPlan) -> None:
        """Puts a plan in for its number of evaluations."""
        self.plans[plan.num_inference_steps] = plan

    @property
    def init_noise_sigma(self) -> float:
        """The factor by which pipelines multiply unit noise. For EDM networks it is that of Diffusers' EDM schedulers."""
        noise_schedule = self.noise_schedule(mu=1.0)
        if isinstance(noise_schedule, EDMSchedule):
            return math.hypot(noise_schedule.sigma_max, 1)
        return super().init_noise_sigma

    def sigma_range(self, noise_schedule: NoiseSchedule) -> tuple[float, float]:
        """Lowest and highest sigma / alpha, before a flow shift, at which the network may be evaluated."""
        if isinstance(noise_schedule, VESchedule):
            return noise_schedule.sigma_min, noise_schedule.sigma_max
        high = FLOW_T_START if isinstance(noise_schedule, FlowMatchSchedule) else self._t_start(noise_schedule)
        ends = torch.tensor([self._t_end(noise_schedule), high], **FLOAT64)
        low, high = levels_at(ends, noise_schedule).tolist()
        return low, high

    def usual_sigmas(self, num_steps: int, noise_schedule: NoiseSchedule) -> Tensor:
        """Noise levels of an uncalibrated plan, `(num_steps + 1,)`: at equal steps of time, or those of Karras."""
        if isinstance(noise_schedule, FlowMatchSchedule):
            times = torch.linspace(FLOW_T_START, 0, num_steps + 1, **FLOAT64)[:-1]
            times = noise_schedule.stretched(times, self.config.shift_terminal)
            levels = times / (1 - times)
        elif self.config.solver == "heun" or isinstance(noise_schedule, VESchedule):
            low, high = self.sigma_range(noise_schedule)
            levels = torch.tensor([high], **FLOAT64)
            if num_steps > 1:
                levels = sigma_grid(num_steps, low, high, rho=self.config.rho)
        else:
            times = torch.linspace(self._t_start(noise_schedule), 0, num_steps + 1, **FLOAT64)
            levels = levels_at(times[:-1], noise_schedule)
        return torch.cat([levels, torch.zeros(1, **FLOAT64)])

    def plan_for(self, num_inference_steps: int, mu: float | None = None) -> SDMPlan:
        """The plan that is followed for a number of evaluations.

        Without a calibrated one it is the nearest, interpolated, if that has at most a third more or less. Otherwise it is the
        uncalibrated plan of the config: what is right for 10 evaluations, such as a later start, is wrong for 20.
        """
        n, noise_schedule = num_inference_steps, self.noise_schedule(mu)
        near = self.near_plan(n)
        if near is not None:
            return near.for_evaluations(n, noise_schedule)
        settings = {"tau": self.config.tau, "sigma_data": self.config.sigma_data or 1.0}
        grid = partial(self.usual_sigmas, noise_schedule=noise_schedule)
        return uncalibrated_plan(n, grid, solver=self.config.solver, **settings)

    def near_plan(self, num_inference_steps: int) -> SDMPlan | None:
        """The plan whose number of evaluations is nearest by ratio, if that is at most 4 / 3."""
        n = num_inference_steps
        near = [count for count in self.plans if 3 * max(count, n) <= 4 * min(count, n)]
        nearest = min(near, key=lambda count: max(count, n) / min(count, n), default=None)
        return None if nearest is None else self.plans[nearest]

    def initial_solver(self, num_inference_steps: int) -> GeneralizedSolver:
        """An initial solver for distillation with SDM's time steps: those of [`plan_for`]."""
        # The solver's times are those of the scheduler that takes it; they do not depend on the resolution's shift.
        noise_schedule = GASScheduler.from_config(dict(self.config)).noise_schedule(mu=1.0)
        plan = self.plan_for(num_inference_steps, mu=1.0)
        times, t_end = plan.times(noise_schedule), self._t_end(noise_schedule)
        times = torch.cat([times[times > t_end * (1 + 1e-6)], times.new_tensor([t_end])])
        times = at_equal_shares(times, num_inference_steps)
        return GeneralizedSolver(num_inference_steps, t_start=times[0].item(), t_end=t_end, times=times)

    def _set_steps(self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: Any, device: Any) -> None:
        n = requested.count
        key = (requested, self.plans.get(n) or tuple(self.plans.values()))
        self._begin(key, lambda: self._choose_plan(requested, noise_schedule, mu), noise_schedule, device)
        if self.plans and n not in self.plans and not requested.must_be_followed and n not in self._interpolated:
            self._interpolated.add(n)
            instead = "The nearest one is interpolated" if self.near_plan(n) else "The uncalibrated plan is used"
            logger.warning(
                f"No plan for {n} evaluations: this scheduler was calibrated for {sorted(self.plans)}. {instead}; "
                "`diffusers_gas.calibrate` finds a better one."
            )
        if n < FEWEST_RECOMMENDED and n not in self.plans:
            logger.warning(
                f"{n} evaluations are too few for SDM without a plan for them: expect blurred samples. Use "
                f"{FEWEST_RECOMMENDED} or more, `diffusers_gas.calibrate`, or a distilled solver (`GASScheduler`)."
            )
        if self.config.online:
            steps = self._sampler.num_steps
            heun = self._sampler.solver == "heun"
            # Never more evaluations than asked for. A list has the levels of steps.
            most = 2 * steps - 2 if heun and requested.must_be_followed else n
            self._watch = Watch(CurvatureSwitch(self.config.tau), max(1, 2 * steps - 1 - most) if heun else 1)
            missing = self.timesteps.new_full((most - len(self.timesteps),), torch.nan)
            self.timesteps = self._entries = OnlineTimesteps(torch.cat([self.timesteps, missing]))

    def _choose_plan(self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: float | None) -> SDMPlan:
        n, solver = requested.count, self.config.solver
        if n in self.plans:
            requested.check_free("a calibrated plan")
        if n not in self.plans and requested.must_be_followed:
            levels = self._requested_levels(requested, noise_schedule)
            plan = plan_on_levels(levels, solver, self.config.tau, self.config.sigma_data or 1.0)
        elif self.config.online and not self.plans and solver == "heun":
            # With the earliest switch, at step 1, N steps of Heun's take 2 N - 2 evaluations.
            plan = plan_on_levels(self.usual_sigmas(n // 2 + 1, noise_schedule), solver)
        else:
            plan = self.plan_for(n, mu)
        # Online sampling begins with a plan of first order.
        return SDMPlan(plan.sigmas, plan.num_steps - 1, plan.solver) if self.config.online else plan

    def _requested_levels(self, requested: RequestedSteps, noise_schedule: NoiseSchedule) -> Tensor:
        """Noise levels of a plan, `(n + 1,)`, from the lists of `set_timesteps`. The last is 0, or the list's own."""
        times = self._requested_times(requested, noise_schedule)
        assert times is not None
        if isinstance(noise_schedule, FlowMatchSchedule):
            times = times.clamp(max=FLOW_T_START)
        times, to_data = times[~times.isnan()], times.isnan()
        levels = levels_at(times, noise_schedule)
        first = levels[0].item()
        highest = noise_schedule.sigma_max if isinstance(noise_schedule, VESchedule) else first
        if not math.isclose(first, highest, rel_tol=1e-2):
            raise ValueError(f"`sigmas` must begin at the pipeline's initial noise, {highest}, got {first:.4g}.")
        return torch.zeros(len(to_data), **FLOAT64).masked_scatter(~to_data, levels)

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._check_begin(begin_index)
        super().set_begin_index(begin_index)

    def _new_history(self, begin: int) -> History:
        self._check_begin(begin)
        return super()._new_history(begin)

    def _start_step(self, timestep: float | Tensor) -> int:
        # A loop over a copy of `timesteps` would not see the times that are decided meanwhile.
        undecided = self.config.online and self._step_index is None and self._sampler.solver == "heun"
        if undecided and not self._is_entry(timestep):
            raise ValueError(
                "With `online=True` and Heun's steps the times are decided during sampling: loop over `scheduler.timesteps` itself "
                "instead of a copy, or set `online=False`."
            )
        return super()._start_step(timestep)

    def _check_begin(self, begin: int) -> None:
        if begin > 0 and self.config.online:
            raise ValueError(
                "Sampling cannot start in the middle with `online=True`: the number of evaluations is not known. Set "
                "`online=False` for image-to-image."
            )

    def _before_update(self, k: int, state: Tensor, prediction: Tensor) -> None:
        """Online: steps are of second order from this one on if the curvature over the step before has reached tau.

        A Heun step's first evaluation leads to the Euler point, as a first-order step does, so that the decision comes in
        time for both.
        """
        if not self.config.online or self._watch is None or self._watch.switch_index is not None:
            return
        alpha, sigma = self._current.alphas[k], self._current.noise_levels[k]
        if not self._watch.decides(k, SIGMA_TIME.point(state / alpha, sigma / alpha, prediction)):
            return
        assert self._history is not None
        terms, timesteps = self._history.terms, self.timesteps
        self._sampler = SDMPlan(self._sampler.sigmas, k, self._sampler.solver)
        self._steps = self._numbers(self._current.noise_schedule)
        self._steps_key = None  # the next sampling begins with a plan of first order again
        self._history = self._steps.history()
        self._history.terms = terms
        self._publish(self._steps, timesteps.device)
        # The pipeline iterates over this tensor.
        timesteps[: len(self.timesteps)] = self.timesteps
        self.timesteps = self._entries = timesteps

    def _add_learned(self, tensors: dict[str, Any], record: dict[str, Any]) -> int:
        plan = SDMPlan.from_tensors(tensors, record["plan"], dict(record["provenance"]))
        self._check_levels(plan)
        self.add_plan(plan)
        return plan.num_inference_steps

    def _check_levels(self, plan: SDMPlan) -> None:
        """Refuses a plan whose noise levels are not those of this config.

        For variance-exploding states the first level must be that of the pipeline's initial noise.
        """
        noise_schedule = self.noise_schedule(mu=1.0)
        low, high = self.sigma_range(noise_schedule)
        first, last = plan.sigmas[0].item(), plan.sigmas[-2].item()
        exploding = isinstance(noise_schedule, VESchedule)
        # Schedules go on a little way beyond their ends.
        if not (low / 2 <= last and first <= high * 2) or (exploding and not math.isclose(first, high, rel_tol=1e-2)):
            raise ValueError(
                f"its noise levels go from {first:.4g} to {last:.4g}, those of this scheduler from {high:.4g} to {low:.4g}."
            )
