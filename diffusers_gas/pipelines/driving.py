"""The pipeline is the model: any algorithm, evaluated by any Diffusers pipeline with its own prompts and guidance.

A pipeline asks its scheduler for the next state and the next time. A scheduler that returns any state and any time makes a
function (state, time) -> network output of the pipeline. Nothing here knows about networks, encoders or guidance. A rollout by a
solver has derivatives in two ways: backwards through the pipeline, and as finite differences of driven rollouts.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..generalized_solver import GeneralizedSolver
from ..guided_solver import GuidedSolver
from ..noise_schedules import NoiseSchedule
from ..schedulers.configs import current_settings
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_utils import RequestedSteps, drop_variance
from ..schedulers.sdm_plan import SDMPlan
from ..solver_table import History, SolverTable, StepNumbers, weighted_sum
from ..utils.diffusers_hooks import (
    DEFAULT_VALUES,
    can_repeat_blocks,
    differentiable_call,
    has_feature_caches,
    progress_bar_config,
    reset_feature_caches,
)
from ..utils.tensors import FLOAT32, FLOAT64


# Length of the loop of a driven pipeline. Its algorithm ends the loop earlier.
MAX_EVALUATIONS = 4096

# Layers that are random in training mode.
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# Sizes of finite differences of states, relative to the states, and of t. They are far above rounding on purpose. Networks are
# rough on small scales: a time embedding oscillates between its training times, which are a thousandth apart. The useful
# slope is the one over the distance of an optimization step. On the digits teacher, 4 steps reach a training loss of 0.0038
# in 8 iterations with these sizes, and 0.0081 with 1e-3.
STATE_DIFFERENCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
TIME_DIFFERENCE = 1e-2


class Evaluation(NamedTuple):
    """What a driven algorithm is sent: the state that the network saw and its output without variance channels."""

    sample: Tensor
    model_output: Tensor


Requests: TypeAlias = Generator[tuple[Tensor | None, float | Tensor], Evaluation, Any]
"""Yields `(state, t)`, t in [0, 1] the time of the noise schedule, and is sent an [`Evaluation`]. The first state is `None`, which
means the pipeline's own, and begins a sampling: a later `None` begins another one from the same noise, with empty feature caches.
The network is told the noise schedule's `evaluation_time(t)`."""

Algorithm: TypeAlias = Callable[[NoiseSchedule, str], Requests]
"""From the pipeline's noise schedule and prediction type to the requests of one sampling."""


class LeavePipeline(Exception):
    """Raised by a scheduler: carries a result, its only argument, out of a pipeline's call, past its decoder."""


class _SchedulerOfOneCall(GASScheduler):
    """Base of the schedulers that sample from noise by something else than their config says."""

    def _set_steps(self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: Any, device: Any) -> None:
        if self.config.thresholding:
            raise ValueError(
                "The pipeline's scheduler has `thresholding=True`. Solvers are linear, so that it can be neither distilled nor "
                "calibrated. Dynamic thresholding can be used for sampling only."
            )
        requested.check_from_noise("a solver")
        self.num_inference_steps = requested.count


