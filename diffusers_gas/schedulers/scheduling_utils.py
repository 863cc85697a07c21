"""What the schedulers of this package share: what a pipeline asks them for, position in the schedule, the step, noising."""

import inspect
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging
from torch import Tensor
from typing_extensions import Self

from ..noise_schedules import EDMVPSchedule, FlowMatchSchedule, NoiseSchedule, VPDiscreteSchedule
from ..solver_table import History, StepNumbers, weighted_sum
from ..utils.diffusers_hooks import DEFAULT_VALUES, KarrasDiffusionSchedulers
from ..utils.tensors import FLOAT32, FLOAT64
from .configs import (
    NOISE_SCHEDULE_SETTINGS,
    SOLVER_SETTINGS,
    STEP_COUNTS,
    SolverSavingMixin,
    check_settings,
    check_spelling,
    current_settings,
    is_edm,
    noise_schedule_from_config,
    set_later,
    split_config,
    to_python,
    translate_config,
    without_earlier_limits,
)


logger = logging.get_logger(__name__)

# Flow matching begins at infinite sigma / alpha. Where that must be finite, the first time is this one, practically noise.
FLOW_T_START = 0.999

# The names of the shift of flow matching. The second is that of Diffusers' flow-matching schedulers.
SHIFT_NAMES = ("flow_shift", "shift")

# Noise schedules that a scheduler keeps, one for each resolution's `mu`.
MOST_NOISE_SCHEDULES = 16

# Lists of flow matching that begin below this noise level do not begin at noise. Pipelines' own lists begin at 1.
NOISE_LEVEL_OF_NOISE = 0.99

# Names of the argument in Diffusers' pipelines. It has one value for all samples of a call.
GUIDANCE_ARGUMENTS = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "image_guidance_scale")

# Classes whose configs need no translation.
OUR_CLASSES = ("GASScheduler", "SDMScheduler")

# Pipelines that use their schedulers in a way of their own.
_COSMOS_1 = "it lets its scheduler precondition the network, and steps it twice for every evaluation"
REFUSED_PIPELINES = {
    "CosmosTextToWorldPipeline": _COSMOS_1,
    "CosmosVideoToWorldPipeline": _COSMOS_1,
    **dict.fromkeys(
        ("AnyFlowPipeline", "AnyFlowFARPipeline"), "its network predicts the end of a trajectory, not its direction"
    ),
    "StableDiffusionLatentUpscalePipeline": "it preconditions its network itself, for the states of Euler's method",
    "LTXI2VLongMultiPromptPipeline": "it leaves out a scheduler's last step",
    **dict.fromkeys(("WuerstchenDecoderPipeline", "WuerstchenPriorPipeline"), "it leaves out a scheduler's last step"),
    "RePaintPipeline": "it goes back and forth between noise levels",
    "KandinskyImg2ImgPipeline": "it adds noise by itself, at whole timesteps only",
}
# Arguments of pipelines' calls with which they do so.
REFUSED_ARGUMENTS = {
    ("ChronoEditPipeline", "enable_temporal_reasoning"): "it cuts frames out of its scheduler's history"
}

# The code of every function that is decorated with `torch.no_grad()` or `torch.inference_mode()`. It calls `func` with `args` and
# `kwargs`.
_NO_GRAD_CODE = torch.no_grad()(lambda: None).__code__


class PipelineCall(NamedTuple):
    """A call of a pipeline that is running.

    Attributes:
        pipe: The pipeline.
        arguments: What it was given, by name, without `None`.
        defaults: What it uses for the parameters that it was not given.
        names: The attributes and globals that its code reads.
    """

    pipe: DiffusionPipeline
    arguments: dict[str, Any]
    defaults: dict[str, Any]
    names: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """What it uses for every parameter."""
        return self.defaults | self.arguments


