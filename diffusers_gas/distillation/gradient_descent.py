"""Gradient-based distillation: the published recipe of GS and GAS (arXiv 2510.17699), through differentiable rollouts.

Nothing random carries over from step to step: the samples of a step, their noise and the state of every generator follow
from the seed and the step's number. What a checkpoint keeps is parameters and optimizers, and the split of a step's
samples over processes and accumulated batches changes nothing but the order of sums.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ..generalized_solver import GeneralizedSolver
from ..pipelines.driving import differentiable_rollout, drive, frozen
from ..pipelines.inputs import SampleInputs
from ..pipelines.teacher import TeacherSamples
from ..utils.files import save_safetensors
from .adversarial import discriminator_loss, generator_loss
from .finite_differences import Sampler
from .losses import Loss


# Seeds of the discriminator's own fakes: no training or evaluation seed, and within the 32 bits that a CPU generator uses.
FRESH_NOISE_SEED = 2**31


@dataclass(frozen=True)
class Recipe:
    """Settings of a training; the defaults are the published ones.

    Args:
        max_train_steps: Optimizer steps; the published number in pixel space. (30 000 on LSUN's and ImageNet's latents,
            2 000 on Stable Diffusion.)
        train_batch_size: Samples per pipeline call and process.
        gradient_accumulation_steps: Calls per optimizer step.
        learning_rate: Adam's.
        lr_scheduler, lr_warmup_steps: As in Diffusers' training scripts.
        max_grad_norm: Norm that the gradient is clipped to.
        ema_decay: Of the averaged parameters, which rise to it as (1 + step) / (10 + step).
        gradient_checkpointing: Whether network evaluations are repeated in the backward pass instead of kept.
        seed: Of the order of samples and the discriminator's fakes.
    """

    max_train_steps: int = 10_000
    train_batch_size: int = 24
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    gradient_checkpointing: bool = False
    seed: int = 0


class Adversary:
    """The other side of adversarial training: a discriminator of teacher and student samples, and its optimizer.

    Args:
        discriminator: Maps a batch of samples to a logit each.
        as_grid: Maps final states of the pipeline to what the discriminator takes.
        weight: Of the adversarial loss beside the distillation loss; published: 1, on CIFAR-10 0.1.
        learning_rate: Adam's.
        r1_weight, r2_weight: Of the gradient penalties at teacher and student samples.
        reuse_fakes: Whether the discriminator learns from the samples that the solver was just trained on, after that,
            which saves a rollout; published are samples from fresh noise, before.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        as_grid: Callable[[Tensor], Tensor] = lambda samples: samples,
        weight: float = 1.0,
        learning_rate: float = 1e-5,
        r1_weight: float = 0.1,
        r2_weight: float = 0.1,
        reuse_fakes: bool = False,
    ):
        self.discriminator, self.as_grid, self.weight = discriminator.requires_grad_(False), as_grid, weight
        self.r1_weight, self.r2_weight, self.reuse_fakes = r1_weight, r2_weight, reuse_fakes
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr=learning_rate)

    def generator_loss(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every student sample, paired with the teacher's, and the difference of logits that it comes from."""
        fake, real = (self.discriminator(self._grid(samples)) for samples in (student, teacher))
        return generator_loss(fake, real), fake - real

    def _grid(self, samples: Tensor) -> Tensor:
        return self.as_grid(samples.to(next(self.discriminator.parameters()).dtype))

    def accumulate(self, student: Tensor, teacher: Tensor, total_batch_size: int) -> dict[str, float]:
        """Adds the discriminator's gradients on a part of a step's samples; sums over these of what a log wants."""
        self.discriminator.requires_grad_(True)
        real, fake = self._grid(teacher), self._grid(student)
        result = discriminator_loss(self.discriminator, real, fake, self.r1_weight, self.r2_weight)
        (result.loss.sum() / total_batch_size).backward()
        self.discriminator.requires_grad_(False)
        values = {"loss": result.loss, "sign": (result.real_logits - result.fake_logits).sign()}
        penalties = {"r1": result.r1, "r2": result.r2}
        values |= {name: penalty for name, penalty in penalties.items() if penalty is not None}
        return {f"discriminator/{name}": value.sum().item() for name, value in values.items()}


class GradientDescent:
    """A training of one solver, advanced by [`step`].

    Args:
        pipe: The pipeline.
        solver: Where to start from; left as it is.
        training: Teacher samples.
        loss: The distillation loss; published: L1 for latents, LPIPS for pixels.
        recipe: The settings.
        accelerator: Gives the processes, each of which computes a share of every step.
        adversary: For GAS; `None` for GS.
        failure_folder: Where the inputs of a step whose loss or gradient is not finite are saved.
    """

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
        failure_folder: Path,
    ):
        self.pipe, self.training, self.loss, self.recipe = pipe, training, loss, recipe
        self.accelerator, self.adversary, self.failure_folder = accelerator, adversary, failure_folder
        self.solver = copy.deepcopy(solver)
        self.optimizer = torch.optim.Adam(self.solver.parameters(), lr=recipe.learning_rate)
        self.lr_scheduler = get_scheduler(
            recipe.lr_scheduler,
            self.optimizer,
            num_warmup_steps=recipe.lr_warmup_steps,
            num_training_steps=recipe.max_train_steps,
        )
        self.ema = EMAModel(self.solver.parameters(), decay=recipe.ema_decay)
        self.steps_done = 0
        self.evaluations = 0
        # Gradients of single entries of a sample are of order one, not one over their number: half precision keeps them.
        # A power of two, so that it leaves no trace in the parameters' gradients.
        self._loss_scale = 2.0 ** int(math.log2(training.final[0].numel() * recipe.train_batch_size))

    @property
    def total_batch_size(self) -> int:
        """Samples per step, of all processes."""
        recipe = self.recipe
        return recipe.train_batch_size * recipe.gradient_accumulation_steps * self.accelerator.num_processes

    def averaged_solver(self) -> GeneralizedSolver:
        """The solver with averaged parameters: what is evaluated and saved."""
        solver = copy.deepcopy(self.solver)
        self.ema.copy_to(solver.parameters())
        return solver

    def step(self) -> dict[str, float]:
        """One optimizer step (of the discriminator too); returns means over the step's samples, for a log.

        Raises:
            ValueError: If a loss or its gradient is not finite, before the parameters that it is of are changed.
        """
        set_seed(self.recipe.seed + self.steps_done)
        batches = list(self._batches())
        with frozen(self.pipe):
            if self.adversary is None:
                log, _ = self._update_solver(batches)
            elif self.adversary.reuse_fakes:
                log, students = self._update_solver(batches)
                log |= self._update_discriminator(batches, students)
            else:
                log = self._update_discriminator(batches, map(self._fresh_samples, batches))
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
            yield from self.training[order[start : start + recipe.train_batch_size]].batches(recipe.train_batch_size)

    def _update_solver(self, batches: Sequence[TeacherSamples]) -> tuple[dict[str, float], list[Tensor]]:
        self.optimizer.zero_grad()
        sums, students = {"loss/distillation": 0.0}, []
        for batch in batches:
            student = self._rollout(batch)
            teacher = batch.final.to(student)
            distillation = self.loss.value(self.loss.residual(student, teacher)).mean()
            sums["loss/distillation"] += distillation.item() * len(batch)
            total = distillation
            if self.adversary is not None:
                adversarial, difference = self.adversary.generator_loss(student, teacher)
                total = total + self.adversary.weight * adversarial.mean()
                for name, value in (("loss/adversarial", adversarial), ("loss/sign", difference.sign())):
                    sums[name] = sums.get(name, 0.0) + value.sum().item()
            (total * (len(batch) / self.total_batch_size * self._loss_scale)).backward()
            students.append(student.detach())
        log = self._reduce_gradients(self.solver, sums, self._loss_scale)
        log["gradient_norm"] = nn.utils.clip_grad_norm_(self.solver.parameters(), self.recipe.max_grad_norm).item()
        log["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        if not all(map(math.isfinite, log.values())):
            self._fail(log, batches)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.ema.step(self.solver.parameters())
        return log, students

    def _rollout(self, batch: TeacherSamples) -> Tensor:
        n = self.solver.num_inference_steps
        self.evaluations += n * len(batch)
        states = differentiable_rollout(
            self.pipe,
            self.solver,
            gradient_checkpointing=self.recipe.gradient_checkpointing,
            **batch.inputs.pipeline_arguments(self.pipe),
        )
        # A pipeline that steps both halves of its guidance (DiT) decodes the first.
        return states[: len(batch)]

    def _fresh_samples(self, batch: TeacherSamples) -> Tensor:
        """The solver's samples for a batch's arguments and other noise, without gradients."""
        first = FRESH_NOISE_SEED + self.steps_done * len(self.training)
        inputs = batch.inputs
        seeds = [first + seed - self.training.inputs.seeds[0] for seed in inputs.seeds]
        fresh = SampleInputs(seeds, inputs.per_sample, inputs.common)

        def rollout(*network):
            return Sampler.of(self.solver, *network).rollout()

        self.evaluations += self.solver.num_inference_steps * len(batch)
        return drive(self.pipe, rollout, from_noise=True, **fresh.pipeline_arguments(self.pipe))[: len(batch)]

    def _update_discriminator(
        self, batches: Sequence[TeacherSamples], students: Iterator[Tensor] | Sequence[Tensor]
    ) -> dict[str, float]:
        adversary = self.adversary
        adversary.optimizer.zero_grad()
        sums: dict[str, float] = {}
        for batch, student in zip(batches, students):
            part = adversary.accumulate(student, batch.final.to(student), self.total_batch_size)
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
        log = self._reduce_gradients(adversary.discriminator, sums)
        if not all(map(math.isfinite, log.values())):
            self._fail(log, batches)
        adversary.optimizer.step()
        return log

    def _reduce_gradients(self, module: nn.Module, sums: dict[str, float], scale: float = 1.0) -> dict[str, float]:
        """Adds up a module's gradients and the sums of a log over processes; returns the log's means."""
        gradients = [parameter.grad for parameter in module.parameters()]
        vector = parameters_to_vector(gradients) / scale
        values = torch.tensor(list(sums.values()), dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            reduced = self.accelerator.reduce((vector.to(device), values.to(device)), "sum")
            vector, values = (total.to(part.device) for total, part in zip(reduced, (vector, values)))
        nn.utils.vector_to_parameters(vector, gradients)
        log = dict(zip(sums, (values / self.total_batch_size).tolist()))
        if not vector.isfinite().all():
            log["gradient_norm"] = math.nan
        return log

    def _fail(self, log: dict[str, float], batches: Sequence[TeacherSamples]) -> None:
        step = self.steps_done + 1
        path = self.failure_folder / f"failed_step-{step}-process-{self.accelerator.process_index}.safetensors"
        tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("noise", "final")}
        tensors |= {f"solver.{name}": value for name, value in self.solver.state_dict().items()}
        inputs = [
            {"seed": seed, **sample}
            for batch in batches
            for seed, sample in zip(batch.inputs.seeds, batch.inputs.per_sample)
        ]
        common = dict(self.training.inputs.common)
        save_safetensors(tensors, path, {"inputs": json.dumps([*inputs, common], default=str)})
        values = ", ".join(f"{name} = {value:g}" for name, value in log.items())
        raise ValueError(
            f"Step {step} is not finite ({values}). The step's inputs are in {path}. In half precision try "
            "`--mixed_precision bf16` or `no`; otherwise resume from the last checkpoint with a lower learning rate."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on beside the constructor's arguments."""
        state = {
            "steps_done": self.steps_done,
            "evaluations": self.evaluations,
            "total_batch_size": self.total_batch_size,
            "solver": self.solver.state_dict(),
            "solver_config": self.solver.config(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema.state_dict(),
        }
        if self.adversary is not None:
            state["discriminator"] = self.adversary.discriminator.state_dict()
            state["discriminator_optimizer"] = self.adversary.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a training; a `ValueError` says what does not fit."""
        for name, own in (("total_batch_size", self.total_batch_size), ("solver_config", self.solver.config())):
            if state[name] != own:
                raise ValueError(f"The checkpoint has `{name}` = {state[name]}, this training {own}.")
        if (self.adversary is not None) != ("discriminator" in state):
            raise ValueError("A checkpoint of adversarial training resumes adversarial training, and no other.")
        self.steps_done, self.evaluations = state["steps_done"], state["evaluations"]
        self.solver.load_state_dict(state["solver"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.ema.load_state_dict(state["ema"])
        if self.adversary is not None:
            self.adversary.discriminator.load_state_dict(state["discriminator"])
            self.adversary.optimizer.load_state_dict(state["discriminator_optimizer"])


def _shuffled(num_samples: int, start: int, stop: int, seed: int) -> list[int]:
    """Entries `[start, stop)` of an endless sequence of passes through the samples, each in an order of its own."""
    first = start // num_samples
    passes = [
        torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + i))
        for i in range(first, (stop - 1) // num_samples + 1)
    ]
    return torch.cat(passes)[start - first * num_samples : stop - first * num_samples].tolist()
