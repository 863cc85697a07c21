"""Gradient-free distillation: a solver's parameters by damped Gauss-Newton on finite differences of rollouts.

There are a few dozen unknowns and thousands of residuals. Nothing is backpropagated, so that any network serves that a
pipeline can run. Beside the memory of sampling, a batch needs one final state for every unknown.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import NoiseSchedule
from ..pipelines.driving import Algorithm, Requests, drive, rollout
from ..pipelines.teacher import TeacherSamples
from ..schedulers.scheduling_gas import GASScheduler
from .finite_differences import num_evaluations, orthonormal_parameters, sensitivities, table_of_outputs
from .losses import Loss


# Marquardt's damping, relative to the diagonal of the normal equations: the start, the bounds, and the factors after a step
# that succeeded at once and after one that failed. At the upper bound steps are too short to matter.
DAMPING_START, DAMPING_MIN, DAMPING_MAX = 1e-2, 1e-9, 1e4
DAMPING_DECREASE, DAMPING_INCREASE = 5, 8

# Samples on which initial solvers are compared.
NUM_START_SAMPLES = 128

# A fit begins with FIRST_STAGE samples. Their number doubles when an iteration gains less than the fraction STAGE_GAIN. This
# is early, so that the solver does not converge to the optimum of the first samples alone. With all samples, a gain below
# FINAL_GAIN ends the fit.
STAGE_GAIN, FIRST_STAGE = 0.25, 256
FINAL_GAIN = 0.002


Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes."""


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
    """The best solver on the held-out samples, with the record of the fit.

    Attributes:
        initial_distance, distance: Mean squared distance to the teacher on the held-out samples, before and after.
        evaluations: Network evaluations of this process, over all samples.
        interrupted: Whether Ctrl-C ended the fit.
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
    reduce: Reduce = lambda tensor: tensor,
) -> GaussNewtonResult:
    """Fits a solver to teacher samples. The fit ends by itself. Ctrl-C ends it sooner and keeps the best solver so far.

    Args:
        pipe: The pipeline. It is sampled, never differentiated.
        solver: The initial solver; see [`best_initial_solver`]. It is not changed.
        training, validation: Teacher samples with different seeds: the first to fit to, the second to choose the best solver.
        loss: The loss to minimise; the mean squared distance of final states by default.
        batch_size: Samples per pipeline call.
        max_iterations, max_seconds: Upper limits.
        patience: Iterations on all samples without a new best on the held-out ones before it stops.
        on_improvement: Called with every new best solver, e.g. to save it.
        on_iteration: Called with every entry of the history.
        interrupted: Called after every iteration; returns whether to end. All processes must return the same. (With Ctrl-C in
            one process the others would wait for it.)
        reduce: Sums a tensor over the processes. Each process holds an equal share of the samples.
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
    samples = training[:FIRST_STAGE]
    current, _ = problem.losses(solver, samples)
    damping, stale = DAMPING_START, 0

    description = f"{solver.num_inference_steps} steps, Gauss-Newton"
    with tqdm(range(max_iterations), desc=description, unit="iteration") as bar:
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
                # All processes must end together, although their clocks differ.
                if max_seconds is not None and reduce(torch.tensor([float(seconds > max_seconds)])) > 0:
                    break
                gain = 1 - current / previous if previous > 0 else 0.0
                if len(samples) == len(training):
                    if gain < FINAL_GAIN or stale >= patience:
                        break
                elif gain < STAGE_GAIN:
                    samples, stale, damping = training[: 2 * len(samples)], 0, min(damping, DAMPING_START)
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
    reduce: Reduce = lambda tensor: tensor,
) -> GeneralizedSolver:
    """The initial solver: of several candidates the closest to the teacher on the first `NUM_START_SAMPLES` samples.

    Candidates are the pipeline's theory solver with uniform times from t = 1, 0.9, 0.8 and 0.7, and `further_candidates`,
    such as a solver of one step less with [`GeneralizedSolver.with_one_more_step`]. Where alpha(1) > 0, the theory solver
    with Karras times and with times uniform in lambda are candidates, too.
    """
    config = GASScheduler.from_config(pipe.scheduler.config).config
    settings = [{"t_start": t_start} for t_start in (1.0, 0.9, 0.8, 0.7)]
    if not config.use_flow_sigmas:
        settings += [{"use_karras_sigmas": True}, {"use_lu_lambdas": True}]
    variants = [GASScheduler.from_config(config, **setting) for setting in settings]
    # A solver's times are those before the shift, which may depend on the resolution.
    theory = [variant.theory_solver(num_inference_steps, mu=1.0) for variant in variants]
    candidates = [*theory, *further_candidates]
    problem = Problem(pipe, loss or Loss(), batch_size, reduce)

    def loss_of(candidate: GeneralizedSolver) -> float:
        value, _ = problem.losses(candidate, samples[:NUM_START_SAMPLES])
        return value if math.isfinite(value) else math.inf

    return min(candidates, key=loss_of)