def pipeline_call(scheduler: SchedulerMixin) -> PipelineCall | None:
    """The innermost running call of a pipeline that has this scheduler or makes copies of it; `None` outside of calls.

    A pipeline may replace its arguments before it passes them on, and may call another, or the class that it extends. What was
    passed is known to the decorator `torch.no_grad()` of every `__call__`, and is read there. The local variables of the
    pipeline itself are not touched: Python would keep what the pipeline deletes of them.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _NO_GRAD_CODE:
            function, args, kwargs = (frame.f_locals[name] for name in ("func", "args", "kwargs"))
            pipe = args[0] if args else None
            is_call = isinstance(pipe, DiffusionPipeline) and getattr(function, "__name__", "") == "__call__"
            if is_call and any(isinstance(value, type(scheduler)) for value in vars(pipe).values()):
                signature = inspect.signature(function)
                passed = {**signature.bind(*args, **kwargs).arguments, **kwargs}
                default = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
                given = {name: value for name, value in passed.items() if value is not None}
                names = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())
                return PipelineCall(pipe, given, {name: default[name] for name in default.keys() - passed}, names)
        frame = frame.f_back
    return None


@dataclass(frozen=True)
class RequestedSteps:
    """A number of steps, and the lists that came with it.

    Most flow-matching pipelines pass a list of noise levels to every scheduler. It is their own way to say how many steps are
    meant, unless the user passed a list to the pipeline.

    Attributes:
        count: Number of steps.
        sigmas: Noise levels as Diffusers pipelines pass them: for flow matching one a step, before the shift; otherwise
            sigma / alpha with the final one added. `None` for no list, and for one of `timesteps`. A list of one a step
            is without its end, if it names that.
        timesteps: Network times, if they were passed without noise levels.
        unshifted_timesteps: Whether the network is told noise levels before the shift. Pipelines of such networks pass both
            lists (CogView4).
        chosen: Whether a user chose the list.
    """

    count: int
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    unshifted_timesteps: bool = False
    chosen: bool = False

    @classmethod
    def of(
        cls,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Self:
        """What the arguments of `set_timesteps` ask a scheduler of this package for.

        Raises:
            ValueError: If they contradict each other or ask for no step.
        """
        call, config = pipeline_call(scheduler), current_settings(scheduler.config, scheduler.config)
        if call is not None:
            _check_call(call)
        lists = ("sigmas", "timesteps")
        passed = None if call is None else {name: call.arguments[name] for name in lists if name in call.arguments}
        if passed and sigmas is None and timesteps is None:
            # The pipeline dropped the user's list, as Flux does for configs with `use_flow_sigmas`.
            num_inference_steps, sigmas, timesteps = None, passed.get("sigmas"), passed.get("timesteps")
        with_final = not config["use_flow_sigmas"] and config["exploding_sigmas"] is None
        last_timestep = config["num_train_timesteps"] if config["invert_sigmas"] else 0
        levels = _as_numbers(sigmas, end=None if with_final else 0)
        times = _as_numbers(timesteps, end=None if with_final else last_timestep)
        both = False
        if levels is not None and times is not None:
            # The same, but for rounding to one of 1000 timesteps.
            same = np.asarray(times) / config["num_train_timesteps"]
            if len(levels) != len(same) or not np.allclose(levels, same, rtol=0, atol=1e-3):
                raise ValueError("Pass only one of `sigmas` and `timesteps`: they are not the same noise levels.")
            times, both = None, True
        if times is not None:
            count = len(times)
        elif levels is not None:
            count = len(levels) - with_final
        elif num_inference_steps is not None:
            count = int(num_inference_steps)  # by a tensor no solver would be found
            if count != num_inference_steps:
                raise ValueError(f"`num_inference_steps` must be a whole number, got {num_inference_steps!r}.")
        else:
            raise ValueError("Pass a number of steps, `num_inference_steps`, or a list of noise levels, `sigmas`.")
        if count < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {count}.")
        if num_inference_steps not in (None, count):
            given = list(times or levels or ())
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but {given} are {count} steps.")
        # Outside of pipelines (loops of one's own, modular pipelines) the values must tell.
        chosen = bool(passed) if passed is not None else times is not None or not _evenly_spaced(levels)
        return cls(count, levels, times, both, chosen)

    @property
    def from_noise(self) -> bool:
        """Whether a list of flow matching begins at noise, as far as it says."""
        return self.sigmas is None or max(self.sigmas) >= NOISE_LEVEL_OF_NOISE

    @property
    def must_be_followed(self) -> bool:
        """Whether a list says more than how many steps are meant."""
        return self.chosen or not self.from_noise

    def check_free(self, owner: str) -> None:
        """Raises a `ValueError` if these steps are not those of a solver or plan that has times of its own.

        Args:
            owner: What the times belong to, for the message.
        """
        if self.chosen:
            raise ValueError(
                f"`timesteps` and `sigmas` cannot be chosen for {owner}, which has times of its own. Pass only "
                "`num_inference_steps`, or use a scheduler made with `from_config`."
            )
        self.check_from_noise(owner)

    def check_from_noise(self, owner: str) -> None:
        """Raises a `ValueError` if a pipeline's list of noise levels begins in the middle of the schedule."""
        if not self.from_noise:
            raise ValueError(
                f"The pipeline starts at noise level {max(self.sigmas or ()):.4g} by a list of `sigmas`. {owner.capitalize()} starts at "
                "noise. Use a scheduler made with `from_config`, which follows the list."
            )


