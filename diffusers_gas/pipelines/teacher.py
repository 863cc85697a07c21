"""Teachers: schedulers of Diffusers for the network of a pipeline, and what they sample in many steps, kept on disk."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from PIL.Image import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import EDMVPSchedule
from ..schedulers.configs import is_edm, noise_schedule_from_config, split_config, translate_config
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_utils import ODEScheduler
from ..schedulers.sdm_plan import SDMPlan
from ..utils.diffusers_hooks import DEFAULT_VALUES, stored_weights, without_feature_caches
from ..utils.files import load_safetensors, remove_leftovers, save_safetensors
from ..utils.tensors import FLOAT32, FLOAT64
from .driving import current_config, networks_of, rollout, sample_latents, scheduler_config
from .inputs import BatchSize, SampleInputs


T = TypeVar("T")

# Samples per file. An interruption costs at most the work for one file of a process.
SHARD_SIZE = 64
# Likewise where samples are made as they are needed.
LAZY_SHARD_SIZE = 16

# Steps that show whether a pipeline can be driven.
CHECKED_STEPS = 3

# Entries of every weight that tell pipelines of the same name apart.
NUM_COMPARED_ENTRIES = 64

# Types with the bits of a number, by its bytes.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# What the layers of PEFT, the attention processors of IP-Adapters, and the blocks of FreeU hold beside their weights.
ADAPTER_SETTINGS = ("scaling", "active_adapters", "disable_adapters", "scale", "s1", "s2", "b1", "b2")
# What pipelines hold beside their configs: the layers of perturbed-attention guidance, and FreeNoise.
_FREE_NOISE = ("context_length", "context_stride", "weighting_scheme", "noise_type")
PIPELINE_ATTRIBUTES = ("pag_applied_layers", *(f"_free_noise_{name}" for name in _FREE_NOISE))


@dataclass(frozen=True)
class TeacherSamples:
    """Samples of a teacher.

    Attributes:
        inputs: Their seeds and arguments.
        noise (`Tensor` of shape `(num_samples, ...)`): Their initial states.
        final (`Tensor` of shape `(num_samples, ...)`): The teacher's final states, not decoded.
    """

    inputs: SampleInputs
    noise: Tensor
    final: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice | Sequence[int]) -> "TeacherSamples":
        return TeacherSamples(self.inputs[index], self.noise[index], self.final[index])

    def map_calls(self, batch_size: int | BatchSize, call: Callable[["TeacherSamples"], T]) -> Iterator[T]:
        """Results of `call` for batches, each for one call of the pipeline (see [`SampleInputs.map_calls`])."""
        return self.inputs.map_calls(batch_size, lambda positions: call(self[positions]))

    def of_each(self, argument: str) -> list["TeacherSamples"]:
        """The samples with each value of an argument of their own."""
        values = [inputs.get(argument) for inputs in self.inputs.per_sample]
        return [self[[i for i, own in enumerate(values) if own == value]] for value in dict.fromkeys(values)]


@dataclass(frozen=True)
class TeacherCache:
    """Teacher samples in a folder of safetensors files.

    The name of a file is a hash of what its samples depend on: the teacher's scheduler, the pipeline with its weights, the
    arguments by their content, and the seeds.

    Args:
        folder: The folder of the files. Several processes, also on several machines, share it.
        pipeline_name: What the pipeline was loaded from, with revision and precision.
        scheduler: The teacher's scheduler.
        num_inference_steps: The teacher's steps.
        shard_size: Samples per file.
    """

    folder: str | os.PathLike
    pipeline_name: str
    scheduler: SchedulerMixin
    num_inference_steps: int
    shard_size: int = SHARD_SIZE

    @property
    def teacher(self) -> dict[str, Any]:
        """What the files record of their teacher."""
        return {
            "pipeline": self.pipeline_name,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": public_settings(self.scheduler.config),
            "num_inference_steps": self.num_inference_steps,
        }

    def collect(
        self,
        pipe: DiffusionPipeline,
        inputs: SampleInputs,
        batch_size: int | BatchSize,
        label: str,
        processes: PartialState | None = None,
    ) -> TeacherSamples:
        """The teacher's samples. Those that are not in the cache are made.

        Args:
            pipe: The pipeline.
            inputs: Seeds and arguments of the samples.
            batch_size: Samples per pipeline call.
            label: Of the progress bar.
            processes: The processes among which the files are distributed. All processes get all samples.

        Raises:
            ValueError: If a file is damaged.
            RuntimeError: If the samples differ in shape, or another process could not make its own: none waits for it.
        """
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        shards = inputs.split(self.shard_size)
        model = fingerprint_of_pipeline(pipe), fingerprint_of_scheduler(self.scheduler, self.num_inference_steps)
        paths = [folder / f"samples-{fingerprint(self.teacher, *model, shard)}.safetensors" for shard in shards]
        rank, world = _rank_and_world(processes)
        own = list(zip(shards, paths))[rank::world]
        total = sum(len(shard) for shard, _ in own)

        def make() -> None:
            # A bar inside another one is cleared at its end.
            with tqdm(total=total, desc=label, unit="sample", disable=rank > 0, leave=None) as progress:
                for shard, path in own:
                    if not path.exists():
                        self._generate(pipe, shard, batch_size, path)
                    progress.update(len(shard))

        _in_all(processes, make)
        tensors = _in_all(processes, lambda: [_load(path, len(shard)) for shard, path in zip(shards, paths)])
        return TeacherSamples(inputs, *(torch.cat([shard[name] for shard in tensors]) for name in ("noise", "final")))

    def _generate(self, pipe: DiffusionPipeline, shard: SampleInputs, batch_size: int | BatchSize, path: Path) -> None:
        def states(arguments: dict[str, Any]) -> Iterable[tuple[Tensor, Tensor]]:
            noise, final = sample_latents(pipe, self.scheduler, self.num_inference_steps, **arguments)
            # DiT steps both halves of its doubled batch for guidance. It decodes the first half, and `zip` ends there.
            return zip(noise.cpu(), final.cpu())

        with without_feature_caches(networks_of(pipe)):
            noise, final = zip(*shard.in_calls(pipe, batch_size, states))
        tensors = {"noise": torch.stack(noise), "final": torch.stack(final)}
        save_safetensors(tensors, path, {"teacher": json.dumps(self.teacher, default=str)})


def _load(path: Path, num_samples: int) -> dict[str, Tensor]:
    """The noise and the final states of a cache's file."""
    if not path.exists():
        raise ValueError(f"{path} is missing: processes on several machines need one output folder.")
    tensors, _ = load_safetensors(path)
    if any(len(tensors.get(name, ())) != num_samples for name in ("noise", "final")):
        raise ValueError(f"{path} does not hold {num_samples} teacher samples. Delete it to have them made again.")
    return tensors


