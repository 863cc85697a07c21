"""Gradient-free distillation: a solver's parameters by damped Gauss-Newton on finite differences of rollouts.

A few dozen unknowns, thousands of residuals, no backpropagation: any network that a pipeline can run will do. Beside what
sampling takes, memory holds one final state of a batch for every unknown.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..generalized_solver import GeneralizedSolver
from ..pipelines.driving import drive
from ..pipelines.teacher import TeacherSamples
from ..schedulers.scheduling_gas import GASScheduler
from .finite_differences import Sampler, orthonormal_parameters
from .losses import Loss


# Marquardt's damping, relative to the diagonal of the normal equations: start, bounds, and factors after a step that
# succeeded at once or failed. Past the upper bound the step is that of gradient descent, and too short to matter.
DAMPING_START, DAMPING_MIN, DAMPING_MAX = 1e-2, 1e-9, 1e4
DAMPING_DECREASE, DAMPING_INCREASE = 5, 8

# What a choice of the first solver needs.
NUM_START_SAMPLES = 128

# The number of samples doubles, from this number on, when an iteration gains less than this fraction: early enough not to
# settle where only the first samples lead. Once all are in use, a gain below the second fraction ends the fit.
STAGE_GAIN, FIRST_STAGE = 0.25, 256
FINAL_GAIN = 0.002


@dataclass
class Iteration:
    """One line of a fit's history; losses and distances are means over all entries."""

    num_samples: int
    training_loss: float
    validation_loss: float
    validation_distance: float
    damping: float
    evaluations: int
    seconds: float


@dataclass
class GaussNewtonResult:
    """The best solver on the held-out samples, and how it was found.

    Attributes:
        solver: The best solver.
        initial_distance, distance: Mean squared distance to the teacher on the held-out samples, before and after.
        evaluations: Network evaluations spent on all samples (of this process) together.
        seconds: Time spent.
        interrupted: Whether Ctrl-C ended it.
        history: The iterations.
    """

    solver: GeneralizedSolver
    initial_distance: float
    distance: float
    evaluations: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    history: list[Iteration] = field(default_factory=list)