def _check_call(call: PipelineCall) -> None:
    """Raises a `ValueError` for a pipeline, or an argument of one, that needs a scheduler of Diffusers."""
    names = [base.__name__ for base in type(call.pipe).__mro__]
    for name in REFUSED_PIPELINES.keys() & names:
        raise ValueError(f"{name} works with its own scheduler only: {REFUSED_PIPELINES[name]}.")
    for (name, argument), reason in REFUSED_ARGUMENTS.items():
        if name in names and call.arguments.get(argument):
            raise ValueError(f"With `{argument}` {name} works with its own scheduler only: {reason}.")


def _as_numbers(values: Sequence[float] | None, end: float | None) -> tuple[float, ...] | None:
    """The numbers of a list. If it has one a step, the end, where nothing is left to do, is no step."""
    numbers = None if values is None else tuple(float(value) for value in values)
    return numbers[:-1] if numbers is not None and len(numbers) > 1 and numbers[-1] == end else numbers


def _evenly_spaced(sigmas: tuple[float, ...] | None) -> bool:
    """Whether noise levels descend evenly, but for rounding to a timestep, and so only say how many steps are meant."""
    if sigmas is None:
        return True
    steps = np.diff(sigmas)
    atol = 2e-3 if sigmas[0] <= 1 else 1e-3 / len(sigmas)
    return bool((steps < 0).all()) and np.allclose(np.diff(steps), 0, atol=atol)