def _rank_and_world(processes: PartialState | None) -> tuple[int, int]:
    """The number of this process and how many there are."""
    return (0, 1) if processes is None else (processes.process_index, processes.num_processes)


def evaluations_per_sample(scheduler: SchedulerMixin, num_inference_steps: int) -> int:
    """Network evaluations of a sampling; the steps of some schedulers, such as Heun's, take more than one."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (TypeError, ValueError):
        return num_inference_steps  # it needs what only the pipeline knows, as schedulers of flow matching do
    return len(scheduler.timesteps)


@dataclass
class LazyTeacherSamples:
    """A process's share of a teacher's samples, made when they are first read: `samples[:n]` are its first n.

    All processes must read the same. Arguments are those of [`TeacherCache.collect`].

    Raises:
        ValueError: If there are fewer samples than processes.
    """

    cache: TeacherCache
    pipe: DiffusionPipeline
    inputs: SampleInputs
    batch_size: int | BatchSize
    label: str
    processes: PartialState | None = None

    def __post_init__(self) -> None:
        self._rank, self._world = _rank_and_world(self.processes)
        self._made: TeacherSamples | None = None  # of this process
        self._num_collected = 0  # of all processes
        if len(self) == 0:
            raise ValueError(f"{len(self.inputs)} samples cannot be shared by {self._world} processes: ask for more.")

    @property
    def evaluations_per_sample(self) -> int:
        """Network evaluations of the teacher for a sample."""
        return evaluations_per_sample(self.cache.scheduler, self.cache.num_inference_steps)

    def __len__(self) -> int:
        return len(self.inputs) // self._world

    def num_made(self, number: int) -> int:
        """How many samples, of all processes, are made when the first `number` are read."""
        return min(len(self.inputs), math.ceil(number / self.cache.shard_size) * self.cache.shard_size)

    def __getitem__(self, index: slice) -> TeacherSamples:
        needed = self.num_made(index.indices(len(self))[1] * self._world)
        # All processes take part, or none: what is counted are the samples of all, as their shares of them may differ by one.
        if self._made is None or needed > self._num_collected:
            made = self.cache.collect(self.pipe, self.inputs[:needed], self.batch_size, self.label, self.processes)
            self._made, self._num_collected = made[self._rank :: self._world][: len(self)], needed
        return self._made[index]


def errors_to_teacher(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    samples: TeacherSamples,
    batch_size: int | BatchSize,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[float, float]:
    """Mean squared distance and mean absolute difference of a scheduler's final states to the teacher's, from the same noise.

    Args:
        samples: The teacher's samples, or this process's share of them.
        batch_size: The most samples per call of the pipeline.
        reduce: Sums a tensor over all processes.

    Raises:
        RuntimeError: If sampling fails in another process. An error in this process is raised as it is. Both are raised after
            `reduce`, so that no process waits for another.
    """

    def sums(batch: TeacherSamples) -> tuple[float, float]:
        arguments = batch.inputs.pipeline_arguments(pipe)
        _, final = sample_latents(pipe, scheduler, num_inference_steps, **arguments)
        final = final[: len(batch)]  # some pipelines double the batch for guidance
        difference = final.float() - batch.final.to(final.device).float()
        return difference.square().mean().item() * len(batch), difference.abs().mean().item() * len(batch)

    totals, error = [0.0, 0.0], None
    try:
        totals = [sum(values) for values in zip(*samples.map_calls(batch_size, sums))]
    except Exception as sampling_error:
        error = sampling_error
    totals = reduce(torch.tensor([*totals, len(samples), error is not None], **FLOAT64)).tolist()
    squared, absolute, count, num_failed = totals
    _raise_in_all(error, num_failed)
    return squared / count, absolute / count


def _in_all(processes: PartialState | None, action: Callable[[], T]) -> T:
    """The result of an action of all processes, once all have done it. An error in one is raised in all."""
    error: Exception | None = None
    try:
        result = action()
    except Exception as own_error:
        error = own_error
    num_failed = torch.tensor(float(error is not None), **FLOAT32)
    if processes is not None:
        num_failed = reduce(num_failed.to(processes.device), "sum")
    _raise_in_all(error, num_failed.item())
    return result


def _raise_in_all(error: Exception | None, num_failed: float) -> None:
    """Raises the error of this process, and one in the others if any process has failed, so that none waits for another."""
    if error is not None:
        raise error
    if num_failed:
        raise RuntimeError("Sampling failed in another process.")


def rounding(pipe: DiffusionPipeline) -> float:
    """How much two ways to sample the same may differ at a pipeline's precision, relative to what they sample."""
    return 0.02 if pipe.dtype in (torch.float32, torch.float64) else 0.2