class Problem:
    """The least-squares problem of one pipeline and loss; arguments are those of [`distill_gauss_newton`].

    `evaluations` counts the network evaluations of this process, over all samples.
    """

    def __init__(self, pipe: DiffusionPipeline, loss: Loss, batch_size: int, reduce: Reduce = lambda tensor: tensor):
        self.pipe, self.loss, self.batch_size, self.reduce = pipe, loss, batch_size, reduce
        self.evaluations = 0

    def losses(self, solver: GeneralizedSolver, samples: TeacherSamples) -> tuple[float, float]:
        """The loss and the mean squared distance of a solver on samples."""
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in samples.batches(self.batch_size):
            final = self._drive(solver, rollout(solver.table), batch, solver.num_inference_steps)[: len(batch)]
            teacher = batch.final.to(final)
            residual = self.loss.residual(final, teacher)
            loss = self.loss.value(residual).mean() * len(batch)
            distance = (final - teacher).square().mean() * len(batch)
            sums += torch.tensor([loss.item(), distance.item(), len(batch)], dtype=torch.float64)
        loss, distance, count = self.reduce(sums).tolist()
        return loss / count, distance / count

    def linearize(self, solver: GeneralizedSolver, samples: TeacherSamples) -> None:
        """Computes the normal equations of the loss in the solver's parameters."""
        mixing: Tensor | None = None
        network: tuple[NoiseSchedule, str]
        normal = gradient = count = torch.zeros(1, dtype=torch.float64)

        def differences(noise_schedule: NoiseSchedule, prediction_type: str) -> Requests:
            nonlocal network
            network = noise_schedule, prediction_type
            return sensitivities(table_of_outputs(solver, *network), mixing)

        for batch in samples.batches(self.batch_size):
            cost = num_evaluations(solver.num_inference_steps)
            final, neighbours, mixing = self._drive(solver, differences, batch, cost)
            # DiT steps both halves of its doubled batch for guidance, and decodes the first half.
            final, neighbours = final[: len(batch)], [(state[: len(batch)], size) for state, size in neighbours]
            embedded = self.loss.embed(final)
            residual = embedded - self.loss.embed(batch.final.to(final))
            columns = torch.stack([(self.loss.embed(x) - embedded).flatten() / size for x, size in neighbours])
            weighted = columns * self.loss.weight(residual).flatten()
            normal = normal + (weighted @ columns.T).cpu().double()
            gradient = gradient + (weighted @ residual.flatten()).cpu().double()
            count = count + residual.numel()
        # Every process has a basis of its own. The solver's parameters are common to all.
        assert mixing is not None
        jacobian = _jacobian(orthonormal_parameters(solver, *network, mixing), list(solver.parameters()))
        count = self.reduce(count)
        self.normal = self.reduce(jacobian.T @ normal @ jacobian) / count
        self.gradient = self.reduce(jacobian.T @ gradient) / count

    def descend(
        self, solver: GeneralizedSolver, samples: TeacherSamples, current: float, damping: float
    ) -> tuple[float, float]:
        """Takes one step downhill. The damping grows until a step succeeds. Returns the new loss and the next damping."""
        # Marquardt's scaling. Parameters without any effect (unused entries) get a step of 0.
        diagonal = self.normal.diagonal()
        scale = diagonal.clamp_min(1e-12 * diagonal.max()).rsqrt()
        scaled = scale[:, None] * self.normal * scale
        start = torch.nn.utils.parameters_to_vector(solver.parameters()).detach()
        first = damping
        while damping <= DAMPING_MAX:
            system = scaled + damping * torch.eye(len(scaled), dtype=torch.float64)
            step = -scale * torch.linalg.solve(system, scale * self.gradient)
            torch.nn.utils.vector_to_parameters(start + step, solver.parameters())
            loss, _ = self.losses(solver, samples)
            if loss < current:
                return loss, max(damping / DAMPING_DECREASE, DAMPING_MIN) if damping == first else damping
            damping *= DAMPING_INCREASE
        torch.nn.utils.vector_to_parameters(start, solver.parameters())
        return current, damping

    def _drive(self, solver: GeneralizedSolver, algorithm: Algorithm, batch: TeacherSamples, cost: int) -> Any:
        self.evaluations += cost * len(batch)
        inputs = batch.inputs.pipeline_arguments(self.pipe)
        # A pipeline may derive its shift from the number of steps.
        inputs["num_inference_steps"] = solver.num_inference_steps
        return drive(self.pipe, algorithm, from_noise=True, **inputs)


def _jacobian(values: Tensor, parameters: list[Tensor]) -> Tensor:
    """Derivatives of a vector by parameters, in the order of `parameters_to_vector`."""
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])