class ODEScheduler(SolverSavingMixin):
    """Base of schedulers that integrate the probability-flow ODE on times of their own.

    A subclass registers the config names that [`noise_schedule_from_config`] reads. Its `_set_steps` tells `_begin` what makes the
    [`SolverTable`].

    States are variance preserving, of flow matching or, with `exploding_sigmas`, variance exploding. Networks take them as they
    are. `scale_model_input` scales those of networks with EDM preconditioning.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1
    config: Any

    def __init__(self) -> None:
        check_settings(type(self), self.config)
        # Schedulers that are made from this config must not take their own defaults for what the network was trained on.
        unset = sorted(set(self.config.get(DEFAULT_VALUES, ())) - set(SOLVER_SETTINGS))
        self.register_to_config(**{DEFAULT_VALUES: unset})
        self._noise_schedules: dict[tuple[float | None, bool], NoiseSchedule] = {}
        self._noise_settings: dict[str, Any] = {}
        noise_schedule = self.noise_schedule(mu=1.0)  # refuses settings that describe none
        if isinstance(noise_schedule, VPDiscreteSchedule):
            # Training code and some pipelines read these.
            self.alphas_cumprod = (2 * noise_schedule.log_alphas).exp().float()
            log_alphas = torch.cat([noise_schedule.log_alphas.new_zeros(1), noise_schedule.log_alphas])
            self.betas = -torch.expm1(2 * log_alphas.diff()).float()
            self.alphas = 1 - self.betas
        self.num_inference_steps: int | None = None
        self.timesteps = self._entries = torch.arange(self.config.num_train_timesteps - 1, -1, -1, **FLOAT32)
        self.sigmas = torch.empty(0, **FLOAT32)
        self._sampler: Any = None
        self._steps: StepNumbers | None = None
        self._steps_key: Any = None
        self._history: History | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._repeated_time: float | None = None

    def register_to_config(self, **kwargs: Any) -> None:
        """Sets settings, and keeps those that were set as attributes of the config. They no longer count as defaults that nobody set.

        Raises:
            ValueError: If one is not of its type or out of range, or if what was learned is for another value.
        """
        config = self.__dict__.get("_internal_dict", {})
        edited = set_later(config)
        settings = {name: to_python(value) for name, value in (edited | kwargs).items()}
        shifts = [to_python(some[name]) for some in (kwargs, edited) for name in SHIFT_NAMES if name in some]
        if shifts and {**config, **settings}.get("use_flow_sigmas"):
            settings |= dict.fromkeys(SHIFT_NAMES, shifts[0])
        self._check_learned_for(settings)
        unset = [name for name in config.get(DEFAULT_VALUES, ()) if name not in settings]
        # The constructor checks all itself: that of a subclass registers its own arguments first.
        if "timesteps" in self.__dict__:
            check_settings(type(self), FrozenDict({**config, **settings}))
        super().register_to_config(**{DEFAULT_VALUES: unset, **settings})
        # `from_config` is given the config alone, and warns if its scheduler has learned something.
        self._internal_dict._learned = self.__dict__.setdefault("learned", {})

    def _check_learned_for(self, settings: Mapping[str, Any]) -> None:
        """Raises a `ValueError` if new settings are not those of the noise schedule and network that something was learned for."""
        learned = self.__dict__.get("learned", {})
        # Plans have their noise levels, and solvers that end at data suit any `t_end`.
        has_end = any(getattr(one, "t_end", 0) > 0 for one in learned.values())
        for name in SOLVER_SETTINGS if learned else ():
            differs = name in settings and settings[name] != to_python(self.config.get(name))
            if differs and (has_end or name != "t_end"):
                raise ValueError(
                    f"`{name}` cannot be {settings[name]}, as the solvers are for {self.config[name]}. Use `from_config(config, {name}=...)`."
                )

    def noise_schedule(self, mu: float | None = None, unshifted_timesteps: bool = False) -> NoiseSchedule:
        """The forward process of the config; see [`noise_schedule_from_config`]. It is built once for the same settings."""
        settings = current_settings(self.config, NOISE_SCHEDULE_SETTINGS)
        if settings != self._noise_settings or len(self._noise_schedules) > MOST_NOISE_SCHEDULES:
            self._noise_schedules, self._noise_settings = {}, settings
        # A tensor would be another key at every call.
        key = float(mu) if self.config.use_dynamic_shifting and mu is not None else None, unshifted_timesteps
        if key not in self._noise_schedules:
            self._noise_schedules[key] = self._make_noise_schedule(*key)
        return self._noise_schedules[key]

    def _make_noise_schedule(self, mu: float | None, unshifted_timesteps: bool) -> NoiseSchedule:
        return noise_schedule_from_config(self._noise_settings, mu, unshifted_timesteps)

    def set_shift(self, shift: float) -> None:
        """Sets the shift of flow matching, as in Diffusers' flow-matching schedulers; to be called before `set_timesteps`."""
        self.register_to_config(flow_shift=shift)

    def _t_start(self, noise_schedule: NoiseSchedule) -> float:
        """The time of the initial noise, for steps that are neither learned nor calibrated."""
        t_start = self.config.get("t_start", 1.0)
        karras = self.config.get("use_karras_sigmas") or self.config.get("use_lu_lambdas")
        if isinstance(noise_schedule, FlowMatchSchedule) and (karras or self.config.prediction_type == "epsilon"):
            return min(t_start, FLOW_T_START)
        lambda_min = self.config.get("lambda_min_clipped") or -math.inf  # of a DPM-Solver's config
        if lambda_min == -math.inf or not isinstance(noise_schedule, VPDiscreteSchedule):
            return t_start
        return min(t_start, noise_schedule.inverse_lambda(torch.tensor(lambda_min, **FLOAT64)).item())

    def _t_end(self, noise_schedule: NoiseSchedule) -> float:
        return max(self.config.t_end, noise_schedule.t_min)

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """Diffusers' schedulers for the same network. EDM's and the others do not understand each other's configs."""
        edm = is_edm(self.config)
        return [other for other in super().compatibles if other.__name__.startswith("EDM") == edm]

    @property
    def init_noise_sigma(self) -> float:
        """The factor by which pipelines multiply unit noise."""
        return 1.0 if self.config.exploding_sigmas is None else self.config.exploding_sigmas[1]

    @property
    def step_index(self) -> int | None:
        """Index of the next step, or `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, set by image-to-image pipelines with `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index of the first step. It is to be called after `set_timesteps`."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Chooses the solver or plan and its times; to be called before every sampling.

        A list that a pipeline passes by itself only says how many evaluations are meant. So does, outside of pipelines, an evenly
        spaced list of noise levels. A scheduler that has learned nothing follows any other list, with theory. What was learned or
        calibrated has times of its own, and such a list is a `ValueError`.

        Args:
            num_inference_steps (`int`, *optional*): Number of network evaluations; with `online` the most there may be.
            device (`str` or `torch.device`, *optional*): Device of `timesteps`.
            sigmas (`list[float]`, *optional*): Noise levels as Diffusers pipelines pass them: for flow matching one a step, before
                the shift; otherwise sigma / alpha with the final one added, 0 for this scheduler's end. With `"heun"` steps of
                second order take two evaluations.
            mu (`float`, *optional*): Shift of a flow-matching pipeline that depends on the resolution.
            timesteps (`list[float]`, *optional*): Network times of the steps. Beside the same `sigmas` of a flow-matching
                pipeline they say that the network is told noise levels before the shift.
        """
        requested = RequestedSteps.of(self, num_inference_steps, sigmas, timesteps)
        self._set_steps(requested, self.noise_schedule(mu, requested.unshifted_timesteps), mu, device)

    def _set_steps(self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: Any, device: Any) -> None:
        """Begins a sampling of the steps that were asked for."""
        raise NotImplementedError

    def _requested_times(self, requested: RequestedSteps, noise_schedule: NoiseSchedule) -> Tensor | None:
        """The times `(n + 1,)` of a list's steps and of its end, as of [`_checked_times`]; `None` if there is no list."""
        final_level = noise_schedule.final_sigma
        if requested.timesteps is not None:
            times = noise_schedule.inverse_timestep(torch.tensor(requested.timesteps, **FLOAT64))
        elif requested.sigmas is None or (self.config.exploding_sigmas is not None and not requested.chosen):
            return None
        elif self.config.use_flow_sigmas:
            times = torch.tensor(requested.sigmas, **FLOAT64)
            times = noise_schedule.stretched(times, self.config.shift_terminal)
        else:
            levels = list(requested.sigmas)
            if self.config.exploding_sigmas is None:
                final_level = levels.pop()
            times = noise_schedule.inverse_diffusers_sigma(torch.tensor(levels, **FLOAT64))
        return self._checked_times(times, final_level, requested.timesteps or requested.sigmas or (), noise_schedule)

    def _checked_times(
        self, times: Tensor, final_level: float, given: Sequence[float], noise_schedule: NoiseSchedule
    ) -> Tensor:
        """The times `(n + 1,)` of a list's steps and of its end, within the noise schedule.

        Args:
            times (`Tensor` of shape `(n,)`): Times of the steps.
            final_level: Noise level at the end, in Diffusers' convention. Its time is NaN if there is no noise.
            given: The list, for the message.

        Raises:
            ValueError: If the list does not descend within the noise schedule.
        """
        no_steps, end = len(times) == 0, times.new_full((1,), torch.nan)
        if final_level != noise_schedule.final_sigma:
            end = noise_schedule.inverse_diffusers_sigma(times.new_full((1,), final_level))
            times = torch.cat([times, end])
        # Published lists are rounded, and may go a little beyond the schedule. EDM networks have no first level.
        t_min, first = noise_schedule.t_min, math.inf if isinstance(noise_schedule, EDMVPSchedule) else 1 + 1e-3
        within = not no_steps and times[0] < first and times[-1] > 0.97 * t_min - 1e-6
        times = times.clamp(t_min, 1)
        if not (within and (times.diff() < -1e-9).all()):
            raise ValueError(f"`sigmas` or `timesteps` must descend within the noise schedule, got {list(given)}.")
        return torch.cat([times, end]) if end.isnan() else times

    def _begin(
        self, key: Hashable, choose_sampler: Callable[[], Any], noise_schedule: NoiseSchedule, device: Any
    ) -> None:
        """Begins a sampling by the table of a solver or plan. With the key of the last sampling its numbers are used again.

        Args:
            key: All that the table depends on beside the noise schedule and the config.
            choose_sampler: Returns the solver or plan, whose method `table` makes the table of the steps from one on.
        """
        new_key = (key, noise_schedule, current_settings(self.config, self.config))
        if self._steps is None or new_key != self._steps_key:
            self._check_learned_for(new_key[-1])
            self._sampler = choose_sampler()
            self._steps, self._steps_key = self._numbers(noise_schedule), new_key
        self._publish(self._steps, device)
        self._history = None
        self._step_index = self._begin_index = self._repeated_time = None

    @torch.no_grad()
    def _numbers(self, noise_schedule: NoiseSchedule, begin: int = 0) -> StepNumbers:
        """The numbers of the steps from `begin` on."""
        return StepNumbers.of(self._sampler.table(noise_schedule, begin), noise_schedule, self.config.prediction_type)

    def _publish(self, steps: StepNumbers, device: str | torch.device | None) -> None:
        """Sets what pipelines read: of the evaluations, and the last noise level. Devices get float32, which all have."""
        self.num_inference_steps = len(steps.timesteps)
        self.timesteps = self._entries = steps.timesteps.to(device, copy=True)
        self.sigmas = torch.tensor([*steps.evaluation_sigmas, steps.sigmas[-1]], **FLOAT32)

    def _new_history(self, begin: int) -> History:
        """The history of a sampling whose first step is number `begin`."""
        return self.step_numbers(begin).history()

    def step_numbers(self, begin: int = 0) -> StepNumbers:
        """The numbers of the sampling that `set_timesteps` chose, for a start at step `begin`."""
        if begin == 0:
            return self._current
        numbers = self._numbers(self._current.noise_schedule, begin)
        return replace(numbers, prediction_weights=self._current.prediction_weights[begin:])

    @property
    def _current(self) -> StepNumbers:
        if self._steps is None:
            raise ValueError("Call `set_timesteps` before sampling.")
        return self._steps

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Position of an entry of `timesteps`, found by its address in memory. Any other number is found by its value.

        Several steps may have the same timestep. Its value then means the last of them, as in `HeunDiscreteScheduler`.
        """
        if self._is_entry(timestep):
            return int(timestep.storage_offset())
        timestep = float(timestep)
        index = self._current.index_of.get(timestep)
        if index is None and not is_edm(self.config):  # times of EDM networks are within -2 and 2
            index = self._current.index_of_truncated(timestep)
        if index is None:
            timesteps = self._current.timesteps.tolist()
            raise ValueError(f"`timestep` {timestep} is not one of those of `set_timesteps`, {timesteps}.")
        return index

    def _is_entry(self, timestep: float | Tensor) -> TypeGuard[Tensor]:
        """Whether a timestep is an entry of the `timesteps` of `set_timesteps`. One of a copy, or of what replaced them, is not."""
        storage = self._entries.untyped_storage()
        return isinstance(timestep, Tensor) and timestep.untyped_storage().data_ptr() == storage.data_ptr()

    def _current_index(self, timestep: Any) -> int:
        if self._step_index is not None:
            return self._step_index - self._repeats_the_start(timestep)
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is given for a sample: the sample itself, or for EDM networks c_in times it."""
        if not is_edm(self.config):
            return sample
        return weighted_sum([self._current.input_scales[self._current_index(timestep)]], [sample])

    def convert_model_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """Data (x0) prediction of the current step from the network's output and the sample of `step`, in its shape."""
        index = self._begin_index if self._step_index is None else self._step_index
        weights = self._current.prediction_weights[index or 0]
        return weighted_sum(weights, [sample, drop_variance(model_output, sample, self.config.variance_type)])

    @torch.compiler.disable  # a compiled step would be compiled again for every index, and gains nothing
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        per_token_timesteps: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at which the network is to be evaluated next: a weighted sum of the sample and of data predictions.

        Args:
            model_output (`torch.Tensor`): The network's output, shaped like `sample` (with `variance_type` set it may
                have twice the channels).
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that the network was given. Only the first step
                reads it, to find its position.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): The current state.
            generator (`torch.Generator`, *optional*): Not used; the solver is deterministic.
            return_dict (`bool`, defaults to `True`): Whether to return a [`SchedulerOutput`] or a tuple.
            per_token_timesteps (`torch.Tensor`, *optional*): Times of the tokens, as `LTXConditionPipeline` passes them beside
                the negative output. Tokens at other times than the rest are given, and stay as they are.
            eta (`float`), use_clipped_model_output (`bool`): Not used; `DDIMPipeline` passes them to every scheduler.

        Returns:
            [`SchedulerOutput`] or `tuple`: The next state, in the dtype of `sample`. Arithmetic is done in float32, or in
            the sample's precision if that is higher.
        """
        if per_token_timesteps is not None:
            model_output, moves = -model_output, on_time(per_token_timesteps, timestep, sample)
        prev_sample = self._next_state(model_output, timestep, sample).to(sample.dtype)
        if per_token_timesteps is not None:
            prev_sample = prev_sample.where(moves, sample)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _start_step(self, timestep: float | Tensor) -> int:
        """The index of the step that begins now."""
        n, k = len(self._current.timesteps), self._current_index(timestep)
        if not 0 <= k < n:
            raise ValueError(
                f"There is no step {k} (from 0) of {n} steps. Call `set_timesteps` before sampling again."
            )
        if self._step_index is None and self._begin_index is None and not self._is_entry(timestep):
            timesteps = self._current.timesteps.tolist()
            self._repeated_time = float(timestep) if timesteps[k] in timesteps[:k] else None
        self._step_index = k
        return k

    def _repeats_the_start(self, timestep: float | Tensor) -> bool:
        """Whether a loop over copied timesteps is still at the one that it began with.

        It then began with the first of equal ones, and has made the step of the last. Nothing is left to do for the others.
        """
        if self._repeated_time is not None and float(timestep) != self._repeated_time:
            self._repeated_time = None
        return self._repeated_time is not None

    def _next_state(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """The next state in the precision of the arithmetic."""
        if self._repeats_the_start(timestep):
            return sample
        k = self._start_step(timestep)
        if self._history is None:
            self._history = self._new_history(k)
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        prediction = self._history.predict(state, drop_variance(model_output, sample, self.config.variance_type))
        if self.config.thresholding:
            ratio, largest = self.config.dynamic_thresholding_ratio, self.config.sample_max_value
            prediction = self._history.terms[-1] = dynamic_threshold(prediction, ratio, largest)
        self._before_update(k, state, prediction)
        next_state = self._history.update(state)
        self._step_index = k + 1
        if k + 1 == len(self._current.timesteps):
            self._history = None
        return next_state

    def _before_update(self, k: int, state: Tensor, prediction: Tensor) -> None:
        """Called in every step once the data prediction is known, so that a subclass may change the weights."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Diffuses samples to the times of `timesteps`, shape `(batch_size,)`.

        In a pipeline (with `begin_index` set) that is the first step's time, or the next step's once sampling has begun.
        Elsewhere entries of `scheduler.timesteps` mean the time of their step, and other values are network times.
        """
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            numbers = [self._current.alphas[index], self._current.noise_levels[index]]
            levels = torch.tensor(numbers, **FLOAT64)
        else:
            levels = self._levels_at(timesteps)
        levels = levels.to(original_samples.dtype).to(original_samples.device, non_blocking=True)
        alphas, sigmas = levels.view(2, -1, *(1,) * (original_samples.ndim - 1))
        return alphas * original_samples + sigmas * noise

    def _levels_at(self, timesteps: Any) -> Tensor:
        """alpha and sigma at times `(batch_size,)`, of shape `(2, batch_size)` and on their device, which is not waited for."""
        if not isinstance(timesteps, Tensor):
            timesteps = torch.tensor(timesteps, **FLOAT64)
        # A device may lack float64.
        timesteps = timesteps.to(torch.float64 if timesteps.device.type == "cpu" else torch.float32)
        # The shift does not change the levels of network times.
        source = self.noise_schedule(mu=1.0) if self._steps is None else self._steps
        return torch.stack(source.levels_at(timesteps.flatten()))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and the argument order of Diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def export(
        self,
        path: str | os.PathLike,
        num_inference_steps: Sequence[int] | None = None,
        *,
        shifts: Sequence[float] | None = None,
        mu: Sequence[float] | None = None,
        guidance_scales: Sequence[float] | None = None,
    ) -> None:
        """Writes the solvers as a JSON file of plain numbers, for programs without this package.

        The file says in its `rule` how a program samples with it. It has the noise levels of the states, what the network is
        told, and the weights of every step, also for starts in the middle (image to image).

        Args:
            path (`str` or `os.PathLike`): The file.
            num_inference_steps (`Sequence[int]`, *optional*): Step counts; by default all that the scheduler has learned.
            shifts (`Sequence[float]`, *optional*): Static shifts of flow matching, a table for each; by default the config's.
            mu (`Sequence[float]`, *optional*): Shifts that depend on the resolution, as pipelines pass them to
                `set_timesteps`; required with `use_dynamic_shifting`.
            guidance_scales (`Sequence[float]`, *optional*): For solvers of a range of scales, a table for each; by default for the
                usual scale.

        Raises:
            ValueError: If the sampling is no fixed sum (`thresholding`, `online`), or an argument does not fit the config.
            OSError: If the file cannot be written.
        """
        from .exporting import exported, write_tables

        options = {"shifts": shifts, "mu": mu, "guidance_scales": guidance_scales}
        write_tables(exported(self, num_inference_steps, **options), Path(path))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """A scheduler for the pipeline whose scheduler (of any Diffusers class) has this config; see `ConfigMixin`.

        Raises:
            ValueError: If this package cannot follow the config, if its entries and attributes differ, or if a keyword argument looks
                like a misspelled setting.
        """
        kept: dict[str, Any] = {}
        if isinstance(config, Mapping):
            if learned := sorted(getattr(config, "_learned", ())) or config.get(STEP_COUNTS):
                logger.warning(
                    f"A config does not hold what was learned: the new {cls.__name__} is without the solvers for "
                    f"{learned} steps. Use `copy.deepcopy`, or `save_pretrained` and `from_pretrained`, to keep them."
                )
            # `config.beta_end = ...` changes an attribute, `config | {"beta_end": ...}` an entry. Settings of other classes do not matter.
            settled = {*kwargs}
            # Where the shift is dynamic, multistep schedulers of Diffusers write that of the last sampling there.
            if config.get("use_dynamic_shifting") or not settled.isdisjoint(SHIFT_NAMES):
                settled |= {*SHIFT_NAMES}
            own = {*inspect.signature(cls).parameters, *SHIFT_NAMES} - settled
            for name, value in set_later(config).items():
                if name in own:
                    raise ValueError(
                        f"`{name}` is {config[name]} as an entry of the config and {value} as its attribute. Say which is meant by a keyword "
                        f"argument, `from_config(config, {name}=...)`."
                    )
            ours = config.get("_class_name") in OUR_CLASSES
            config = without_earlier_limits(config) if ours else translate_config(config)
            config.pop(STEP_COUNTS, None)
            if kwargs.get("use_flow_sigmas", config.get("use_flow_sigmas")):
                shift = config.pop("shift", None)  # it is `flow_shift` now
                if ours and shift not in (None, used := config.get("flow_shift", 1.0)):
                    logger.warning(f"`flow_shift` {used} and `shift` {shift} are one setting: {used} is used.")
                if "shift" in kwargs:
                    kwargs.setdefault("flow_shift", kwargs.pop("shift"))
            check_spelling(cls, config, likeness=0.9)  # others may have names of their own
            config, kept = split_config(cls, config)
        if not return_unused_kwargs:
            check_spelling(cls, kwargs)
        kwargs.pop("dtype", None)  # `ConfigMixin` would pass it to the constructor
        scheduler, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler.register_to_config(**kept)
        return (scheduler, kept | unused) if return_unused_kwargs else scheduler


def drop_variance(model_output: Tensor, sample: Tensor, variance_type: str | None) -> Tensor:
    """A network's output without the channels in which it predicts a variance."""
    if variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
        return model_output[:, : sample.shape[1]]
    return model_output


def on_time(per_token_timesteps: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
    """Which tokens of a sample `(batch_size, tokens, channels)` are at the time of a step."""
    same = torch.isclose(
        per_token_timesteps,
        torch.as_tensor(timestep, dtype=per_token_timesteps.dtype, device=per_token_timesteps.device),
    )
    return same.reshape(*same.shape, *(1,) * (sample.ndim - same.ndim))


def dynamic_threshold(prediction: Tensor, ratio: float, largest: float) -> Tensor:
    """Pixels of a data prediction clamped to a quantile s of their absolute values and divided by s (arXiv 2205.11487).

    Args:
        prediction (`Tensor` of shape `(batch_size, ...)`): Each sample has an s of its own.
        ratio: Of the pixels below s.
        largest: The highest s there may be; the lowest is 1.
    """
    threshold = prediction.flatten(1).abs().quantile(ratio, dim=1).clamp(1, max(1, largest))
    threshold = threshold.reshape(-1, *(1,) * (prediction.ndim - 1))
    return prediction.clamp(-threshold, threshold) / threshold