def check_driven(
    pipe: DiffusionPipeline, scheduler: ODEScheduler, solver: GeneralizedSolver | SDMPlan, inputs: SampleInputs
) -> None:
    """Raises a `ValueError` if a pipeline evaluates its network otherwise where it is driven than where it samples.

    It may loop over a copy of `timesteps`, or go by the number of a step (`control_guidance_end`). What is fitted to driven
    evaluations is then of no use. Few steps from the first sample's noise show it.

    Args:
        pipe: The pipeline.
        scheduler: A scheduler for it; left as it is.
        solver: A solver or plan of this scheduler for `CHECKED_STEPS`.
        inputs: The samples.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.learned[CHECKED_STEPS] = solver

    def seeded(sample: Callable[..., Any], *some: Any) -> Any:
        # A pipeline may draw from PyTorch's own generator (`latent_dist.sample()`).
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return sample(pipe, *some, **inputs[:1].pipeline_arguments(pipe))

    _, sampled = seeded(sample_latents, scheduler, CHECKED_STEPS)
    driven = seeded(rollout, solver)
    if (driven.float() - sampled.float()).norm() > rounding(pipe) * sampled.float().norm():
        raise ValueError(
            f"{type(pipe).__name__} can be neither calibrated nor distilled by Gauss-Newton with these arguments: it goes by the number of a "
            "step (as with `control_guidance_end`) or by a copy of `scheduler.timesteps`. Leave such arguments out, or train by Adam from another "
            "start than Gauss-Newton (`--optimizer adam --initialization published`)."
        )


def fingerprint(*parts: Any) -> str:
    """A hash of values by their content: JSON's types, arrays, tensors, images, and [`SampleInputs`].

    Raises:
        ValueError: For a value of another type. Its text might not say what it holds.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_content).encode()).hexdigest()[:20]


