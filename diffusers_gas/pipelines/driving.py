"""The pipeline is the model: any algorithm, evaluated by any Diffusers pipeline with its own prompts and guidance.

A pipeline asks its scheduler for the next time and the next state. A scheduler that answers with any of both turns the
pipeline into an oracle (state, time) -> network output. Nothing here knows about networks, encoders or guidance.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import NoiseSchedule, data_prediction_weights
from ..schedulers.scheduling_gas import GASScheduler


# Length of the loop that a driven pipeline believes in; its algorithm ends it earlier.
MAX_EVALUATIONS = 4096


class Evaluation(NamedTuple):
    """What a driven algorithm is sent: the state that the network saw and its output (variance channels removed)."""

    sample: Tensor
    model_output: Tensor


Algorithm = Callable[[NoiseSchedule, str], Generator[tuple[Tensor | None, float | Tensor], Evaluation, Any]]


class LeavePipeline(Exception):
    """Raised by a scheduler: carries a result out of a pipeline's call, past its decoder."""

    def __init__(self, result: Any):
        super().__init__()
        self.result = result


class _Driver(GASScheduler):
    """Feeds an algorithm's requests to the pipeline and its answers back."""

    algorithm: Algorithm
    from_noise: bool

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
        self._noise_schedule = self.noise_schedule(mu)
        self.num_inference_steps = num_inference_steps if sigmas is None else len(sigmas)
        self._requests = self.algorithm(self._noise_schedule, self.config.prediction_type)
        state, t = next(self._requests, ("nothing", None))
        if state is not None:
            raise ValueError(
                "An algorithm's first request must be (None, t), the pipeline's own first state at a time t; got "
                + ("no request." if t is None else "a state of its own.")
            )
        # All entries are one cell: writing it changes the time that the pipeline's loop sees next.
        self._cell = torch.empty(1, device=device)
        self.timesteps = self._cell.expand(MAX_EVALUATIONS)
        self._sigma_cell = torch.empty(1)
        self.sigmas = self._sigma_cell.expand(MAX_EVALUATIONS + 1)
        self._ask_at(t)

    def _ask_at(self, t: float | Tensor) -> None:
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        self._cell.fill_(self._noise_schedule.timestep(t).item())
        self._sigma_cell.fill_(self._noise_schedule.diffusers_sigma(t).item())
        self._input_scale = self._noise_schedule.input_scale(t).item()
        self._alpha, self._sigma = self._noise_schedule.alpha(t).item(), self._noise_schedule.sigma(t).item()

    def add_noise(self, original_samples, noise, timesteps):
        if self.from_noise:
            raise ValueError(
                "The pipeline starts from an image, or puts one in between steps, so that its states are not those of the "
                "solver alone. Use the text-to-image pipeline of the same network; its solver serves this one, too."
            )
        return self._alpha * original_samples + self._sigma * noise

    def scale_model_input(self, sample, timestep=None):
        return sample if self._input_scale == 1 else sample * self._input_scale

    def step(
        self, model_output, timestep, sample, generator=None, return_dict=True, eta=0, use_clipped_model_output=None
    ):
        evaluation = Evaluation(sample, self.drop_variance(model_output, sample))
        try:
            state, t = self._requests.send(evaluation)
        except StopIteration as stop:
            raise LeavePipeline(stop.value) from None
        if state is None:
            raise ValueError("Only the first request of an algorithm may leave the state to the pipeline.")
        self._ask_at(t)
        return self.output(state.to(sample.dtype), return_dict)


class _Rollout(GASScheduler):
    """Steps by a table that requires gradients, times included, keeping the whole history."""

    solver: GeneralizedSolver

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
        self._noise_schedule = self.noise_schedule(mu)
        table = self.solver.table(self._noise_schedule)
        self._reset(self._noise_schedule, table.times.detach(), table.evaluation_times.detach(), device)
        self.timesteps = self._noise_schedule.timestep(table.evaluation_times).float().to(device)
        self._input_scales = self._noise_schedule.input_scale(table.evaluation_times)
        self._states: list[Tensor] = []
        self._data: list[Tensor] = []

    def step(
        self, model_output, timestep, sample, generator=None, return_dict=True, eta=0, use_clipped_model_output=None
    ):
        if self._step_index is None:
            self._step_index = self._begin_index or 0
            self._table = self.solver.table(self._noise_schedule, begin=self._step_index)
            self._prediction = data_prediction_weights(
                self.config.prediction_type, self._noise_schedule, self._table.times[:-1], self._table.evaluation_times
            )
        k = len(self._states)
        self._states.append(sample.to(torch.promote_types(sample.dtype, torch.float32)))
        p, q = self._prediction
        # In the states' precision: the product of a number and a half-precision tensor would be half precision.
        model_output = self.drop_variance(model_output, sample).to(self._states[k].dtype)
        self._data.append(p[k] * self._states[k] + q[k] * model_output)
        weights = zip(self._table.state_weights[k], self._table.data_weights[k], self._states, self._data)
        state = sum(a * past_state + c * prediction for a, c, past_state, prediction in weights)
        self._step_index += 1
        if self._step_index == self.num_inference_steps:
            raise LeavePipeline(state)
        return self.output(state.to(sample.dtype), return_dict)