def distill_gauss_newton(
    pipe: DiffusionPipeline,
    solver: GeneralizedSolver,
    training: TeacherSamples,
    validation: TeacherSamples,
    *,
    loss: Loss | None = None,
    batch_size: int = 64,
    max_iterations: int = 60,
    max_seconds: float | None = None,
    patience: int = 6,
    on_improvement: Callable[[GeneralizedSolver], None] | None = None,
    on_iteration: Callable[[Iteration], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> GaussNewtonResult:
    """Fits a solver to teacher samples. Ends by itself; Ctrl-C ends it sooner and keeps the best solver so far.

    Args:
        pipe: The pipeline; only sampled, never differentiated.
        solver: Where to start from; see [`best_initial_solver`]. Left as it is.
        training, validation: Teacher samples to fit and to judge by, of different seeds.
        loss: What to minimise; the mean squared distance of final states by default.
        batch_size: Samples per pipeline call.
        max_iterations, max_seconds: Upper limits.
        patience: Iterations on all samples without a new best on the held-out ones before it stops.
        on_improvement: Called with every new best solver, e.g. to save it.
        on_iteration: Called with every entry of the history.
        interrupted: Asked after every iteration whether to end, the same in all processes; Ctrl-C alone would leave some of
            them waiting for others.
        reduce: Sums a tensor over the processes that each hold an equally large share of the samples.
    """
    problem = Problem(pipe, loss or Loss(), batch_size, reduce)
    solver = copy.deepcopy(solver)
    started = time.monotonic()
    best_loss, distance = problem.losses(solver, validation)
    if not math.isfinite(best_loss):
        raise ValueError(
            "The teacher's or the student's samples are not finite. Check the pipeline's output in this precision: some "
            "networks overflow in float16."
        )
    result = GaussNewtonResult(copy.deepcopy(solver), distance, distance)
    stages = _stages(len(training))
    samples = training[: next(stages)]
    current, _ = problem.losses(solver, samples)
    damping, stale = DAMPING_START, 0

    with tqdm(
        range(max_iterations), desc=f"{solver.num_inference_steps} steps, Gauss-Newton", unit="iteration"
    ) as bar:
        try:
            for _ in bar:
                problem.linearize(solver, samples)
                previous = current
                current, damping = problem.descend(solver, samples, current, damping)
                validation_loss, distance = problem.losses(solver, validation)
                stale += 1
                if validation_loss < best_loss:
                    best_loss, stale = validation_loss, 0
                    result.solver, result.distance = copy.deepcopy(solver), distance
                    if on_improvement is not None:
                        on_improvement(result.solver)
                seconds = time.monotonic() - started
                result.history.append(
                    Iteration(len(samples), current, validation_loss, distance, damping, problem.evaluations, seconds)
                )
                if on_iteration is not None:
                    on_iteration(result.history[-1])
                bar.set_postfix(loss=f"{current:.3g}", held_out=f"{best_loss:.3g}", evaluations=problem.evaluations)
                if interrupted is not None and interrupted():
                    raise KeyboardInterrupt
                # Processes must agree, and their clocks do not.
                if max_seconds is not None and reduce(torch.tensor([float(seconds > max_seconds)])) > 0:
                    break
                gain = 1 - current / previous if previous > 0 else 0.0
                if len(samples) == len(training):
                    if gain < FINAL_GAIN or stale >= patience:
                        break
                elif gain < STAGE_GAIN:
                    samples, stale, damping = training[: next(stages)], 0, min(damping, DAMPING_START)
                    current, _ = problem.losses(solver, samples)
        except KeyboardInterrupt:
            result.interrupted = True
            bar.write("Interrupted: keeping the best solver so far.")
    result.evaluations, result.seconds = problem.evaluations, time.monotonic() - started
    return result


def best_initial_solver(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    samples: TeacherSamples,
    *,
    further_candidates: Sequence[GeneralizedSolver] = (),
    loss: Loss | None = None,
    batch_size: int = 64,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> GeneralizedSolver:
    """The solver to start from: of several the one that comes closest to the teacher on the first `NUM_START_SAMPLES`.

    Candidates are the pipeline's theory solver with uniform times from t = 1, 0.9, 0.8 and 0.7, where alpha(1) > 0 also
    with Karras times and times uniform in lambda, and `further_candidates`, such as a solver of one step less with
    [`GeneralizedSolver.with_one_more_step`].
    """
    scheduler = GASScheduler.from_config(pipe.scheduler.config)
    problem = Problem(pipe, loss or Loss(), batch_size, reduce)
    candidates = [*_theory_candidates(scheduler, num_inference_steps), *further_candidates]
    losses = [problem.losses(candidate, samples[:NUM_START_SAMPLES])[0] for candidate in candidates]
    return candidates[min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)]


def _theory_candidates(scheduler: GASScheduler, num_inference_steps: int) -> Iterator[GeneralizedSolver]:
    settings = [{"t_start": t_start} for t_start in (1.0, 0.9, 0.8, 0.7)]
    if not scheduler.config.use_flow_sigmas:
        settings += [{"use_karras_sigmas": True}, {"use_lu_lambdas": True}]
    for setting in settings:
        variant = GASScheduler.from_config(scheduler.config, **setting)
        # A solver's times do not depend on the resolution's shift, which comes after them.
        yield variant.theory_solver(num_inference_steps, mu=1.0)


def _stages(num_samples: int) -> Iterator[int]:
    stage = FIRST_STAGE
    while stage < num_samples:
        yield stage
        stage *= 2
    yield num_samples


class Problem:
    """The least-squares problem of one pipeline and loss.

    Args:
        pipe: The pipeline.
        loss: What to minimise.
        batch_size: Samples per pipeline call.
        reduce: Sums a tensor over processes.

    Attributes:
        evaluations: Network evaluations spent on all samples (of this process) together.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        loss: Loss,
        batch_size: int,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self.pipe, self.loss, self.batch_size, self.reduce = pipe, loss, batch_size, reduce
        self.evaluations = 0

    def losses(self, solver: GeneralizedSolver, samples: TeacherSamples) -> tuple[float, float]:
        """The loss and the mean squared distance of a solver on samples."""

        def rollout(noise_schedule, prediction_type):
            return Sampler.of(solver, noise_schedule, prediction_type).rollout()

        sums = torch.zeros(3, dtype=torch.float64)
        for batch in samples.batches(self.batch_size):
            final = self._drive(rollout, batch, solver.num_inference_steps)[: len(batch)]
            teacher = batch.final.to(final)
            residual = self.loss.residual(final, teacher)
            loss = self.loss.value(residual).mean() * len(batch)
            distance = (final - teacher).square().mean() * len(batch)
            sums += torch.tensor([loss.item(), distance.item(), len(batch)], dtype=torch.float64)
        loss, distance, count = self.reduce(sums).tolist()
        return loss / count, distance / count

    def linearize(self, solver: GeneralizedSolver, samples: TeacherSamples) -> None:
        """Sets up the normal equations of the loss in the solver's parameters."""
        mixing, context = None, ()
        normal, gradient, count = 0, 0, torch.zeros(1, dtype=torch.float64)

        def sensitivities(*network):
            nonlocal context
            context = network
            return Sampler.of(solver, *network).sensitivities(mixing)

        for batch in samples.batches(self.batch_size):
            final, neighbours, mixing = self._drive(sensitivities, batch, Sampler.cost(solver.num_inference_steps))
            # A pipeline that steps both halves of its guidance (DiT) decodes the first.
            final, neighbours = final[: len(batch)], [(state[: len(batch)], size) for state, size in neighbours]
            embedded = self.loss.embed(final)
            residual = embedded - self.loss.embed(batch.final.to(final))
            columns = torch.stack([(self.loss.embed(x) - embedded).flatten() / size for x, size in neighbours])
            weighted = columns * self.loss.weight(residual).flatten()
            normal = normal + (weighted @ columns.T).cpu().double()
            gradient = gradient + (weighted @ residual.flatten()).cpu().double()
            count += residual.numel()
        # Every process has a basis of its own; what they share is the solver's parameters.
        jacobian = _jacobian(solver, lambda s: orthonormal_parameters(s, *context, mixing))
        count = self.reduce(count)
        self.normal = self.reduce(jacobian.T @ normal @ jacobian) / count
        self.gradient = self.reduce(jacobian.T @ gradient) / count

    def descend(
        self, solver: GeneralizedSolver, samples: TeacherSamples, current: float, damping: float
    ) -> tuple[float, float]:
        """Moves the solver downhill, with more damping until that succeeds; returns its loss and the next damping."""
        # Marquardt's scaling; parameters without any effect (unused entries) get a step of 0.
        diagonal = self.normal.diagonal().clamp_min(1e-12 * self.normal.diagonal().max())
        scale = diagonal.rsqrt()
        scaled = scale[:, None] * self.normal * scale
        start = torch.nn.utils.parameters_to_vector(solver.parameters()).detach()
        failures = 0
        while damping <= DAMPING_MAX:
            system = scaled + damping * torch.eye(len(scaled), dtype=torch.float64)
            step = -scale * torch.linalg.solve(system, scale * self.gradient)
            torch.nn.utils.vector_to_parameters(start + step, solver.parameters())
            loss, _ = self.losses(solver, samples)
            if loss < current:
                return loss, damping if failures else max(damping / DAMPING_DECREASE, DAMPING_MIN)
            failures += 1
            damping *= DAMPING_INCREASE
        torch.nn.utils.vector_to_parameters(start, solver.parameters())
        return current, damping

    def _drive(self, algorithm, batch: TeacherSamples, cost: int):
        self.evaluations += cost * len(batch)
        return drive(self.pipe, algorithm, from_noise=True, **batch.inputs.pipeline_arguments(self.pipe))


def _jacobian(solver: GeneralizedSolver, function: Callable[[GeneralizedSolver], Tensor]) -> Tensor:
    """Derivatives of a vector by all of a solver's parameters, in the order of `parameters_to_vector`."""
    values = function(solver)
    parameters = list(solver.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])
