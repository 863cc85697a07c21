"""Gradient-based distillation: the published recipe of GS and GAS (arXiv 2510.17699), through differentiable rollouts.

No random state carries over from one step to the next: the samples of a step, their noise and the state of every generator
follow from the seed and the number of the step. Therefore a checkpoint holds parameters and optimizers only. The split of a
step's samples over processes and accumulated batches changes only the order in which sums are taken.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ..generalized_solver import GeneralizedSolver
from ..least_squares import Loss
from ..pipelines.driving import differentiable_rollout, frozen, repeated_blocks, rollout
from ..pipelines.teacher import TeacherSamples
from ..utils.tensors import FLOAT64
from .adversarial import Adversary


# Seeds of the discriminator's own fakes. They differ from all training and evaluation seeds, and fit the 32 bits that a CPU
# generator uses.
FRESH_NOISE_SEED = 2**31

# `piecewise_constant` needs rules, for which there is no setting.
LEARNING_RATE_SCHEDULES = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]


@dataclass
class Recipe:
    """Gradient-based training (defaults: the published recipe).

    Args:
        max_train_steps: Optimizer steps. The default was published for pixel space; for LSUN's and ImageNet's latents it
            is 30 000, for Stable Diffusion 2 000.
        train_batch_size: Samples per pipeline call and process.
        gradient_accumulation_steps: Pipeline calls per optimizer step.
        learning_rate: Adam's.
        lr_scheduler, lr_warmup_steps: As in Diffusers' training scripts.
        max_grad_norm: Norm that the gradient is clipped to.
        ema_decay: Of the averaged parameters. The decay rises to it as (1 + step) / (10 + step).
        gradient_checkpointing: Whether network evaluations, and in them the blocks of Diffusers' networks, are repeated in the
            backward pass instead of kept.
        seed: Of the order of samples and the discriminator's fakes; for the command line also the first sample's.
    """

    max_train_steps: int = 10_000
    train_batch_size: int = 24
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    # The metadata is for the command line.
    lr_scheduler: str = field(default="constant", metadata={"choices": LEARNING_RATE_SCHEDULES})
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    gradient_checkpointing: bool = False
    seed: int = 0


class GradientDescent:
    """The training of one solver. [`step`] makes one optimizer step.

    Args:
        pipe, training: The pipeline, and samples of its teacher.
        solver: The solver to start from; left as it is.
        loss: The distillation loss; published: L1 for latents, LPIPS for pixels.
        recipe: The settings.
        accelerator: The processes. Each process computes a share of every step.
        adversary: The opponent for GAS; `None` for GS.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        pipe: DiffusionPipeline,
        solver: GeneralizedSolver,
        training: TeacherSamples,
        *,
        loss: Loss,
        recipe: Recipe,
        accelerator: Accelerator,
        adversary: Adversary | None = None,
    ):
        self.pipe, self.training, self.loss, self.recipe = pipe, training, loss, recipe
        self.accelerator, self.adversary = accelerator, adversary
        self.solver = copy.deepcopy(solver)
        self.optimizer = torch.optim.Adam(self.solver.parameters(), lr=recipe.learning_rate)
        lengths = {"num_warmup_steps": recipe.lr_warmup_steps, "num_training_steps": recipe.max_train_steps}
        self.lr_scheduler = get_scheduler(recipe.lr_scheduler, self.optimizer, **lengths)
        self.ema = EMAModel(self.solver.parameters(), decay=recipe.ema_decay)
        self.steps_done = self.evaluations = 0
        # The gradient of a mean at a single entry is one over the number of entries, which half precision rounds away. The
        # scaled gradient is of order one. Scaling by a power of two, and back, is exact.
        self._loss_scale = 2.0 ** int(math.log2(training.final[0].numel() * recipe.train_batch_size))

    @property
    def total_batch_size(self) -> int:
        """Samples per step in all processes together."""
        recipe = self.recipe
        return recipe.train_batch_size * recipe.gradient_accumulation_steps * self.accelerator.num_processes

    def averaged_solver(self) -> GeneralizedSolver:
        """The solver with averaged parameters. This solver is evaluated and saved."""
        solver = copy.deepcopy(self.solver)
        self.ema.copy_to(solver.parameters())
        return solver

    @torch.inference_mode(False)  # in which there are gradients, whatever is set outside
    def step(self) -> dict[str, float]:
        """Makes one optimizer step, of the discriminator too; returns means over the step's samples for a log.

        Raises:
            ValueError: If a loss or its gradient is not finite. The parameters of this loss are not changed then.
        """
        set_seed(self.recipe.seed + self.steps_done)
        batches = list(self._batches())
        checkpointed = repeated_blocks if self.recipe.gradient_checkpointing else nullcontext
        with frozen(self.pipe), checkpointed(self.pipe):
            if self.adversary is None:
                log, _ = self._update_solver(batches)
            elif self.steps_done < self.adversary.recipe.discriminator_warmup_steps:
                log = self._update_discriminator(self.adversary, batches, map(self._fresh_samples, batches))
            elif self.adversary.recipe.reuse_fakes:
                log, students = self._update_solver(batches)
                log |= self._update_discriminator(self.adversary, batches, students)
            else:
                log = self._update_discriminator(self.adversary, batches, map(self._fresh_samples, batches))
                log |= self._update_solver(batches)[0]
        self.steps_done += 1
        return log

    def _batches(self) -> Iterator[TeacherSamples]:
        """This process's samples of the step, in batches for one pipeline call each."""
        recipe, world = self.recipe, self.accelerator.num_processes
        first = self.steps_done * self.total_batch_size
        order = _shuffled(len(self.training), first, first + self.total_batch_size, recipe.seed)
        for call in range(recipe.gradient_accumulation_steps):
            start = (call * world + self.accelerator.process_index) * recipe.train_batch_size
            samples = self.training[order[start : start + recipe.train_batch_size]]
            yield from samples.map_calls(recipe.train_batch_size, lambda batch: batch)

    def _update_solver(self, batches: Sequence[TeacherSamples]) -> tuple[dict[str, float], list[Tensor]]:
        self.optimizer.zero_grad()
        sums: defaultdict[str, float] = defaultdict(float)
        students = []
        for batch in batches:
            student = self._rollout(batch)
            teacher = batch.final.to(student)
            loss = self.loss.value(self.loss.residual(student, teacher)).mean()
            sums["loss/distillation"] += loss.item() * len(batch)
            if self.adversary is not None:
                adversarial, difference = self.adversary.generator_loss(student, teacher)
                sums["loss/adversarial"] += adversarial.sum().item()
                sums["loss/sign"] += difference.sign().sum().item()
                loss = loss + self.adversary.recipe.adversarial_weight * adversarial.mean()
            (loss * (len(batch) / self.total_batch_size * self._loss_scale)).backward()
            students.append(student.detach())
        log = self._reduce_gradients(self.solver, sums, self._loss_scale)
        log["gradient_norm"] = nn.utils.clip_grad_norm_(self.solver.parameters(), self.recipe.max_grad_norm).item()
        log["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        with torch.device("cpu"):  # Adam counts its steps in a tensor on the default device
            self.optimizer.step()
        self.solver.clamp_offsets()
        self.lr_scheduler.step()
        self.ema.step(self.solver.parameters())
        return log, students

    def _rollout(self, batch: TeacherSamples) -> Tensor:
        n = self.solver.num_inference_steps
        inputs, checkpointing = batch.inputs.pipeline_arguments(self.pipe), self.recipe.gradient_checkpointing
        self.evaluations += n * len(batch) * (2 if checkpointing else 1)
        states = differentiable_rollout(self.pipe, self.solver, gradient_checkpointing=checkpointing, **inputs)
        # A pipeline that steps both halves of its guidance (DiT) decodes the first.
        return states[: len(batch)]

    def _fresh_samples(self, batch: TeacherSamples) -> Tensor:
        """The solver's samples for the arguments of a batch and other noise, without gradients."""
        first = FRESH_NOISE_SEED + self.steps_done * len(self.training) - self.training.inputs.seeds[0]
        seeds = [first + seed for seed in batch.inputs.seeds]
        inputs = replace(batch.inputs, seeds=seeds).pipeline_arguments(self.pipe)
        self.evaluations += self.solver.num_inference_steps * len(batch)
        return rollout(self.pipe, self.solver, **inputs)[: len(batch)]

    def _update_discriminator(
        self, adversary: Adversary, batches: Sequence[TeacherSamples], students: Iterable[Tensor]
    ) -> dict[str, float]:
        adversary.optimizer.zero_grad()
        sums: defaultdict[str, float] = defaultdict(float)
        for batch, student in zip(batches, students):
            for name, value in adversary.accumulate(student, batch.final.to(student), self.total_batch_size).items():
                sums[name] += value
        log = self._reduce_gradients(adversary.discriminator, sums)
        with torch.device("cpu"):
            adversary.optimizer.step()
        return log

    def _reduce_gradients(self, module: nn.Module, sums: Mapping[str, float], scale: float = 1.0) -> dict[str, float]:
        """Adds up a module's gradients and the sums of a log over processes; returns the log's means.

        Raises:
            ValueError: If any of these is not finite.
        """
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        vector = parameters_to_vector(gradients) / scale
        values = torch.tensor(list(sums.values()), **FLOAT64)
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            reduced = self.accelerator.reduce((vector.to(device), values.to(device)), "sum")
            vector, values = (total.to(part.device) for total, part in zip(reduced, (vector, values)))
        nn.utils.vector_to_parameters(vector, gradients)
        log = dict(zip(sums, (values / self.total_batch_size).tolist()))
        if not (vector.isfinite().all() and values.isfinite().all()):
            found = ", ".join(f"{name} = {value:g}" for name, value in log.items())
            raise ValueError(
                f"Step {self.steps_done + 1} is not finite ({found}, gradient_norm = {vector.norm():g}). In half precision try "
                "`--mixed_precision bf16` or `no`; otherwise begin anew in another `--output_dir` with a lower `--learning_rate`."
            )
        return log

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, apart from the constructor's arguments."""
        return {
            "steps_done": self.steps_done,
            "evaluations": self.evaluations,
            "total_batch_size": self.total_batch_size,
            "solver_config": self.solver.config(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a training from its state.

        Raises:
            ValueError: If the state is that of another training; the message says what differs.
        """
        for name, own in (("total_batch_size", self.total_batch_size), ("solver_config", self.solver.config())):
            if state[name] != own:
                raise ValueError(f"The checkpoint has `{name}` = {state[name]}, this training {own}.")
        if (self.adversary is not None) != ("discriminator" in state):
            raise ValueError("Only an adversarial training can resume from the checkpoint of an adversarial training.")
        self.steps_done, self.evaluations = state["steps_done"], state["evaluations"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        """The objects that a step changes, by their names in a checkpoint."""
        parts = {name: getattr(self, name) for name in ("solver", "optimizer", "lr_scheduler", "ema")}
        if self.adversary is not None:
            parts["discriminator"] = self.adversary.discriminator
            parts["discriminator_optimizer"] = self.adversary.optimizer
        return parts


def _shuffled(num_samples: int, start: int, stop: int, seed: int) -> list[int]:
    """Entries `[start, stop)` of an endless sequence of passes through the samples; every pass has its own order."""
    first, last = start // num_samples, (stop - 1) // num_samples
    generators = [torch.Generator().manual_seed(seed + i) for i in range(first, last + 1)]
    passes = torch.cat([torch.randperm(num_samples, generator=generator, device="cpu") for generator in generators])
    return passes[start - first * num_samples : stop - first * num_samples].tolist()