def drive(pipe: DiffusionPipeline, algorithm: Algorithm, *, from_noise: bool = False, **pipeline_inputs: Any) -> Any:
    """Runs an algorithm with a pipeline as its network, without gradients, and returns what it returns.

    Args:
        pipe: The pipeline; its scheduler says what the network was trained on and is left as it was.
        algorithm: Called with the noise schedule and the prediction type, a generator that yields `(state, t)`, t in
            [0, 1] the noise schedule's time, and is sent an [`Evaluation`]. The first state is the pipeline's own noise:
            the first request is `(None, t)`. Evaluations may come in any number and order. When the generator returns,
            the pipeline is left before it decodes anything.
        from_noise: Whether the algorithm takes the first state for noise and all others for its own: a pipeline that mixes
            an image with noise (image-to-image, inpainting) is then a `ValueError`.
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
        gradient_checkpointing: Whether network evaluations are repeated in the backward pass, inside [`frozen`] too,
            rather than kept: memory then grows with the number of steps by the states only.
        pipeline_inputs: Arguments of `pipe.__call__`.
    """
    call = getattr(type(pipe).__call__, "__wrapped__", None)
    if call is None:
        raise ValueError(f"{type(pipe).__name__}.__call__ is not decorated with `torch.no_grad()`: cannot undo it.")
    rollout = _Rollout.from_config(scheduler_config(pipe))
    rollout.solver = solver
    checkpointed = _checkpointed if gradient_checkpointing else nullcontext
    with torch.enable_grad(), frozen(pipe), checkpointed(pipe):
        inputs = {**pipeline_inputs, "num_inference_steps": solver.num_inference_steps}
        # The backward pass finds the networks where the forward pass had them.
        return call_with_scheduler(pipe, rollout, call, inputs, free_hooks=False)


def sample_latents(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, num_inference_steps: int, **pipeline_inputs: Any
) -> tuple[Tensor, Tensor]:
    """Initial noise (unit variance) and final state of a pipeline's sampling with any Diffusers scheduler, not decoded.

    The final state is what the last `step` returned. Of a pipeline that starts from an image the first is the noised
    image; a pipeline that doubles its batch for guidance and steps both halves (DiT) returns both.
    """
    scheduler = forgiving_copy(scheduler)
    step = scheduler.step
    noise = None
    steps_done = 0

    @functools.wraps(step)
    def recording_step(model_output, timestep, sample, *args, return_dict=True, **kwargs):
        nonlocal noise, steps_done
        if noise is None:
            noise = sample / scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else sample
        output = step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        steps_done += 1
        if hasattr(scheduler, "begin_index"):
            done = steps_done == len(scheduler.timesteps) - (scheduler.begin_index or 0)
        else:  # It does not know where an image-to-image pipeline began (PNDM, DDIM).
            done = timestep == scheduler.timesteps[-1]
        if done:
            raise LeavePipeline((noise, output[0]))
        return output

    scheduler.step = recording_step
    inputs = {**pipeline_inputs, "num_inference_steps": num_inference_steps}
    return call_with_scheduler(pipe, scheduler, type(pipe).__call__, inputs)


def forgiving_copy(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy that ignores arguments of `step` it does not have: some pipelines pass `generator` to every scheduler."""
    scheduler = copy.deepcopy(scheduler)
    step = scheduler.step
    known = inspect.signature(step).parameters

    @functools.wraps(step)
    def forgiving_step(*args, **kwargs):
        return step(*args, **{name: value for name, value in kwargs.items() if name in known})

    scheduler.step = forgiving_step
    return scheduler


def scheduler_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The config of a pipeline's scheduler; a `ValueError` for a pipeline without one.

    A multistep scheduler's `flow_shift` is also there by the name that it has in Diffusers' flow-matching schedulers.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no `scheduler`: only diffusion pipelines can be sampled.")
    config = dict(scheduler.config)
    return {"shift": config["flow_shift"], **config} if config.get("use_flow_sigmas") else config


@contextmanager
def quiet_sampling(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    """Inside, the pipeline samples with the given scheduler and shows no progress bar."""
    own_scheduler, own_bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
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
    """What a scheduler leaves the pipeline with, by raising [`LeavePipeline`]; a `ValueError` if it never does.

    Args:
        pipe: The pipeline.
        scheduler: What it samples with.
        call: Its `__call__`, or that without `torch.no_grad`.
        inputs: Arguments of the call.
        free_hooks: Whether offloaded networks leave the device afterwards.
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
        f"{type(pipe).__name__} ended its sampling early: after {MAX_EVALUATIONS} evaluations, by a callback, or by "
        "`denoising_end`, without which a solver is to be distilled."
    )


@contextmanager
def frozen(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, none of the pipeline's weights requires a gradient."""
    trainable = [p for network in _networks(pipe) for p in network.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(pipe: DiffusionPipeline) -> Iterator[None]:
    # An instance's own `forward` goes before its class's; under offloading it has one already, a hook.
    own_forwards = {network: network.__dict__.get("forward") for network in _networks(pipe)}
    for network in own_forwards:
        network.forward = functools.partial(checkpoint, network.forward, use_reentrant=False)
    try:
        yield
    finally:
        for network, forward in own_forwards.items():
            if forward is None:
                del network.forward
            else:
                network.forward = forward


def _networks(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]