def _content(value: Any) -> Any:
    """A value that JSON cannot hold, as one that it can."""
    if isinstance(value, SampleInputs):
        return [value.common, list(value.seeds), list(value.per_sample)]
    if isinstance(value, Mapping | Sequence | set):
        return sorted(value.items()) if isinstance(value, Mapping) else list(value)
    if isinstance(value, Tensor):
        kind, content = str(value.dtype), value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray | np.generic):
        kind, content = str(value.dtype), np.ascontiguousarray(value)
    elif isinstance(value, Image):
        # Modes with a palette have indices to it.
        kind, content = value.mode, np.asarray(value.convert("RGBA") if value.mode in ("P", "PA") else value)
    elif isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    else:
        raise ValueError(f"A pipeline argument of type {type(value).__name__} cannot be compared: {value!r:.100}.")
    return [kind, list(getattr(value, "shape", content.shape)), hashlib.sha256(content.tobytes()).hexdigest()]


def provenance_of_fit(
    pipe: DiffusionPipeline, inputs: SampleInputs, teacher: SchedulerMixin | None, teacher_num_inference_steps: int
) -> dict[str, Any]:
    """What solvers and plans record of the samples that they were fitted to, in JSON's types and without paths of this machine.

    The pipeline is its Hub id or the name of its folder, with its precision.
    """
    name = str(pipe.name_or_path or type(pipe).__name__)
    steps = teacher_num_inference_steps
    of_teacher = {"teacher_scheduler": type(teacher).__name__, "teacher_num_inference_steps": steps}
    return {
        "teacher": Path(name).name if os.path.isdir(name) else name,
        "torch_dtype": str(pipe.dtype).removeprefix("torch."),
        **({} if teacher is None else of_teacher),
        "pipeline_arguments": inputs.record(pipe),
        "versions": {package: version(package) for package in ("torch", "diffusers", "diffusers_gas")},
    }


def fingerprint_of_scheduler(scheduler: SchedulerMixin, num_inference_steps: int) -> str:
    """A hash of what a scheduler's samples depend on: class, settings, number of steps, and what was learned for it."""
    config = public_settings(scheduler.config)
    config["shift"] = getattr(scheduler, "shift", config.get("shift"))  # which can be set without the config
    learned = {n: (one.state_dict(), one.config()) for n, one in getattr(scheduler, "learned", {}).items()}
    # An interpolated plan depends on the others.
    n = num_inference_steps
    return fingerprint(type(scheduler).__name__, config, n, learned.get(n, learned or None))


