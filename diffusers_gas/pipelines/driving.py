"""The pipeline is the model: any algorithm, evaluated by any Diffusers pipeline with its own prompts and guidance.

A pipeline asks its scheduler for the next state and the next time. A scheduler that returns any state and any time makes a
function (state, time) -> network output of the pipeline. Nothing here knows about networks, encoders or guidance.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import NoiseSchedule
from ..schedulers.configs import current_settings
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_utils import RequestedSteps, drop_variance
from ..solver_table import SolverTable, StepNumbers
from ..utils.diffusers_hooks import can_repeat_blocks, differentiable_call, progress_bar_config
from ..utils.tensors import FLOAT32, FLOAT64


# Length of the loop of a driven pipeline. Its algorithm ends the loop earlier.
MAX_EVALUATIONS = 4096


class Answer(NamedTuple):
    """What a driven algorithm is sent: the state that the network saw and its output without variance channels."""

    sample: Tensor
    model_output: Tensor


Requests: TypeAlias = Generator[tuple[Tensor | None, float | Tensor], Answer, Any]
"""Yields `(state, t)`, t in [0, 1] the time of the noise schedule, and is sent an [`Answer`]. The network is told the noise
schedule's `evaluation_time(t)`."""

Algorithm: TypeAlias = Callable[[NoiseSchedule, str], Requests]
"""From the pipeline's noise schedule and prediction type to the requests of one sampling."""


class LeavePipeline(Exception):
    """Raised by a scheduler: carries a result out of a pipeline's call, past its decoder."""

    def __init__(self, result: Any):
        super().__init__()
        self.result = result


class _Driver(GASScheduler):
    """Feeds an algorithm's requests to the pipeline and its answers back."""

    algorithm: Algorithm
    from_noise: bool

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        if self.config.thresholding:
            raise ValueError(
                "The pipeline's scheduler has `thresholding=True`. Solvers are linear, so that it can be neither distilled nor "
                "calibrated. Dynamic thresholding can be used for sampling only."
            )
        requested = RequestedSteps.of(self, num_inference_steps, sigmas, timesteps)
        if self.from_noise:
            requested.check_from_noise("a driven algorithm")
        self._noise_schedule = self.noise_schedule(mu, requested.unshifted_timesteps)
        self.num_inference_steps = requested.count
        self._requests = self.algorithm(self._noise_schedule, self.config.prediction_type)
        state, t = next(self._requests, (None, None))
        if state is not None or t is None:
            raise ValueError(
                "An algorithm's first request must be (None, t), the pipeline's own first state at a time t; got "
                + ("no request." if t is None else "a state of its own.")
            )
        # All entries share one cell. Writing to it sets the time that the pipeline's loop reads next. A pipeline that asks twice
        # (Allegro) may loop over what it got first.
        if not hasattr(self, "_cell"):
            self._cell = torch.empty(1, **FLOAT32).to(device)
        self.timesteps = self._cell.expand(MAX_EVALUATIONS)
        self._sigma_cell = torch.empty(1, **FLOAT32)
        self.sigmas = self._sigma_cell.expand(MAX_EVALUATIONS + 1)
        self._ask_at(t)

    def _ask_at(self, t: float | Tensor) -> None:
        t = torch.as_tensor(t, **FLOAT64)
        told = self._noise_schedule.evaluation_time(t)
        self._cell.fill_(self._noise_schedule.timestep(told).item())
        self._sigma_cell.fill_(self._noise_schedule.diffusers_sigma(told).item())
        self._input_scale = self._noise_schedule.input_scale(told).item()
        self._alpha, self._sigma = self._noise_schedule.alpha(t).item(), self._noise_schedule.sigma(t).item()

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerMixin:
        raise ValueError(
            "The pipeline samples with copies of its scheduler, one for each part of a sample. Its network cannot "
            "be evaluated at given states, so the pipeline can be neither distilled nor calibrated."
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.from_noise:
            raise ValueError(
                "The pipeline starts from an image, or mixes one in between steps, so that its states do not "
                "depend on the solver alone. Use the text-to-image pipeline of the same network. A solver made with it serves "
                "this pipeline, too."
            )
        return self._alpha * original_samples + self._sigma * noise

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        return sample if self._input_scale == 1 else sample * self._input_scale

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *_: Any,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
        **__: Any,
    ) -> SchedulerOutput | tuple[Tensor]:
        try:
            # Copies: a pipeline may write into its own tensors later on, and into the one that it is given.
            output = drop_variance(model_output, sample, self.config.variance_type)
            output = output if per_token_timesteps is None else -output
            state, t = self._requests.send(Answer(sample.clone(), output.clone()))
        except StopIteration as stop:
            raise LeavePipeline(stop.value) from None
        if state is None:
            raise ValueError("Only the first request of an algorithm may leave the state to the pipeline.")
        self._ask_at(t)
        state = state.to(sample.dtype, copy=True)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)


