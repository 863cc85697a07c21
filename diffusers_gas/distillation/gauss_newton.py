"""Gradient-free distillation: a solver's parameters by damped Gauss-Newton on finite differences of rollouts.

There are a few dozen unknowns, and every sample brings as many residuals as its final state has entries. Nothing is
backpropagated, so that any network serves that a pipeline can run. Beside the memory of sampling, a batch needs one final
state for every unknown.

What is left of the distance at 4 evaluations is not linear in the network's outputs. Weights of their own for the conditional and the
unconditional output would gain 21 % at guidance 7.5, but no scheduler is handed both; weights that depend on two statistics of the
sample 18 %; both 30 %.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from ..generalized_solver import GeneralizedSolver
from ..guided_solver import GuidedSolver
from ..least_squares import DAMPING_START, MOST_TRIALS, Loss, check_finite, damped_step
from ..noise_schedules import NoiseSchedule
from ..pipelines.driving import (
    Requests,
    drive,
    networks_of,
    num_evaluations,
    orthonormal_parameters,
    rollout,
    scheduler_config,
    sensitivities,
    table_of_outputs,
)
from ..pipelines.inputs import BatchSize
from ..pipelines.teacher import LAZY_SHARD_SIZE, LazyTeacherSamples, TeacherSamples
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.diffusers_hooks import has_feature_caches
from ..utils.tensors import FLOAT64


# An iteration linearizes on LINEARIZED samples of all processes. The normal equations of earlier iterations count with the power
# FORGETTING of their age, so that a step is determined by some thirty samples. On 8 alone the iterates scatter.
LINEARIZED, FORGETTING = 8, 0.7

# The gradients of earlier iterations change with a step by the share TRANSPORTED of what their linearizations foretell. A linearization lacks
# the second derivatives, which nearly cancel its curvature in some directions where residuals are large. The whole change would make the
# steps in these directions too short, none of it would make those in the others too long.
TRANSPORTED = 0.5

# Of a sample whose loss is more than OUTLYING times the typical one, only the logarithm of the loss counts: it ends elsewhere than
# the teacher's, no linearization reaches that, and alone it would outweigh all others.
OUTLYING = 3

# The samples that a fit goes around are FIRST_SAMPLES at first. Their number doubles after PASSES times around. After every
# JUDGED_EVERY iterations the solver is judged. A fit has converged when two judgements, and all in a share PATIENCE of its
# iterations, found no improvement that is larger than its standard error.
FIRST_SAMPLES, PASSES, JUDGED_EVERY, PATIENCE = 32, 2, 4, 1 / 3

# Network evaluations that a fit may take by default: so many, and so many times the cube of the steps, as those of an iteration grow.
# Of a fit with a second phase, the last DETAIL_SHARE of them are for the absolute error, too. It then counts DETAIL_WEIGHT times as much as the
# squared.
EVALUATIONS, EVALUATIONS_PER_CUBE = 10_000, 130
DETAIL_SHARE, DETAIL_WEIGHT = 0.25, 5

# Initial solvers that are compared, with that of one step less. For flow matching they are fewer.
NUM_START_CANDIDATES = 7


Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes."""


@dataclass
class GaussNewtonResult:
    """The best solver on the held-out samples, with the record of the fit.

    Attributes:
        initial_distance, distance: Mean squared distance to the teacher on the held-out samples, before and after.
        num_samples: Training samples that were read, of all processes.
        evaluations: Network evaluations of all processes: of the fit, the choice of its start, and the teacher.
        interrupted: Whether Ctrl-C ended the fit.
        recent_gain: Where the fit ended before it had converged: the relative fall of the held-out samples' loss, in the geometric
            mean, over the newest third of the iterations.
    """

    solver: GeneralizedSolver | GuidedSolver
    initial_distance: float
    distance: float
    num_samples: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    recent_gain: float | None = None

    @property
    def ending(self) -> str:
        """Why the fit ended."""
        if self.interrupted:
            return "interrupted."
        if self.recent_gain is None:
            return "converged."
        return (
            f"ended at its limit. The newest third of its iterations lowered the loss by {self.recent_gain:.1%}, and more may lower it "
            "further."
        )