def fingerprint_of_pipeline(pipe: DiffusionPipeline) -> str:
    """A hash of what a pipeline's samples depend on beside scheduler and arguments.

    These are its class, the settings of the pipeline and its networks, their weights, also where they are offloaded, and the
    strength of adapters. Of each weight it takes some entries and a sum over the bits of all.
    """
    digest = hashlib.sha256(f"{type(pipe).__qualname__} {_settings(pipe)}".encode())
    attributes: list[Any] = [(name, vars(pipe).get(name)) for name in PIPELINE_ATTRIBUTES]
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    switched_on = [(name, value) for name, value in attributes + autocast if value is not None]
    digest.update(f"{switched_on}".encode() if switched_on else b"")
    for name, component in sorted(pipe.components.items()):
        if not isinstance(component, nn.Module):
            continue
        digest.update(f"{name} {_settings(component)}".encode())
        for key, tensor in stored_weights(component):
            flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()
            bits = flat.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64).item()
            entries = flat[:: max(1, len(flat) // NUM_COMPARED_ENTRIES)].cpu().contiguous()
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {bits}".encode())
            digest.update(entries.view(torch.uint8).numpy().tobytes())
        for key, module in component.named_modules():
            settings = [getattr(module, setting, None) for setting in ADAPTER_SETTINGS]
            values = [value for value in settings if isinstance(value, bool | float | list | dict)]
            digest.update(f"{name}.{key} {values}".encode())
    return digest.hexdigest()[:20]


def public_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without Diffusers' own entries: where it was loaded from, and a list whose order differs between processes."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _settings(owner: Any) -> list[tuple[str, Any]]:
    """The config of a pipeline, without its scheduler, or of a network."""
    config = getattr(owner, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config  # of Transformers
    settings = public_settings(config) if isinstance(config, Mapping) else {}
    return sorted((name, value) for name, value in settings.items() if name != "scheduler")


def default_teacher(pipe: DiffusionPipeline) -> SchedulerMixin:
    """A scheduler that comes close to the ODE's solution in many steps: DPM-Solver++ 2M, or Euler for flow matching.

    It follows the network's noise levels and times, also where a setting describes them that only a few of Diffusers'
    schedulers know.
    """
    config = scheduler_config(pipe)
    translated = translate_config(config)
    if translated.get("edm_timestep") == "atan":
        # Diffusers has no deterministic scheduler that tells a network these times.
        return GASScheduler.from_config(config_for_diffusers(config))
    if is_edm(translated):
        return make_scheduler(EDMDPMSolverMultistepScheduler, config)
    if translated.get("use_flow_sigmas") or translated.get("exploding_sigmas") is not None:
        return make_scheduler(FlowMatchEulerDiscreteScheduler, config, stochastic_sampling=False)
    return make_scheduler(
        DPMSolverMultistepScheduler, config, timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2
    )


def check_noise(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` for a scheduler with other noise levels at a network's times, or another prediction, than the pipeline's own.

    The network would not be told what it is given. Schedulers whose config this package cannot follow are not judged.
    """
    try:
        own = GASScheduler.from_config(scheduler_config(pipe))
        other = GASScheduler.from_config(current_config(scheduler))
    except ValueError:
        return
    times = own.noise_schedule(mu=1.0).timestep(torch.linspace(0.1, 0.9, 9, **FLOAT64))
    expected, levels = (torch.stack(one.noise_schedule(mu=1.0).levels_at(times)) for one in (own, other))
    is_other = own.config.prediction_type != other.config.prediction_type
    if is_other or not torch.allclose(levels, expected, rtol=0.01, atol=1e-3):
        raise ValueError(
            f"The {type(scheduler).__name__} is for networks of another noise schedule or prediction type than the {type(pipe).__name__}'s "
            "own scheduler. Make it from that one's config: `from_config(pipe.scheduler.config)`."
        )


def check_teacher(pipe: DiffusionPipeline, teacher: SchedulerMixin) -> None:
    """Raises a `ValueError` for a scheduler whose samples cannot be learned.

    It is for other networks than the pipeline's (see [`check_noise`]), or adds noise in its steps: its samples do not follow from the
    noise that they begin with. Schedulers that cannot step without their pipeline are not judged.
    """
    check_noise(pipe, teacher)
    if isinstance(teacher, ODEScheduler):
        return
    finals, ones = [], torch.ones(1, 3, 8, 8, **FLOAT32)
    output = ones.repeat(1, 2, 1, 1) if str(teacher.config.get("variance_type")).startswith("learned") else ones
    shift = {"mu": 1.0} if teacher.config.get("use_dynamic_shifting") else {}
    for seed in range(2):
        scheduler, sample = copy.deepcopy(teacher), ones
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                scheduler.set_timesteps(CHECKED_STEPS, **shift)
                for timestep in scheduler.timesteps:
                    sample = scheduler.step(output, timestep, sample)[0]
            except Exception:
                return
        finals.append(sample)
    if not torch.allclose(finals[0], finals[1], equal_nan=True):
        raise ValueError(
            f"{type(teacher).__name__} adds noise in its steps, so that its samples cannot be learned from their first noise: choose a "
            "deterministic teacher, such as DPMSolverMultistepScheduler."
        )


def make_scheduler(
    scheduler_class: type[SchedulerMixin], config: Mapping[str, Any], **settings: Any
) -> SchedulerMixin:
    """A scheduler of any class for the network of a pipeline whose scheduler has this config.

    It is `from_config`, with the settings under the names that the class knows, and without Diffusers' warning of settings that
    only other classes have.
    """
    name = scheduler_class.__name__
    if not issubclass(scheduler_class, ODEScheduler) and not name.startswith("CogVideoX"):
        config = config_for_diffusers(config)
    # The settings of Diffusers' flow-matching schedulers have other names in its multistep schedulers.
    if not name.startswith("FlowMatch") and (translated := translate_config(config)).get("use_flow_sigmas"):
        config = translated
    own, kept = split_config(scheduler_class, config)
    with torch.device("cpu"):  # where Diffusers' schedulers read the tables that they make
        scheduler = scheduler_class.from_config(own, **settings)
    scheduler.register_to_config(**kept)
    return scheduler


def config_for_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a pipeline's own scheduler, so that Diffusers' schedulers made from it follow the same network.

    Only a few of them know Stable Video Diffusion's `timestep_type`, CogVideoX' `snr_shift_scale`, and the rarer
    `beta_schedule`s. All know `sigma_data`, or `trained_betas`.
    """
    config, translated = dict(config), translate_config(config)
    settings: dict[str, Any] = {}
    unset = config.get(DEFAULT_VALUES, ())
    if is_edm(translated):
        edm: Any = noise_schedule_from_config(translated)
        limits = {"sigma_min": edm.sigma_min, "sigma_max": EDMVPSchedule.sigma_max}
        settings = {"sigma_data": edm.sigma_data, **limits}
    elif translated.get("use_flow_sigmas"):
        settings = {"shift": translated.get("flow_shift", 1.0)}
    elif translated.get("exploding_sigmas") is None:
        # `from_config` takes the new class's defaults for settings that were defaults of the old class. What the network was trained on is none.
        unset = translated[DEFAULT_VALUES]
        is_common = translated.get("beta_schedule", "linear") in ("linear", "scaled_linear", "squaredcos_cap_v2")
        if not is_common or translated.get("snr_shift_scale", 1.0) != 1.0:
            betas = GASScheduler.from_config(config).betas
            settings = {"trained_betas": betas.tolist(), "beta_schedule": "linear"}
            config.pop("snr_shift_scale", None)
    return {**config, **settings, DEFAULT_VALUES: [name for name in unset if name not in settings]}