class _Driver(_SchedulerOfOneCall):
    """Feeds an algorithm's requests to the pipeline and its evaluations back."""

    algorithm: Algorithm
    pipe: DiffusionPipeline

    def _set_steps(self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: Any, device: Any) -> None:
        super()._set_steps(requested, noise_schedule, mu, device)
        self._noise_schedule = noise_schedule
        self._requests = self.algorithm(noise_schedule, self.config.prediction_type)
        self._first_state: Tensor | None = None
        state, t = next(self._requests)
        if state is not None:
            raise ValueError("An algorithm's first request must be (None, t), the pipeline's first state at a time t.")
        # All entries share one number. Writing to it sets the time that the pipeline's loop reads next. A pipeline that asks
        # twice (Allegro) may loop over what it got first.
        if not hasattr(self, "_timestep"):
            self._timestep = torch.empty(1, **FLOAT32).to(device)
        self.timesteps = self._timestep.expand(MAX_EVALUATIONS)
        self._sigma = torch.empty(1, **FLOAT32)
        self.sigmas = self._sigma.expand(MAX_EVALUATIONS + 1)
        self._set_time(t)

    def _set_time(self, t: float | Tensor) -> None:
        t = self._noise_schedule.evaluation_time(torch.as_tensor(t, **FLOAT64))
        self._timestep.fill_(self._noise_schedule.timestep(t).item())
        self._sigma.fill_(self._noise_schedule.diffusers_sigma(t).item())
        self._input_scale = self._noise_schedule.input_scale(t).item()

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerMixin:
        raise ValueError(
            "The pipeline samples with copies of its scheduler, one for each part of a sample. Its network cannot "
            "be evaluated at given states, so the pipeline can be neither distilled nor calibrated."
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        raise ValueError(
            "The pipeline starts from an image, or mixes one in between steps, so that its states do not depend on the solver "
            "alone. Use the text-to-image pipeline of the same network. A solver made with it serves this pipeline, too."
        )

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        return sample if self._input_scale == 1 else sample * self._input_scale

    def _next_state(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        output = drop_variance(model_output, sample, self.config.variance_type)
        if self._first_state is None:
            self._first_state = sample.clone()
        try:
            # Copies: a pipeline may write into its own tensors later on, and into the one that it is given.
            state, t = self._requests.send(Evaluation(sample.clone(), output.clone()))
        except StopIteration as stop:
            raise LeavePipeline(stop.value) from None
        if state is None:
            reset_feature_caches(networks_of(self.pipe))
            state = self._first_state
        self._set_time(t)
        return state.to(sample.dtype, copy=True)


class _DifferentiableScheduler(_SchedulerOfOneCall):
    """Samples with one solver and keeps the gradients to its parameters, evaluation times included."""

    solver: GeneralizedSolver

    def _set_steps(self, requested: RequestedSteps, noise_schedule: NoiseSchedule, mu: Any, device: Any) -> None:
        super()._set_steps(requested, noise_schedule, mu, device)
        self._begin(None, lambda: self.solver, noise_schedule, device)

    def _numbers(self, noise_schedule: NoiseSchedule, begin: int = 0) -> StepNumbers:
        table = self.solver.table(noise_schedule, begin)
        return StepNumbers.of(table, noise_schedule, self.config.prediction_type, differentiable=True)

    def _next_state(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        state = super()._next_state(model_output, timestep, sample)
        if self._step_index == self.num_inference_steps:
            raise LeavePipeline(state)
        return state


def drive(pipe: DiffusionPipeline, algorithm: Algorithm, **pipeline_inputs: Any) -> Any:
    """Runs an algorithm with a pipeline as its network, without gradients, and returns what it returns.

    The first state is the pipeline's own noise, and nobody else changes states. A pipeline that mixes an image with noise
    (image-to-image, inpainting) raises a `ValueError`.

    Args:
        pipe: The pipeline; its scheduler says what the network was trained on and is left as it was.
        algorithm: Called with the noise schedule and the prediction type, a generator that yields `(state, t)`, t in
            [0, 1] the noise schedule's time, and is sent an [`Evaluation`]. The first request is `(None, t)`. Evaluations
            may come in any number and order. When the generator returns, the pipeline is left before it decodes anything.
        pipeline_inputs: Arguments of `pipe.__call__`.
    """
    driver = _Driver.from_config(scheduler_config(pipe))
    driver.algorithm, driver.pipe = algorithm, pipe
    return call_with_scheduler(pipe, driver, type(pipe).__call__, pipeline_inputs)


def rollout(
    pipe: DiffusionPipeline, solver: GeneralizedSolver | GuidedSolver | SDMPlan, **pipeline_inputs: Any
) -> Tensor:
    """The final state of sampling with a solver or a plan, without gradients; see [`drive`]."""

    def algorithm(noise_schedule: NoiseSchedule, prediction_type: str) -> Requests:
        table, state = solver.table(noise_schedule), None
        history = StepNumbers.of(table, noise_schedule, prediction_type).history()
        for t in table.evaluation_times.tolist():
            sample, model_output = yield state, t
            state = history.step(sample.to(torch.promote_types(sample.dtype, torch.float32)), model_output)
        return state

    # A pipeline may derive its shift from the number of steps.
    return drive(pipe, algorithm, **{**pipeline_inputs, "num_inference_steps": solver.num_inference_steps})


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
    if gradient_checkpointing and has_feature_caches(networks_of(pipe)):
        raise ValueError("With a feature cache no evaluation can be repeated: distill without gradient checkpointing.")
    call, scheduler = differentiable_call(pipe), _DifferentiableScheduler.from_config(scheduler_config(pipe))
    scheduler.solver = solver

    def checkpointed(_: Any, forward: Callable) -> Callable:
        return functools.partial(checkpoint, forward, use_reentrant=False)

    networks = networks_of(pipe) if gradient_checkpointing else []
    with torch.enable_grad(), frozen(pipe), wrapped_methods(networks, "forward", checkpointed):
        inputs = {**pipeline_inputs, "num_inference_steps": solver.num_inference_steps}
        # The backward pass finds the networks where the forward pass had them.
        final = call_with_scheduler(pipe, scheduler, call, inputs, free_hooks=False)
    if not final.requires_grad:
        raise ValueError(f"{type(pipe).__name__} switches gradients off within its call: distill it by Gauss-Newton.")
    return final


def table_of_outputs(solver: GeneralizedSolver, noise_schedule: NoiseSchedule, prediction_type: str) -> SolverTable:
    """A solver's table for one kind of network in terms of the network's outputs, differentiable."""
    table = solver.table(noise_schedule)
    return table.of_outputs(table.prediction_weights(noise_schedule, prediction_type))


def num_evaluations(num_inference_steps: int, from_start: bool = False) -> int:
    """Network evaluations that `sensitivities` spends on a batch."""
    n = num_inference_steps
    if from_start:
        return n + n * sum(k + 2 for k in range(n - 1)) + n * n
    return n + sum((k + 2) * (n - 1 - k) + n - k for k in range(n))


def sensitivities(table: SolverTable, mixing: Tensor | None = None, from_start: bool = False) -> Requests:
    """The final state and final states beside it, from which the derivatives of all weights and times follow; to be driven.

    A step in terms of the network's outputs is `x[k+1] = w[k, 0] x[0] + sum_j w[k, 1 + j] output[j]`. A solver's parameters act
    only through these weights and the evaluation times. A difference in a weight of step k needs the evaluations after step k
    only, and at the last step no evaluation at all.

    The weights are varied along an orthonormal basis of initial state and outputs. At the first steps these nearly
    coincide. Differences along each of them would lose in rounding the one direction in which they differ.

    Args:
        table: In terms of the network's outputs; see [`table_of_outputs`].
        mixing: The basis of an earlier batch. Derivatives of several batches add up in one basis only.
        from_start: Whether every neighbour is sampled from the start, for a network whose outputs depend on its earlier evaluations
            (feature caches).

    Returns:
        `tuple`: the final state, pairs of a neighbouring final state and the size of the variation that led to it, in the
        order of [`orthonormal_parameters`], and the basis: column b of `mixing` `(n + 1, n + 1)`, upper triangular, holds
        the weights of its b-th vector.
    """
    times, history = table.evaluation_times.tolist(), History(table.weights.tolist())
    states: list[Tensor] = []
    for t in times:
        evaluation = yield states[-1] if states else None, t
        if not states:
            states.append(evaluation.sample.to(torch.promote_types(evaluation.sample.dtype, torch.float32)))
        states.append(history.step(states[-1], evaluation.model_output))
    basis, n = history.terms, len(times)
    if mixing is None:
        mixing = _orthonormalize(basis)
    directions = [weighted_sum(mixing[: b + 1, b].tolist(), basis) for b in range(n + 1)]
    size = STATE_DIFFERENCE[evaluation.model_output.dtype]
    neighbours = []
    for k in range(n):
        for direction in directions[: k + 2]:
            before = states[: k + 1] if from_start else []
            final = yield from _finish(history.after(k + 1), states[k + 1] + size * direction, times, before)
            neighbours.append((final, size))
    for k in range(n):
        # Towards the inside: a network was not trained beyond t = 1 or t = 0.
        size = -TIME_DIFFERENCE if times[k] > 2 * TIME_DIFFERENCE else TIME_DIFFERENCE
        changed = [*times[:k], times[k] + size, *times[k + 1 :]]
        final = yield from _finish(history.after(k), states[k], changed, states[:k] if from_start else [])
        neighbours.append((final, size))
    return states[-1], neighbours, mixing


def _finish(history: History, state: Tensor, times: list[float], before: list[Tensor]) -> Requests:
    """The final state from a state in the middle, before which the network is evaluated again at the states `before`."""
    begun, n = history.num_steps_begun, len(times)
    for k, earlier in enumerate(before if begun < n else []):
        yield earlier if k else None, times[k]
    for k in range(begun, n):
        evaluation = yield state if k else None, times[k]
        state = history.step(state, evaluation.model_output)
    return state


def orthonormal_parameters(
    solver: GeneralizedSolver, noise_schedule: NoiseSchedule, prediction_type: str, mixing: Tensor
) -> Tensor:
    """A solver's weights in the basis of [`sensitivities`], row by row, and its evaluation times; differentiable."""
    table, unmixing = table_of_outputs(solver, noise_schedule, prediction_type), torch.linalg.inv(mixing)
    rows = [unmixing[: k + 2, : k + 2] @ row[1 : k + 3] for k, row in enumerate(table.weights)]
    return torch.cat([*rows, table.evaluation_times])


def _orthonormalize(basis: list[Tensor]) -> Tensor:
    """Upper triangular float64 weights that make tensors orthonormal (in the mean over all entries)."""
    vectors = torch.stack([tensor.flatten().cpu().double() for tensor in basis])
    gram = vectors @ vectors.T / vectors.shape[1]
    if not gram.isfinite().all():  # a network has overflowed, and what is made of this is not finite either
        return torch.eye(len(gram), **FLOAT64)
    gram += 1e-12 * gram.diagonal().max() * torch.eye(len(gram), **FLOAT64)
    return torch.linalg.inv(torch.linalg.cholesky(gram)).T


def sample_latents(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, num_inference_steps: int, **pipeline_inputs: Any
) -> tuple[Tensor, Tensor]:
    """Initial noise (unit variance) and final state of a pipeline's sampling with any Diffusers scheduler, not decoded.

    The final state is the result of the last `step`. For a pipeline that starts from an image the initial state is the
    noised image. A pipeline that steps both halves of its doubled batch for guidance (DiT) returns both.
    """
    noise: Tensor | None = None

    def after_step(sample: Tensor, next_state: Tensor, is_last: bool) -> Tensor:
        nonlocal noise
        if noise is None:
            # The quotient is a copy: a pipeline may write into its tensor.
            noise = sample / getattr(recorded, "init_noise_sigma", 1.0)
        if is_last:
            raise LeavePipeline((noise, next_state))
        return next_state

    recorded = recording_copy(scheduler, after_step)
    inputs = {**pipeline_inputs, "num_inference_steps": num_inference_steps}
    return call_with_scheduler(pipe, recorded, type(pipe).__call__, inputs)


def recording_copy(
    scheduler: SchedulerMixin,
    after_step: Callable[[Tensor, Tensor, bool], Tensor] = lambda _, next_state, __: next_state,
) -> Any:
    """A copy of a scheduler that shows its steps, and ignores arguments of `step` that it does not know.

    Some pipelines pass `generator` to every scheduler. The copy is of the same class: some pipelines compare it.

    Args:
        scheduler: The scheduler.
        after_step: Called with the sample and the next state of every step, and with whether it was the last one of the
            sampling. Returns the next state that the pipeline is given.
    """
    recorded: Any = copy.deepcopy(scheduler)
    own_step, parameters = recorded.step, inspect.signature(recorded.step).parameters

    @functools.wraps(own_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
        output = own_step(model_output, timestep, sample, *args, **kwargs)
        state = after_step(sample, output[0], _has_ended(recorded, timestep))
        if state is output[0]:
            return output
        return (state,) if isinstance(output, tuple) else type(output)(state)

    def copy_by_the_pipeline(memo: dict[int, Any]) -> SchedulerMixin:
        other = copy.copy(recorded)
        del other.step, other.__deepcopy__  # which are this copy's, and show its steps
        return recording_copy(other)

    recorded.step, recorded.__deepcopy__ = step, copy_by_the_pipeline
    return recorded


def _has_ended(scheduler: Any, timestep: Any) -> bool:
    """Whether the step that a scheduler has just made, at a timestep, was its last."""
    step_index = getattr(scheduler, "step_index", None)
    if step_index is not None:
        # With second-order steps the last two timesteps may be the same.
        return step_index == len(scheduler.timesteps)
    return bool(timestep == scheduler.timesteps[-1])  # PNDM and DDIM do not count


def scheduler_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The [`current_config`] of a pipeline's scheduler; a `ValueError` for a pipeline without one."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no `scheduler`: only diffusion pipelines can be sampled.")
    return current_config(scheduler)


def current_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """A scheduler's config with its class, and with what was set later.

    `flow_shift` of a multistep scheduler is also there as `shift`, its name in Diffusers' flow-matching schedulers.
    """
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    # Some set attributes of the config, or the shift of a flow-matching scheduler, which its config does not follow.
    config |= current_settings(scheduler.config, scheduler.config)
    # Diffusers counts what was passed by position, or set later, among the defaults, which other classes replace by their own.
    parameters = inspect.signature(type(scheduler)).parameters
    unset = config.get(DEFAULT_VALUES, ())
    config[DEFAULT_VALUES] = [x for x in unset if x not in parameters or config[x] == parameters[x].default]
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
        ValueError: If the pipeline ends its sampling before, or its networks are in training mode and random.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"{type(pipe).__name__} is not a `DiffusionPipeline`: pass the plain one of this network.")
    for network in networks_of(pipe):
        # Also a LoRA that was added with dropout to a network in evaluation mode.
        if any(isinstance(part, DROPOUT) and part.training and part.p > 0 for part in network.modules()):
            raise ValueError(f"The {type(network).__name__} drops random activations: call its `eval()` before.")
    with quiet_sampling(pipe, scheduler):
        reset_feature_caches(networks_of(pipe))
        try:
            call(pipe, **inputs)
        except LeavePipeline as leave:
            return leave.args[0]
        finally:
            reset_feature_caches(networks_of(pipe))
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
    parameters = [parameter for network in networks_of(pipe) for parameter in network.parameters()]
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
    networks: list[Any] = [network for network in networks_of(pipe) if can_repeat_blocks(network)]
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
    own_methods = {owner: vars(owner).get(name) for owner in owners}
    for owner in own_methods:
        setattr(owner, name, wrap(owner, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, method in own_methods.items():
            delattr(owner, name)
            if method is not None:
                setattr(owner, name, method)


def networks_of(pipe: DiffusionPipeline) -> list[nn.Module]:
    """All networks of a pipeline: denoisers, encoders and decoders."""
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]