@dataclass
class _Progress:
    """Where a fit is; with the solvers and the normal equations that is all it needs to go on.

    Attributes:
        phase, num_phases: The present phase, and how many there are.
        iteration: Iterations so far, of all phases.
        iterates: Parameters after each iteration of this phase.
        judged: The number of iterates after which a solver was the best, and its loss in the geometric mean.
        gains: What the newest third of the iterations of each phase that had not converged has gained.
        num_samples: Training samples that were read, of all processes.
    """

    num_phases: int
    phase: int = 0
    iteration: int = 0
    iterates: list[Tensor] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    damping: float = DAMPING_START
    training_loss: float = math.nan
    initial_distance: float = math.nan
    num_samples: int = 0
    seconds: float = 0.0

    def average(self) -> Tensor:
        """The mean of the newer half of the iterates."""
        return torch.stack(self.iterates[len(self.iterates) // 2 :]).mean(dim=0)

    def is_due(self) -> bool:
        """Whether a solver is judged after this iterate."""
        return len(self.iterates) % JUDGED_EVERY == 0

    def has_converged(self, knots: int) -> bool:
        """Whether the newest iterates have not improved the solver. Each of several knots is in the samples of a part of the scales."""
        since = len(self.iterates) - self.judged[-1][0]
        return self.is_due() and since >= max(2 * JUDGED_EVERY * knots, PATIENCE * len(self.iterates))

    def recent_gain(self) -> float:
        """The relative fall of the loss over the newest third of the iterates."""
        before = [loss for position, loss in self.judged if position <= len(self.iterates) * 2 / 3]
        return 1 - math.exp(self.judged[-1][1] - before[-1])


def distill_gauss_newton(
    problem: "Problem",
    solver: GeneralizedSolver | GuidedSolver,
    training: TeacherSamples | LazyTeacherSamples,
    validation: TeacherSamples,
    *,
    teacher_num_inference_steps: int = 0,
    detail: bool = False,
    max_evaluations: int | None = None,
    max_iterations: int | None = None,
    on_improvement: Callable[[GeneralizedSolver | GuidedSolver], None] = lambda _: None,
    on_judgement: Callable[[dict[str, float]], None] = lambda _: None,
    on_state: Callable[[int, dict[str, Any]], None] = lambda *_: None,
    state: Mapping[str, Any] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> GaussNewtonResult:
    """Fits a solver to teacher samples, as many as it needs. Ctrl-C ends the fit and keeps the best solver so far.

    An iteration linearizes on the next few samples and takes a damped step by the normal equations of these and, with less
    weight, of those before (incremental Gauss-Newton: Bertsekas, SIAM J. Optim. 6, 1996). The solver is the average of the
    newer half of the iterates (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992), which depends on the choice of the
    samples much less than the iterates do. The number of samples doubles as the fit goes on. It has converged when the solver
    improves on held-out samples no more: neither in the mean loss nor in the geometric mean, which a few samples that end
    elsewhere do not dominate. They do not dominate the steps either: the loss of a sample has Cauchy's robust form.

    The least squared distance leaves a faint grain. With `detail` the fit goes on, from its best solver, with a second phase in
    which the absolute error counts, too. The squared stays in, so that samples that end elsewhere are not given up.

    Args:
        problem: What to minimise. Its evaluations so far, such as those for the initial solver, count as the fit's.
        solver: The initial solver; see [`best_initial_solver`]. It is not changed.
        training: Teacher samples to fit to; only as many as needed are read.
        validation: Teacher samples with other seeds, to choose the best solver by.
        teacher_num_inference_steps: Network evaluations that each of these samples has cost; they count as the fit's, also for those
            that were made with the others and not read.
        detail: Whether a fit to the squared distance has the second phase.
        max_evaluations, max_iterations: The most network evaluations, of all processes, and iterations; see [`limits`].
        on_improvement: Called with every new best solver, e.g. to save it.
        on_judgement: Called with the numbers of every judgement: `training_loss` of the newest iterate on the samples that it was
            linearized on, in the robust form; `validation_loss`, `validation_distance` and `typical_loss`, which are the means, and of the
            loss the geometric one, of the averaged solver on the held-out samples; the `damping` of the next step; and `num_samples`,
            `evaluations` and `seconds` so far, as in [`GaussNewtonResult`].
        on_state: Called after every iteration with its number and what the fit needs to go on from there.
        state: What a call of `on_state` was given, which has the best solver so far. The fit goes on from there and ends as if it
            had not been interrupted. The number of processes may be another.
        interrupted: Called after every iteration; returns whether to end. All processes must return the same. (With Ctrl-C in
            one process the others would wait for it.)
    """
    solver, n, fitted_loss = copy.deepcopy(solver), solver.num_inference_steps, problem.loss
    size, best_solver = problem.share(LINEARIZED), copy.deepcopy(solver)
    fit = _Progress(num_phases=2 if detail and problem.loss == Loss() else 1)
    if state is not None:
        if not vars(fit).keys() <= state.keys():
            raise ValueError("The state of the fit is that of another version of the package: start the fit anew.")
        fit = _Progress(**copy.deepcopy({name: state[name] for name in vars(fit)}))
        best_solver.load_state_dict(state["solver"])
        vector_to_parameters(fit.iterates[-1], solver.parameters())
        problem.normal, problem.gradient = state["normal"], state["gradient"]
        if fit.phase == 1:
            problem.loss = Loss("mixed", state["delta"])
    started = time.monotonic() - fit.seconds
    best = problem.losses_of_samples(best_solver, validation)
    mean, distance, typical = problem.means(*best, _log(best[0]))
    check_finite(mean)
    if state is None:
        fit.initial_distance, fit.judged = distance, [(0, typical)]
    else:  # what it took to go on does not count, so that limits end the fit where they would have ended it
        problem.evaluations = problem.share(state["evaluations"])
    result = GaussNewtonResult(best_solver, fit.initial_distance, distance)

    def num_read() -> int:
        """Samples that this process has read. The fit may have begun in fewer processes."""
        return min(problem.share(fit.num_samples), len(training))

    def next_samples() -> list[int]:
        """Positions of the samples of the next iteration. The second phase takes no new ones."""
        read = max(1, num_read())
        visits = _visits(size, *((problem.share(FIRST_SAMPLES), len(training)) if fit.phase == 0 else (read, read)))
        return next(islice(visits, len(fit.iterates), None))

    def account(num_samples: int) -> dict[str, Any]:
        made = training.num_made(max(1, num_samples)) if isinstance(training, LazyTeacherSamples) else num_samples
        evaluations = (problem.evaluations + teacher_num_inference_steps * len(validation)) * problem.num_processes
        counts = {"num_samples": num_samples, "evaluations": evaluations + teacher_num_inference_steps * made}
        return {**counts, "seconds": time.monotonic() - started}

    knots = num_knots(solver)
    most_iterations, budget = limits(n, max_iterations, max_evaluations, knots)
    per_sample = num_evaluations(n, problem.from_start) + MOST_TRIALS * n
    cost = (size * per_sample + n * len(validation)) * problem.num_processes

    def has_room() -> bool:
        """Whether the limits leave room for another iteration of this phase."""
        share = 1.0 if fit.phase == fit.num_phases - 1 else 1 - DETAIL_SHARE
        spent = account(max(fit.num_samples, (1 + max(next_samples())) * problem.num_processes))["evaluations"]
        return fit.iteration < share * most_iterations and spent + cost <= share * budget

    def iterate() -> None:
        problem.typical_loss = math.exp(fit.judged[-1][1])
        chosen = next_samples()
        read = max(num_read(), 1 + max(chosen))
        samples, fit.num_samples = training[:read][chosen], read * problem.num_processes
        loss = problem.linearize(solver, samples)
        fit.training_loss, fit.damping = problem.descend(solver, samples, loss, fit.damping)
        fit.iterates.append(parameters_to_vector(solver.parameters()).detach())
        fit.iteration += 1

    def judge() -> None:
        nonlocal best
        if not problem.normal.any():  # then it is a network without any derivative, or one that has always overflowed
            check_finite(fit.training_loss)
        average = copy.deepcopy(solver)
        vector_to_parameters(fit.average(), average.parameters())
        found = problem.losses_of_samples(average, validation)
        mean, distance, typical = problem.means(*found, _log(found[0]))
        if problem.is_better(found[0], best[0]):
            best, result.solver, result.distance = found, average, distance
            fit.judged.append((len(fit.iterates), typical))
            on_improvement(average)
        means = {"validation_loss": mean, "validation_distance": distance, "typical_loss": math.exp(typical)}
        spent = account(fit.num_samples)
        on_judgement({"training_loss": fit.training_loss, **means, "damping": fit.damping, **spent})

    def state_now() -> dict[str, Any]:
        return {
            **asdict(fit),
            "solver": result.solver.state_dict(),
            "solver_config": result.solver.config(),
            "delta": problem.loss.delta,
            "normal": problem.normal,
            "gradient": problem.gradient,
            "evaluations": problem.evaluations * problem.num_processes,
            "seconds": time.monotonic() - started,
        }

    def begin_second_phase() -> None:
        nonlocal best
        if fit.iterates:  # the normal equations stay, which 8 samples alone would not determine, at another solver
            problem.transport_gradient(parameters_to_vector(result.solver.parameters()).detach() - fit.iterates[-1])
        solver.load_state_dict(result.solver.state_dict())
        problem.loss = Loss("l1")
        absolute, squared = problem.losses_of_samples(solver, validation)
        means = problem.means(absolute, squared)
        problem.loss = Loss("mixed", DETAIL_WEIGHT * means[1] / max(means[0], 1e-12))
        best = squared + problem.loss.delta * absolute, squared
        fit.phase, fit.damping, fit.iterates = 1, DAMPING_START, []
        fit.judged = [(0, problem.means(_log(best[0]))[0])]

    stop = False
    total = int(min(budget, account(fit.num_samples)["evaluations"] + (most_iterations - fit.iteration) * cost))
    with tqdm(desc=f"{n} steps, Gauss-Newton", unit="evaluation", total=total) as bar:
        try:
            while True:
                while has_room() and not fit.has_converged(knots):
                    iterate()
                    spent = account(fit.num_samples)["evaluations"]
                    shown = {"held_out": f"{result.distance:.3g}"}
                    if teacher_num_inference_steps:
                        shown["teacher_images"] = spent // teacher_num_inference_steps
                    bar.set_postfix(loss=f"{fit.training_loss:.3g}", **shown)
                    bar.update(spent - bar.n)
                    stop = interrupted()
                    if fit.is_due():
                        judge()
                    on_state(fit.iteration, state_now())
                    if stop:
                        break
                if not fit.is_due():  # after the state was kept: a fit that goes on does without
                    judge()
                if stop:
                    raise KeyboardInterrupt
                if not fit.has_converged(knots):
                    fit.gains.append(fit.recent_gain())
                if fit.phase == fit.num_phases - 1:
                    break
                begin_second_phase()
        except KeyboardInterrupt:
            result.interrupted = True
            bar.write("Interrupted: keeping the best solver so far.")
        else:
            result.recent_gain = max(fit.gains, default=None)
            bar.write(f"{n} steps: {result.ending}")
        finally:
            problem.loss = fitted_loss
    return replace(result, **account(fit.num_samples))


def _visits(size: int, num_samples: int, most: int) -> Iterator[list[int]]:
    """Positions of the samples of each iteration, `size` of them, of which there are at first `num_samples` and at most `most`."""
    position, visited, num_samples = 0, 0, min(num_samples, most)
    while True:
        if visited >= PASSES * num_samples and num_samples < most:
            position, visited, num_samples = num_samples, 0, min(2 * num_samples, most)  # new ones first
        yield [(position + i) % num_samples for i in range(min(size, num_samples))]
        position, visited = (position + size) % num_samples, visited + size


def limits(
    num_inference_steps: int, max_iterations: int | None, max_evaluations: int | None, knots: int = 1
) -> tuple[float, float]:
    """The most iterations and network evaluations of a fit; infinite where there is no limit.

    A solver for a range of guidance scales has by default more evaluations, by a half for each knot beyond the first.
    """
    iterations, evaluations = (math.inf if most is None else most for most in (max_iterations, max_evaluations))
    if iterations == evaluations == math.inf:
        evaluations = int((1 + knots) / 2 * (EVALUATIONS + EVALUATIONS_PER_CUBE * num_inference_steps**3))
    return iterations, evaluations


def num_knots(solver: GeneralizedSolver | GuidedSolver) -> int:
    """How many solvers a solver consists of: one for each knot of its range of guidance scales."""
    return len(solver.knots) if isinstance(solver, GuidedSolver) else 1


def most_evaluations(
    num_inference_steps: int,
    teacher_num_inference_steps: int,
    num_teacher_samples: int,
    num_held_out: int,
    max_iterations: int | None = None,
    num_processes: int = 1,
    max_evaluations: int | None = None,
    knots: int = 1,
) -> int:
    """The most network evaluations that a fit takes, with the choice of its start and the teacher's for each sample.

    Raises:
        ValueError: If `max_evaluations` leaves no room for an iteration.
    """
    n, world = num_inference_steps, num_processes

    def most(iterations: int) -> int:
        linearized, first = (math.ceil(number / world) for number in (LINEARIZED, FIRST_SAMPLES))
        visits = islice(_visits(linearized, first, num_teacher_samples // world), iterations)
        read = world * (1 + max((max(chosen) for chosen in visits), default=0))
        made = min(num_teacher_samples, LAZY_SHARD_SIZE * math.ceil(read / LAZY_SHARD_SIZE))
        judgements = 3 + math.ceil(iterations / JUDGED_EVERY)  # at the start and the ends of the phases, too
        evaluations = (
            linearized * world * (NUM_START_CANDIDATES * n + iterations * (num_evaluations(n) + MOST_TRIALS * n))
        )
        return evaluations + judgements * n * num_held_out + teacher_num_inference_steps * (made + num_held_out)

    iterations, budget = limits(n, max_iterations, max_evaluations, knots)
    least = math.ceil(most(1) / (1 - DETAIL_SHARE))  # for one in the first phase
    if budget < least and iterations > 0:
        raise ValueError(
            f"{budget} network evaluations are too few for a fit of {n} steps with {num_held_out} held-out samples: the teacher's samples, "
            f"the choice of a start and an iteration need {least}. Raise `max_evaluations` (`--max_train_evaluations`), or hold out fewer."
        )
    return max(most(0), int(budget if math.isinf(iterations) else min(budget, most(int(iterations)))))


def best_initial_solver(
    problem: "Problem",
    num_inference_steps: int,
    samples: TeacherSamples | LazyTeacherSamples,
    further_candidates: Sequence[GeneralizedSolver | GuidedSolver] = (),
) -> GeneralizedSolver | GuidedSolver:
    """The initial solver: of several candidates the closest to the teacher on as many samples as an iteration takes.

    The closest has the least geometric mean, because a few samples that end elsewhere would decide by the mean of so few.
    Candidates are the pipeline's theory solver with uniform times from t = 1, 0.9, 0.8 and 0.7, and `further_candidates`,
    such as a solver of one step less with [`GeneralizedSolver.with_one_more_step`]. Where alpha(1) > 0, the theory solver
    with Karras times and with times uniform in lambda are candidates, too.
    """
    config = GASScheduler.from_config(scheduler_config(problem.pipe)).config
    settings = [{"t_start": t_start} for t_start in (1.0, 0.9, 0.8, 0.7)]
    if not config.use_flow_sigmas:
        settings += [{"use_karras_sigmas": True}, {"use_lu_lambdas": True}]
    variants = [GASScheduler.from_config(config, **setting) for setting in settings]
    # A solver's times are those before the shift, which may depend on the resolution.
    theory = [variant.theory_solver(num_inference_steps, mu=1.0) for variant in variants]
    first = samples[: problem.share(LINEARIZED)]

    def loss_of(candidate: GeneralizedSolver | GuidedSolver) -> float:
        losses, _ = problem.losses_of_samples(candidate, first)
        (typical,) = problem.means(_log(losses))
        return typical if math.isfinite(typical) else math.inf

    return min([*theory, *further_candidates], key=loss_of)


class Problem:
    """The least-squares problem of one pipeline and loss.

    `evaluations` counts the network evaluations of this process, over all samples, but for calls that ran out of memory: all processes
    must count the same, as they end by it. `typical_loss` is that of a sample, beside which
    others are outliers; infinite if there are none.

    Args:
        pipe: The pipeline. It is sampled, never differentiated.
        loss: The loss to minimise; the mean squared distance of final states by default.
        batch_size: The most samples per pipeline call.
        reduce: Sums a tensor over the processes. Each process holds an equal share of the samples.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        loss: Loss | None = None,
        batch_size: int | BatchSize = 64,
        reduce: Reduce = lambda tensor: tensor,
    ):
        self.pipe, self.loss, self.batch_size, self.reduce = pipe, loss or Loss(), batch_size, reduce
        self.num_processes = round(reduce(torch.ones(1, **FLOAT64)).item())
        self.evaluations = 0
        self.normal = self.gradient = torch.zeros((), **FLOAT64)
        self.typical_loss = math.inf

    @property
    def from_start(self) -> bool:
        """Whether `linearize` samples from the start for every derivative: feature caches remember earlier evaluations."""
        return has_feature_caches(networks_of(self.pipe))

    def share(self, number: int) -> int:
        """A number of samples of all processes as the number of each of them, rounded up."""
        return math.ceil(number / self.num_processes)

    def losses(self, solver: GeneralizedSolver | GuidedSolver, samples: TeacherSamples) -> tuple[float, float]:
        """The loss and the mean squared distance of a solver on samples."""
        loss, distance = self.means(*self.losses_of_samples(solver, samples))
        return loss, distance

    def losses_of_samples(
        self, solver: GeneralizedSolver | GuidedSolver, samples: TeacherSamples
    ) -> tuple[Tensor, Tensor]:
        """Loss and squared distance of each of this process's samples, float64 of shape `(num_samples,)`."""

        def of_batch(batch: TeacherSamples) -> tuple[Tensor, Tensor]:
            used, _, weight = self._at(solver, batch)
            final = rollout(self.pipe, used, **batch.inputs.pipeline_arguments(self.pipe))[: len(batch)]
            teacher = batch.final.to(final)
            values = weight * self.loss.value(self.loss.residual(final, teacher)), (final - teacher).square()
            losses, distances = (value.flatten(1).mean(dim=1).cpu().double() for value in values)
            self.evaluations += used.num_inference_steps * len(batch)
            return losses, distances

        losses, distances = zip(*samples.map_calls(self.batch_size, of_batch))
        return torch.cat(losses), torch.cat(distances)

    def _at(
        self, solver: GeneralizedSolver | GuidedSolver, samples: TeacherSamples
    ) -> tuple[GeneralizedSolver, Tensor, float]:
        """The solver for the guidance scale of samples, the weights of the knots in it, and that of the samples in the loss."""
        if isinstance(solver, GeneralizedSolver):
            return solver, torch.ones(1, **FLOAT64), 1.0
        scale = samples.inputs.value(solver.argument) or solver.usual_scale
        # Guidance multiplies a difference of outputs, and with it the error of a sampling.
        return solver.at(scale), solver.basis(scale), (solver.usual_scale / scale) ** 2

    def means(self, *values: Tensor) -> list[float]:
        """Means over the samples of all processes."""
        count, *sums = self.reduce(torch.stack([torch.ones_like(values[0]), *values]).sum(dim=1)).tolist()
        return [total / count for total in sums]

    def robust(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Samples' losses in Cauchy's robust form, c log(1 + loss / c), and its derivative, 1 / (1 + loss / c).

        Both are of least squares in which a sample counts as the derivative says (iterative reweighting).
        """
        c = max(OUTLYING * self.typical_loss, 1e-20)
        return (losses if math.isinf(c) else c * (losses / c).log1p()), 1 / (1 + losses / c)

    def is_better(self, losses: Tensor, before: Tensor) -> bool:
        """Whether samples' losses have fallen by more than the standard error, in the mean or the geometric mean.

        The other must not have risen by two errors.
        """
        falls = [before - losses, _log(before) - _log(losses)]
        means = self.means(*falls, *(fall.square() for fall in falls))
        count = len(losses) * self.num_processes
        gains = [(gain, math.sqrt(max(square - gain**2, 0.0) / count)) for gain, square in zip(means[:2], means[2:])]
        return any(gain > error for gain, error in gains) and all(gain >= -2 * error for gain, error in gains)

    def linearize(self, solver: GeneralizedSolver | GuidedSolver, samples: TeacherSamples) -> float:
        """Adds the normal equations of the loss in the solver's parameters to those of earlier samples, which count less.

        Returns the loss.
        """
        groups = samples.of_each(solver.argument) if isinstance(solver, GuidedSolver) else [samples]
        of_scales = [self._equations(solver, group) for group in groups]
        normal, gradient, loss, count = (self.reduce(torch.stack(sums).sum(0)) for sums in zip(*of_scales))
        normal, gradient = normal / count, gradient / count
        if not (normal.isfinite().all() and gradient.isfinite().all()):  # an overflow would be remembered
            normal, gradient = torch.zeros_like(normal), torch.zeros_like(gradient)
        # Each of several knots is in the samples of a part of the scales only.
        kept = FORGETTING ** (1 / num_knots(solver))
        self.normal, self.gradient = kept * self.normal + normal, kept * self.gradient + gradient
        return (loss / count).item()

    def _equations(
        self, guided: GeneralizedSolver | GuidedSolver, samples: TeacherSamples
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over this process's samples of one guidance scale: normal matrix, gradient, loss, and the number of residuals."""
        solver, basis, weight = self._at(guided, samples)
        mixing: Tensor | None = None
        network: tuple[NoiseSchedule, str]

        def differences(noise_schedule: NoiseSchedule, prediction_type: str) -> Requests:
            nonlocal network
            network = noise_schedule, prediction_type
            return sensitivities(table_of_outputs(solver, *network), mixing, self.from_start)

        def equations(batch: TeacherSamples) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            nonlocal mixing
            inputs, n = batch.inputs.pipeline_arguments(self.pipe), solver.num_inference_steps
            final, neighbours, mixing = drive(self.pipe, differences, **{**inputs, "num_inference_steps": n})
            # DiT steps both halves of its doubled batch for guidance, and decodes the first half.
            final, neighbours = final[: len(batch)], [(state[: len(batch)], size) for state, size in neighbours]
            embedded = self.loss.embed(final)
            residual = embedded - self.loss.embed(batch.final.to(final))
            columns = torch.stack([(self.loss.embed(x) - embedded).flatten() / size for x, size in neighbours])
            losses, shares = self.robust(weight * self.loss.value(residual).mean(dim=1))
            weighted = columns * (weight * shares[:, None] * self.loss.weight(residual)).flatten()
            sums = weighted @ columns.T, weighted @ residual.flatten(), losses.sum() * residual.shape[1]
            normal, gradient, loss = (value.cpu().double() for value in sums)
            self.evaluations += num_evaluations(n, self.from_start) * len(batch)
            return normal, gradient, loss, torch.tensor(residual.numel(), **FLOAT64)

        batches = zip(*samples.map_calls(self.batch_size, equations))
        normal, gradient, loss, count = (torch.stack(sums).sum(0) for sums in batches)
        # Every process and every scale has a basis of its own. The solver's parameters are common to all.
        assert mixing is not None
        jacobian = _jacobian(orthonormal_parameters(solver, *network, mixing), list(solver.parameters()))
        normal, gradient = jacobian.T @ normal @ jacobian, jacobian.T @ gradient
        # The parameters at a scale are sums of those at the knots.
        return torch.kron(basis.outer(basis), normal), torch.kron(basis, gradient), loss, count

    def descend(
        self, solver: GeneralizedSolver | GuidedSolver, samples: TeacherSamples, current: float, damping: float
    ) -> tuple[float, float]:
        """Takes one step downhill. The damping grows until a step succeeds. Returns the new loss and the next damping."""
        start = parameters_to_vector(solver.parameters()).detach()

        def move(step: Tensor) -> None:
            vector_to_parameters(start + step, solver.parameters())
            solver.clamp_offsets()

        def loss_of(step: Tensor) -> float:
            move(step)
            losses, _ = self.losses_of_samples(solver, samples)
            return self.means(self.robust(losses)[0])[0]

        step, loss, damping = damped_step(self.normal, self.gradient, loss_of, current, damping)
        move(step)
        self.transport_gradient(parameters_to_vector(solver.parameters()).detach() - start)
        return loss, damping

    def transport_gradient(self, moved: Tensor) -> None:
        """Changes the gradient of earlier iterations with a change of the solver's parameters."""
        self.gradient = self.gradient + TRANSPORTED * self.normal @ moved


def _log(values: Tensor) -> Tensor:
    """Logarithms; that of 0 is finite."""
    return values.clamp_min(torch.finfo(values.dtype).tiny).log()


def _jacobian(values: Tensor, parameters: list[Tensor]) -> Tensor:
    """Derivatives of a vector by parameters, in the order of `parameters_to_vector`."""
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])