class _DifferentiableScheduler(GASScheduler):
    """Samples with one solver and keeps the gradients to its parameters, evaluation times included."""

    solver: GeneralizedSolver

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        requested = RequestedSteps.of(self, num_inference_steps, sigmas, timesteps)
        requested.check_from_noise("a trained solver")
        self._begin(None, lambda: self.solver, self.noise_schedule(mu, requested.unshifted_timesteps), device)

    def _numbers(self, noise_schedule: NoiseSchedule, begin: int = 0) -> StepNumbers:
        table = self._sampler.table(noise_schedule, begin)
        return StepNumbers.of(table, noise_schedule, self.config.prediction_type, differentiable=True)

    def _next_state(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        state = super()._next_state(model_output, timestep, sample)
        if self._step_index == self.num_inference_steps:
            raise LeavePipeline(state)
        return state


def rollout(make_table: Callable[[NoiseSchedule], SolverTable]) -> Algorithm:
    """Sampling by a table, to be driven: `drive(pipe, rollout(solver.table), ...)` returns the final state.

    Args:
        make_table: The table for a noise schedule: `GeneralizedSolver.table` or `SDMPlan.table`.
    """

    def algorithm(noise_schedule: NoiseSchedule, prediction_type: str) -> Requests:
        table, state = make_table(noise_schedule), None
        history = StepNumbers.of(table, noise_schedule, prediction_type).history()
        for t in table.evaluation_times.tolist():
            sample, model_output = yield state, t
            state = history.step(sample.to(torch.promote_types(sample.dtype, torch.float32)), model_output)
        return state

    return algorithm


def drive(pipe: DiffusionPipeline, algorithm: Algorithm, *, from_noise: bool = False, **pipeline_inputs: Any) -> Any:
    """Runs an algorithm with a pipeline as its network, without gradients, and returns what it returns.

    Args:
        pipe: The pipeline; its scheduler says what the network was trained on and is left as it was.
        algorithm: Called with the noise schedule and the prediction type, a generator that yields `(state, t)`, t in
            [0, 1] the noise schedule's time, and is sent an [`Answer`]. The first state is the pipeline's own noise:
            the first request is `(None, t)`. Evaluations may come in any number and order. When the generator returns,
            the pipeline is left before it decodes anything.
        from_noise: Whether the algorithm relies on a first state of pure noise, and on states that nobody else changes. A
            pipeline that mixes an image with noise (image-to-image, inpainting) then raises a `ValueError`.
        pipeline_inputs: Arguments of `pipe.__call__`.
    """
    driver = _Driver.from_config(scheduler_config(pipe))
    driver.algorithm, driver.from_noise = algorithm, from_noise
    return call_with_scheduler(pipe, driver, type(pipe).__call__, pipeline_inputs)


def differentiable_rollout(
    pipe: DiffusionPipeline, solver: GeneralizedSolver, *, gradient_checkpointing: bool = False, **pipeline_inputs: Any
) -> Tensor:
    """The final state of sampling with a solver, with gradients to all of its parameters, evaluation times included.

    Args:
        pipe: The pipeline; its networks are frozen meanwhile.
        solver: The solver to differentiate.
        gradient_checkpointing: Whether the backward pass repeats network evaluations instead of keeping them in memory. It
            must then run inside [`frozen`], too. Each evaluation that it repeats is kept as a whole, or only the inputs of its
            blocks inside [`repeated_blocks`].
        pipeline_inputs: Arguments of `pipe.__call__`.

    Raises:
        ValueError: If the pipeline does not let gradients through.
    """
    call, scheduler = differentiable_call(pipe), _DifferentiableScheduler.from_config(scheduler_config(pipe))
    scheduler.solver = solver
    checkpointed = _checkpointed if gradient_checkpointing else nullcontext
    with torch.enable_grad(), frozen(pipe), checkpointed(pipe):
        inputs = {**pipeline_inputs, "num_inference_steps": solver.num_inference_steps}
        # The backward pass finds the networks where the forward pass had them.
        final = call_with_scheduler(pipe, scheduler, call, inputs, free_hooks=False)
    if not final.requires_grad:
        raise ValueError(f"{type(pipe).__name__} switches gradients off within its call: distill it by Gauss-Newton.")
    return final


def sample_latents(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, num_inference_steps: int, **pipeline_inputs: Any
) -> tuple[Tensor, Tensor]:
    """Initial noise (unit variance) and final state of a pipeline's sampling with any Diffusers scheduler, not decoded.

    The final state is the result of the last `step`. For a pipeline that starts from an image the initial state is the
    noised image. A pipeline that steps both halves of its doubled batch for guidance (DiT) returns both.
    """
    scheduler = forgiving_copy(scheduler)
    step = scheduler.step
    noise = None
    steps_done = 0

    @functools.wraps(step)
    def recording_step(
        model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        nonlocal noise, steps_done
        if noise is None:
            # The quotient is a copy: a pipeline may write into its tensor.
            noise = sample / getattr(scheduler, "init_noise_sigma", 1.0)
        output = step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        steps_done += 1
        if is_last_step(scheduler, steps_done, timestep):
            raise LeavePipeline((noise, output[0]))
        return output

    scheduler.step = recording_step
    inputs = {**pipeline_inputs, "num_inference_steps": num_inference_steps}
    return call_with_scheduler(pipe, scheduler, type(pipe).__call__, inputs)


def is_last_step(scheduler: SchedulerMixin, steps_done: int, timestep: Any) -> bool:
    """Whether a sampling is over after this many steps, the last of them at a timestep."""
    if hasattr(scheduler, "begin_index"):
        # Counted: with second-order steps the last two timesteps may be the same.
        return steps_done == len(scheduler.timesteps) - (scheduler.begin_index or 0)
    return bool(
        timestep == scheduler.timesteps[-1]
    )  # PNDM and DDIM do not know where an image-to-image pipeline began


def _copy_without_methods(scheduler: SchedulerMixin, memo: dict[int, Any]) -> SchedulerMixin:
    """A copy with the methods of its class in the place of those that were set on the instance."""
    other = object.__new__(type(scheduler))
    state = {name: value for name, value in vars(scheduler).items() if name not in ("step", "__deepcopy__")}
    vars(other).update(copy.deepcopy(state, memo))
    return forgiving_copy(other)


def forgiving_copy(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy whose `step` ignores unknown arguments: some pipelines pass `generator` to every scheduler."""
    scheduler = copy.deepcopy(scheduler)
    step = scheduler.step
    known = inspect.signature(step).parameters

    @functools.wraps(step)
    def forgiving_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **{name: value for name, value in kwargs.items() if name in known})

    scheduler.step = forgiving_step
    # A pipeline's copies must not step this scheduler, nor record anything.
    scheduler.__deepcopy__ = functools.partial(_copy_without_methods, scheduler)
    return scheduler


def scheduler_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The config of a pipeline's scheduler; a `ValueError` for a pipeline without one.

    `flow_shift` of a multistep scheduler is also there as `shift`, its name in Diffusers' flow-matching schedulers.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no `scheduler`: only diffusion pipelines can be sampled.")
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    # Some set attributes of the config, or the shift of a flow-matching scheduler, which its config does not follow.
    config |= current_settings(scheduler.config, scheduler.config)
    if config.get("use_flow_sigmas") and "flow_shift" in config:
        return {**config, "shift": config["flow_shift"]}
    return {**config, "shift": scheduler.shift} if hasattr(type(scheduler), "shift") else config


@contextmanager
def quiet_sampling(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    """Inside, the pipeline samples with the given scheduler and shows no progress bar."""
    own_scheduler, own_bar = pipe.scheduler, progress_bar_config(pipe)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(**{**own_bar, "disable": True})
    try:
        yield
    finally:
        pipe.scheduler = own_scheduler
        pipe.set_progress_bar_config(**own_bar)


def call_with_scheduler(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, call: Callable, inputs: dict, free_hooks: bool = True
) -> Any:
    """Calls a pipeline with another scheduler and returns the result with which the scheduler raises [`LeavePipeline`].

    Args:
        pipe: The pipeline.
        scheduler: The scheduler to sample with.
        call: The pipeline's `__call__`, or the same without `torch.no_grad`.
        inputs: Arguments of the call.
        free_hooks: Whether offloaded networks leave the device afterwards.

    Raises:
        ValueError: If the pipeline ends its sampling before.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(
            f"{type(pipe).__name__} is not a `DiffusionPipeline`: pass the plain pipeline of the same network."
        )
    with quiet_sampling(pipe, scheduler):
        try:
            call(pipe, **inputs)
        except LeavePipeline as leave:
            return leave.result
        finally:
            if free_hooks:
                pipe.maybe_free_model_hooks()
    raise ValueError(
        f"{type(pipe).__name__} did not sample to the end with the scheduler that it was given: a callback or "
        f"`denoising_end` ended it, it samples with copies of its scheduler, or it took {MAX_EVALUATIONS} evaluations. Such a "
        "sampling cannot be recorded, distilled or calibrated."
    )


@contextmanager
def frozen(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, none of the pipeline's weights requires a gradient. A `ValueError` says that no gradient goes through them."""
    parameters = [parameter for network in _networks(pipe) for parameter in network.parameters()]
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError(
            "The pipeline was loaded in inference mode, so that there are no gradients through its weights. Load it outside of "
            "`torch.inference_mode()`, or distill by Gauss-Newton."
        )
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def repeated_blocks(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, the backward pass of a network of Diffusers repeats its blocks one by one instead of keeping what is in them."""
    networks: list[Any] = [network for network in _networks(pipe) if can_repeat_blocks(network)]
    networks = [network for network in networks if not network.is_gradient_checkpointing]
    for network in networks:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for network in networks:
            network.disable_gradient_checkpointing()


@contextmanager
def wrapped_methods(owners: Iterable[Any], name: str, wrap: Callable[[Any, Callable], Callable]) -> Iterator[None]:
    """Inside, a method of each owner is what `wrap(owner, method)` returns."""
    # An instance's own method goes before its class's; under offloading `forward` is one already, a hook.
    own_methods = {owner: owner.__dict__.get(name) for owner in owners}
    for owner in own_methods:
        setattr(owner, name, wrap(owner, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, method in own_methods.items():
            if method is None:
                delattr(owner, name)
            else:
                setattr(owner, name, method)


def _checkpointed(pipe: DiffusionPipeline) -> AbstractContextManager[None]:
    def wrap(network: nn.Module, forward: Callable) -> Callable:
        return functools.partial(checkpoint, forward, use_reentrant=False)

    return wrapped_methods(_networks(pipe), "forward", wrap)


def _networks(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]
