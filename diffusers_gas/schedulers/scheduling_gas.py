"""`GASScheduler`: a Generalized Solver (GS / GAS, arXiv 2510.17699) as a Diffusers scheduler."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import Tensor
from typing_extensions import Self

from ..generalized_solver import GeneralizedSolver
from ..guided_solver import GuidedSolver
from ..noise_schedules import EDMVPSchedule, FlowMatchSchedule, NoiseSchedule, initial_times
from ..solver_table import History
from ..utils.tensors import FLOAT64
from .configs import HUB_KWARGS, STEP_COUNTS, is_edm, to_python
from .scheduling_utils import GUIDANCE_ARGUMENTS, ODEScheduler, PipelineCall, RequestedSteps, pipeline_call


logger = logging.get_logger(__name__)

# The most steps of an untrained solver that end with noise. With more, that noise is its largest error.
MOST_STEPS_TO_NOISE = 25

# Start of an untrained solver of flow matching. The nearer to 1, the less second order is in its second step.
HIGHEST_FLOW_TIME = 1 - 1e-4

# Settings that a solver brings along: the config of a model's own scheduler does not have them.
SETTINGS_OF_SOLVERS = ("t_start", "t_end", "use_theory_for_untrained_steps")

# How far outside the scales of its distillation a solver is used without a warning.
GUIDANCE_TOLERANCE = 1.25

# Largest weight of the noise and the network's outputs in a state. Learned solvers stay far below it.
LARGEST_WEIGHT = 1e12


class GASScheduler(ODEScheduler):
    """Samples with learned linear multistep solvers, one for each number of steps, or with DPM-Solver++ theory.

    `set_timesteps(n)` picks the solver that was trained for n steps, each of which is one network evaluation. A scheduler
    without any trained solver (`from_config`) samples with a theory solver ([`untrained_solver`]).

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
            Noise level of the last evaluation, to which those of the theory solver are stretched, as in
            `FlowMatchEulerDiscreteScheduler`.
        sigma_data (`float`, *optional*):
            Set for networks with EDM preconditioning instead. As in Diffusers, `prediction_type` is then the sign of the
            network's output. Such networks are sampled as variance-preserving ones ([`EDMVPSchedule`]): states are
            1 / sqrt(1 + sigma^2) times EDM's, the initial noise has variance 1, and t = 1 is sigma = 152, whatever an EDM
            scheduler starts from.
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
            Whether networks are told whole times, for programs that hand them integers. Others would cut off the fraction, and
            the solver would not know.
        t_start (`float`, defaults to 1.0):
            Time of the initial noise in the theory solver; see [`GeneralizedSolver`].
        t_end (`float`, defaults to 1e-3):
            Time at which learned solvers end (the papers' t_eps), at least the first trained one, 1 / `num_train_timesteps`.
            Untrained ones at equal steps of time end without noise instead for flow matching and from 26 steps on.
        solver_order (`int`, defaults to 2), lower_order_final (`bool`, defaults to `True`):
            Order of the theory solver, and whether its last steps are of lower order. As in `DPMSolverMultistepScheduler`,
            but for any number of steps.
        use_karras_sigmas, use_lu_lambdas (`bool`, defaults to `False`):
            Time grid of the theory solver instead of uniform t: Karras', or uniform in lambda.
        use_theory_for_untrained_steps (`bool`, defaults to `False`):
            Whether a scheduler with trained solvers samples other step counts with the theory solver instead of raising an
            error.
    """

    learned_kind = "solver"

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
        edm_timestep: Literal["log", "atan"] = "log",
        variance_type: str | None = None,
        exploding_sigmas: list[float] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        round_timesteps: bool = False,
        t_start: float = 1.0,
        t_end: float = 1e-3,
        solver_order: int = 2,
        lower_order_final: bool = True,
        use_karras_sigmas: bool | None = False,
        use_lu_lambdas: bool = False,
        use_theory_for_untrained_steps: bool = False,
    ):
        super().__init__()
        if not 0 < self.config.t_start <= 1:
            raise ValueError(f"`t_start` must be more than 0 and at most 1, got {self.config.t_start}.")
        self._set_scale: float | None = None
        # The solver that depends on the scale, and the scale, of the sampling that has begun.
        self._guided: GuidedSolver | None = None
        self._scale: float | None = None
        self._in_call = self._may_change = self._warned_of_scale = self._is_usual_scale = False

    @property
    def solvers(self) -> dict[int, GeneralizedSolver | GuidedSolver]:
        """The learned solvers by their numbers of steps."""
        return self.learned

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        *,
        solver: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Loads config and learned solvers from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): The folder or repository.
            subfolder (`str`, *optional*): Where in it the scheduler lies, `"scheduler"` for that of a pipeline.
            return_unused_kwargs (`bool`, defaults to `False`): Whether to return unknown keyword arguments, too, instead of refusing them.
            solver (`str` or `os.PathLike`, *optional*): Another folder or repository, from which the learned solvers come. The
                config is then that of the first, whose scheduler may be of any class. Programs that make a scheduler from the
                name of a model are given solvers in this way.
            kwargs: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as elsewhere in Diffusers, and
                settings of the config. `revision` is that of the first repository.

        Raises:
            ValueError: If a file is damaged or contradicts the config, with the file's name in the message, if `solver` has no
                solver for this config, or if a keyword argument is no setting.
            OSError: If a repository cannot be loaded.
        """
        path = pretrained_model_name_or_path
        if solver is None:
            return super().from_pretrained(path, subfolder, return_unused_kwargs, **kwargs)
        # Hosts that find the model on their disk ask for local files. This says nothing about the solver.
        passed_on = set(HUB_KWARGS) - {"revision"} - ({"local_files_only"} if os.path.exists(path) else set())
        learned: Any = super().from_pretrained(solver, **{name: kwargs[name] for name in kwargs.keys() & passed_on})
        if not learned.solvers:
            raise ValueError(f"{solver} has no solver files: its scheduler is an untrained one.")
        config, settings = cls.load_config(path, subfolder=subfolder, return_unused_kwargs=True, **kwargs)
        config.pop(STEP_COUNTS, None)  # the solvers are those of the other
        settings = {name: learned.config[name] for name in SETTINGS_OF_SOLVERS} | settings
        loaded = cls.from_config(config, return_unused_kwargs, **settings)
        scheduler: Any = loaded[0] if return_unused_kwargs else loaded
        try:
            scheduler._check_trained_for(learned._solver_config())
        except ValueError as error:
            raise ValueError(f"The solvers in {solver} do not fit the scheduler of {path}: {error}") from error
        for learned_solver in learned.solvers.values():
            scheduler.add_solver(learned_solver)
        return loaded

    @classmethod
    def from_published(
        cls, name: str, config: Mapping[str, Any], num_inference_steps: int | Sequence[int] | None = None
    ) -> Self:
        """A scheduler with solvers that others have published, for a network whose scheduler (of any class) has this config.

        Such a solver was found for one model. For another one it may be worse than none.

        Args:
            name (`str`): One of those that `diffusers-gas list` prints.
            config (`Mapping`): `pipe.scheduler.config`. With `use_dynamic_shifting` the scheduler's is without: the noise levels are the
                published ones for every resolution.
            num_inference_steps (`int` or `Sequence[int]`, *optional*): Step counts; by default all for which there are figures.

        Raises:
            ValueError: If there is no solver of this name or for this number of steps, or it is for another noise schedule or
                prediction type.
        """
        from .published import SETTINGS, published_solver

        published = published_solver(name)
        loaded: Any = cls.from_config(config, **SETTINGS)
        published.check_config(loaded.config)
        counts = to_python(num_inference_steps)
        counts = [counts] if isinstance(counts, int) else counts
        for n in published.tables if counts is None else counts:
            solver = published.solver(n, loaded.noise_schedule())
            if solver.t_end > 0:
                loaded.register_to_config(t_end=solver.t_end)
            loaded.add_solver(solver)
        return loaded

    def _make_noise_schedule(self, mu: float | None, unshifted_timesteps: bool) -> NoiseSchedule:
        if is_edm(self.config):
            return EDMVPSchedule(self.config.sigma_data, self.config.edm_timestep)
        return super()._make_noise_schedule(mu, unshifted_timesteps)

    def add_solver(self, solver: GeneralizedSolver | GuidedSolver) -> None:
        """Puts a solver in for its step count; `solver.t_end` must be this scheduler's, or 0."""
        t_end = self._t_end(self.noise_schedule(mu=1.0))
        if min(solver.t_end, abs(solver.t_end - t_end)) > 1e-12:
            raise ValueError(f"The solver ends at t = {solver.t_end}, this scheduler at t_end = {t_end}.")
        self.solvers[solver.num_inference_steps] = solver

    def theory_solver(
        self,
        num_inference_steps: int,
        mu: float | None = None,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> GeneralizedSolver:
        """The theory solver of the config for a number of steps, from which training starts.

        `t_start` and `t_end` are by default those of the config.
        """
        noise_schedule = self.noise_schedule(mu)
        t_start = self._t_start(noise_schedule) if t_start is None else t_start
        t_end = self._t_end(noise_schedule) if t_end is None else t_end
        kind: Literal["edm", "loglinear", "uniform"]
        kind = "edm" if self.config.use_karras_sigmas else "loglinear" if self.config.use_lu_lambdas else "uniform"
        times = initial_times(kind, num_inference_steps, noise_schedule, t_start, t_end)
        times = torch.cat([noise_schedule.stretched(times[:-1], self.config.shift_terminal), times[-1:]])
        return self._theory_solver_on(times, noise_schedule)

    def untrained_solver(self, num_inference_steps: int, mu: float | None = None) -> GeneralizedSolver:
        """The solver that is followed where none is trained.

        At equal steps of time it ends without noise, as Diffusers' schedulers do, for flow matching and from 26 steps on. Fewer steps
        of variance-preserving networks come closer to their teacher if they keep the noise of `t_end`. For flow matching it starts a
        little below t = 1: there the log-SNR is infinite, and the second step would be of first order.
        """
        noise_schedule = self.noise_schedule(mu)
        if self.config.use_karras_sigmas or self.config.use_lu_lambdas:
            return self.theory_solver(num_inference_steps, mu)
        if not isinstance(noise_schedule, FlowMatchSchedule):
            many = num_inference_steps > MOST_STEPS_TO_NOISE
            return self.theory_solver(num_inference_steps, mu, t_end=0.0 if many else None)
        t_start = min(self._t_start(noise_schedule), HIGHEST_FLOW_TIME)
        return self.theory_solver(num_inference_steps, mu, t_start, t_end=0.0)

    def _theory_solver_on(self, times: Tensor, noise_schedule: NoiseSchedule) -> GeneralizedSolver:
        """The theory solver on times `(n + 1,)`. Times that end without noise, with NaN, end at this scheduler's `t_end`.

        If they go below that, and for flow matching, they end at t = 0, where the noise schedules have no noise.
        """
        *steps, end = times.tolist()
        if math.isnan(end):
            t_end = 0.0 if isinstance(noise_schedule, FlowMatchSchedule) else self._t_end(noise_schedule)
            end = t_end if steps[-1] > t_end + 1e-6 else 0.0  # lists come in float32, too
        config, times = self.config, times.new_tensor([*steps, end])
        theory = {"theory_order": config.solver_order, "lower_order_final": config.lower_order_final}
        return GeneralizedSolver(len(steps), t_start=steps[0], t_end=end, times=times, **theory)

    def _set_steps(self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: Any, device: Any) -> None:
        n = requested.count
        learned = self.solvers.get(n)
        self._choose_scale(learned)
        key = (requested, bool(self.solvers), learned and learned.content(), self._scale)
        self._begin(key, lambda: self._choose_solver(requested, noise_schedule, mu), noise_schedule, device)
        if n < 3:
            logger.warning(
                f"{n} steps are too few for a solver of this kind: expect blurred or distorted samples; 3 or more are "
                "recommended."
            )
        if learned is not None:
            self._warn_of_other_guidance(learned.provenance)

    def _choose_solver(
        self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: float | None
    ) -> GeneralizedSolver:
        if requested.count in self.solvers:
            requested.check_free("a trained solver")
            return self.solvers[requested.count].at(self._scale)
        if self.solvers and not self.config.use_theory_for_untrained_steps:
            raise ValueError(
                f"No solver for {requested.count} steps: this scheduler was trained for {sorted(self.solvers)}. Use "
                "one of these, train another, or set `use_theory_for_untrained_steps=True` in the config."
            )
        times = self._requested_times(requested, noise_schedule)
        if times is None:
            return self.untrained_solver(requested.count, mu)
        return self._theory_solver_on(times, noise_schedule)

    def set_guidance_scale(self, scale: float | None) -> None:
        """Sets the guidance scale for solvers of a range of scales, in loops of one's own and programs without pipeline calls.

        It may change between steps. In the call of a pipeline its own scale counts. Without either the solver is that of the
        scale that is usual for its pipeline, with a warning.
        """
        if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
            raise ValueError(f"A guidance scale must be a number, got {scale!r}.")
        self._set_scale = None if scale is None else float(scale)

    def _choose_scale(self, learned: GeneralizedSolver | GuidedSolver | None) -> None:
        """Finds the guidance scale of the sampling that begins, if its solver depends on it."""
        self._guided, self._scale = (learned, self._set_scale) if isinstance(learned, GuidedSolver) else (None, None)
        self._in_call = self._may_change = False
        if self._guided is None:
            return
        call = pipeline_call(self)
        if call is not None:
            found = _as_scale(call.values.get(self._guided.argument))
            self._scale = self._scale if found is None else found
            self._in_call, self._may_change = True, may_change_guidance(call, self._guided.argument)
        self._is_usual_scale = self._scale is None
        self._scale = self._within_range(self._guided.usual_scale if self._scale is None else self._scale)

    def _warn_of_other_guidance(self, provenance: Mapping[str, Any]) -> None:
        """Warns if the guidance of the calling pipeline is far from that of a solver's distillation, which its provenance records."""
        recorded: Any = provenance.get("pipeline_arguments")
        call = pipeline_call(self) if isinstance(recorded, Mapping) else None
        if call is None:
            return
        for name in GUIDANCE_ARGUMENTS:
            if self._guided is not None and name == self._guided.argument:
                continue
            scale, trained = _as_scale(call.values.get(name)), recorded.get(name)
            scales = [s for s in (trained if isinstance(trained, list) else [trained]) if isinstance(s, int | float)]
            if not scales or scale is None:
                continue
            low, high = min(scales), max(scales)
            if not low / GUIDANCE_TOLERANCE <= scale <= high * GUIDANCE_TOLERANCE:
                scales_of_training = f"{low}" if low == high else f"from {low} to {high}"
                logger.warning(
                    f"This solver was distilled with `{name}` {scales_of_training} and is used with {scale}: it may do no "
                    "better than an untrained one. Distill one for this scale, or for several (`--guidance_scale 3 5 7.5`)."
                )

    def _within_range(self, scale: float) -> float:
        """The nearest scale that the solver in use has been fitted to. The first other one is a warning."""
        assert self._guided is not None
        nearest = self._guided.nearest(scale)
        if nearest != scale and not self._warned_of_scale:
            self._warned_of_scale = True
            low, high = self._guided.scales[0], self._guided.scales[-1]
            logger.warning(
                f"This solver is for `{self._guided.argument}` from {low:g} to {high:g} and is used with {scale:g}: it samples as "
                f"for {nearest:g}. Distill one for this scale, too."
            )
        return nearest

    def _new_history(self, begin: int) -> History:
        history = super()._new_history(begin)
        if self._guided is not None:
            if self._is_usual_scale and not self._warned_of_scale:
                self._warned_of_scale = True
                used = f"`{self._guided.argument}` is not known here: the solver samples as for {self._scale:g}"
                logger.warning(f"{used}. Call `set_guidance_scale` in loops of your own and for modular pipelines.")
            self._switched = self._sampler
            history.last_uses = None  # another scale may use what this one does not
        return history

    def _before_update(self, k: int, state: Tensor, prediction: Tensor) -> None:
        """Follows a guidance scale that has changed since the last step.

        The network's times are those that were handed out. The coefficients of this step and those after it are those of the new
        scale. Rows before it are as they were, because they say of what the past states were made.
        """
        if self._guided is None:
            return
        scale = self._set_scale
        if self._in_call:
            call = pipeline_call(self) if self._may_change else None
            scale = None if call is None else _as_scale(getattr(call.pipe, f"_{self._guided.argument}", None))
        scale = self._scale if scale is None else self._within_range(scale)
        if scale == self._scale:
            return
        assert self._history is not None
        changed, solver = self._guided.at(scale), copy.deepcopy(self._switched)
        with torch.no_grad():
            for name in ("state_coefficients", "data_coefficients"):
                getattr(solver, name)[k:] = getattr(changed, name)[k:]
            begin = k + 1 - self._history.num_steps_begun
            self._history.weights = solver.table(self._current.noise_schedule, begin).weights.tolist()
        self._switched, self._scale = solver, scale

    def solver_on(
        self,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> GeneralizedSolver:
        """The theory solver on the times that others have published, to sample with (`add_solver`) or to distill further.

        Args:
            timesteps (`Sequence[float]`, *optional*): Network times, one a step.
            sigmas (`Sequence[float]`, *optional*): Noise levels instead, with the final one added: sigma / alpha, or for flow
                matching sigma after the shift.
            mu (`float`, *optional*): The shift that the list is for, with `use_dynamic_shifting`.

        Raises:
            ValueError: If the list does not descend within the noise schedule, or not exactly one of the lists is given.
        """
        noise_schedule = self.noise_schedule(mu)
        if (timesteps is None) == (sigmas is None):
            raise ValueError("Pass one of `timesteps` and `sigmas`.")
        if timesteps is not None:
            requested = RequestedSteps.of(self, None, timesteps=timesteps)
            times = self._requested_times(requested, noise_schedule)
        else:
            *levels, final_level = given = to_python(sigmas) or [0.0]
            times = noise_schedule.inverse_diffusers_sigma(torch.tensor(levels, **FLOAT64))
            times = self._checked_times(times, final_level, given, noise_schedule)
        assert times is not None
        return self._theory_solver_on(times, noise_schedule)

    def initial_solver(self, num_inference_steps: int) -> GeneralizedSolver | GuidedSolver:
        """The trained solver for a number of steps, for a distillation to start from; a `ValueError` if there is none."""
        if num_inference_steps not in self.solvers:
            raise ValueError(
                f"The scheduler to start from has solvers for {sorted(self.solvers)} steps, none for {num_inference_steps}."
            )
        return self.solvers[num_inference_steps]

    def _add_learned(self, tensors: dict[str, Any], record: dict[str, Any]) -> int:
        solver_class = GuidedSolver if "scales" in record["solver"] else GeneralizedSolver
        solver = solver_class.from_tensors(tensors, **record["solver"])
        solver.provenance = dict(record["provenance"])
        self._check_weights(solver)
        self.add_solver(solver)
        return solver.num_inference_steps

    @torch.no_grad()
    def _check_weights(self, solver: GeneralizedSolver | GuidedSolver) -> None:
        """Refuses a solver whose samples would be out of all proportion."""
        noise_schedule = self.noise_schedule(mu=1.0)
        for one in solver.knots if isinstance(solver, GuidedSolver) else [solver]:
            table = one.table(noise_schedule)
            prediction_weights = table.prediction_weights(noise_schedule, self.config.prediction_type)
            largest = table.of_outputs(prediction_weights).weights.abs().max().item()
            if not largest < LARGEST_WEIGHT:
                raise ValueError(f"its samples would be {largest:.3g} times what the network returns.")


def may_change_guidance(call: PipelineCall, argument: str) -> bool:
    """Whether a callback may change the guidance scale of the running call.

    It may where the pipeline reads its own property in every step. Others keep a number or a tensor that they have made before, and
    CogVideoX has a schedule of its own.
    """
    own_schedule = call.arguments.get("use_dynamic_cfg")
    return "callback_on_step_end" in call.arguments and argument in call.names and not own_schedule


def _as_scale(value: Any) -> float | None:
    """A guidance scale; `None` for what is not one number."""
    value = to_python(value)
    return float(value) if isinstance(value, Real) else None
