"""Networks of published sizes with random weights: distilled, trained adversarially and sampled, with speed and memory.

    python examples/benchmarks/real_sizes.py
    python examples/benchmarks/real_sizes.py --models "Stable Diffusion 1.5" --device cuda
    python examples/benchmarks/real_sizes.py --small

Nothing is downloaded. The configs are the published ones of cost_projection.py, weights and prompt embeddings are random, and there
is no autoencoder. Speed and memory do not depend on the values of weights. A CPU is too slow for most models at their full size.
There, Stable Diffusion 1.5 runs at its full size. The others have all of their width, but fewer steps or tokens, and fewer blocks
if they do not fit into memory. An accelerator gets all models in full, with guidance, offloaded and compiled with CUDA graphs, too.
Of that, accelerator.py measures in a few minutes what matters most.

Each measurement runs in its own process and is written to real_sizes.json at once. Those that are there, also of other devices,
are kept, so that an interrupted run can be resumed. `--again` repeats them. A network that needs more than `--memory` GiB for its
weights is not run. The time of the network is taken by hooks around its evaluations. A solver with all coefficients is sampled with,
which is the most expensive case.

The results are real_sizes.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script says
beforehand how long it will take: half an hour on a CPU core. `--small` runs tiny networks in a few seconds, and writes
real_sizes-small.
"""

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from cost_projection import MODELS
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    ModelMixin,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from report import (
    DEVICE,
    PeakMemory,
    add_solver_with_all_coefficients,
    figure,
    in_own_process,
    markdown_table,
    output_path,
    write,
    write_results,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SampleInputs, distill
from diffusers_gas.distillation.adversarial import AdversarialRecipe, Adversary, as_grid
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.distillation.gradient_descent import GradientDescent, Recipe
from diffusers_gas.least_squares import Loss
from diffusers_gas.pipelines.driving import LeavePipeline, call_with_scheduler, num_evaluations, scheduler_config
from diffusers_gas.pipelines.inputs import TRAINING_SEED
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher


# The speed that is assumed for networks, relative to a product of matrices.
SPEED = 0.5
VERSIONS = {package: version(package) for package in ("torch", "diffusers")}
GOAL = 0.02  # the largest share of a sampling's time that the network does not take
SAMPLED_STEPS, DISTILLED_STEPS, TEACHER_STEPS = 8, 4, 5
# Samples of a distillation, one of them held out, and of an adversarial step.
NUM_SAMPLES, NUM_ADVERSARIAL = 2, 1
PRECISIONS = ("float32", "bfloat16", "float16")
WAYS = ("plain", "offloaded", "compiled", "offloaded layer by layer")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Settings that make the architectures tiny.
SMALL_UNET = {"block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": 16, "layers_per_block": 1}
SMALL = {
    "Stable Diffusion 1.5": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **SMALL_UNET,
    },
    "SDXL": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 1,
        "attention_head_dim": 4,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        **SMALL_UNET,
    },
    "FLUX.1-dev": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 8),
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
    },
    "Wan 2.1 1.3B": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "text_dim": 16,
    },
}


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        model: Name in `MODELS`.
        task: One of `TASKS`.
        precision: Of weights and latents.
        size: The pipeline's arguments for the size of a sample.
        text_tokens: Length of the prompt embeddings.
        steps: Of a sampling.
        guided: Whether the pipeline evaluates twice for guidance.
        settings: Settings of the network instead of the published ones, e.g. fewer layers.
        way: How the network runs, one of `WAYS`.
    """

    model: str
    task: str
    precision: str
    size: Mapping[str, int]
    text_tokens: int
    steps: int = SAMPLED_STEPS
    guided: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    way: str = "plain"

    def network(self) -> ModelMixin:
        """The network with random weights, of the current default dtype and device."""
        model = MODELS[self.model]
        return model.network(**{**model.settings, **self.settings}).eval().requires_grad_(False)

    def description(self) -> str:
        """What is run, without model and precision."""
        work = {
            "sample": f"sample {self.steps} steps",
            "distill": f"distill {DISTILLED_STEPS} steps: {NUM_SAMPLES} samples, teacher of {TEACHER_STEPS} steps, one iteration",
            "adversarial": f"one adversarial step of a {DISTILLED_STEPS}-step solver, {NUM_ADVERSARIAL} sample",
        }[self.task]
        size = " x ".join(map(str, self.size.values()))
        way = "" if self.way == "plain" else f", {self.way}"
        return f"{work}; {size}, {self.text_tokens} text tokens{', guided' * self.guided}{way}"

    def label(self) -> str:
        """The model, and how many of its layers there are if not all."""
        settings, published = dict(self.settings), MODELS[self.model].settings
        layers = [name for name in ("num_layers", "num_single_layers") if name in settings]
        if not layers:
            return self.model
        ours, all_of_them = (" + ".join(str(owner[name]) for name in layers) for owner in (settings, published))
        return f"{self.model}, {ours} of {all_of_them} blocks"


def stable_diffusion(unet: ModelMixin) -> tuple[DiffusionPipeline, dict[str, int]]:
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"prompt_embeds": unet.config.cross_attention_dim}


def sdxl(unet: ModelMixin) -> tuple[DiffusionPipeline, dict[str, int]]:
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return pipe, {"prompt_embeds": unet.config.cross_attention_dim, "pooled_prompt_embeds": pooled}


def flux(transformer: ModelMixin) -> tuple[DiffusionPipeline, dict[str, int]]:
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pooled = transformer.config.pooled_projection_dim
    return pipe, {"prompt_embeds": transformer.config.joint_attention_dim, "pooled_prompt_embeds": pooled}


def wan(transformer: ModelMixin) -> tuple[DiffusionPipeline, dict[str, int]]:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    return pipe, {"prompt_embeds": transformer.config.text_dim}


# From the network to its pipeline, and the widths of the pipeline's embeddings.
PIPELINES: dict[str, Callable[[ModelMixin], tuple[DiffusionPipeline, dict[str, int]]]] = {
    "Stable Diffusion 1.5": stable_diffusion,
    "SDXL": sdxl,
    "FLUX.1-dev": flux,
    "Wan 2.1 1.3B": wan,
    "Wan 2.1 14B": wan,
}


def make_pipeline(case: Case, device: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The pipeline and its arguments. On the device "meta" nothing is computed. Offloaded weights are made on the host."""
    precision = getattr(torch, case.precision)
    default = torch.get_default_dtype()
    torch.set_default_dtype(precision)
    try:
        with torch.device("cpu" if case.way.startswith("offloaded") and device != "meta" else device):
            network = case.network()
    finally:
        torch.set_default_dtype(default)
    pipe, widths = PIPELINES[case.model](network)
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {}
    for name, width in widths.items():
        shape = (1, width) if name.startswith("pooled") else (1, case.text_tokens, width)
        for prefix in ("", "negative_") if case.guided else ("",):
            arguments[prefix + name] = torch.randn(shape, generator=generator).to(device, precision)
    if MODELS[case.model].guided and not case.guided:
        arguments["guidance_scale"] = 1.0
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**arguments, **case.size}


def network_of(pipe: DiffusionPipeline) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def count(case: Case) -> dict[str, int]:
    """The network's parameters, and the operations of an evaluation."""
    pipe, arguments = make_pipeline(case, "meta")
    network = network_of(pipe)
    forward = network.forward

    def counted(*args: Any, **kwargs: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            forward(*args, **kwargs)
        raise LeavePipeline(counter.get_total_flops() // rows_of(args, kwargs))

    network.forward = counted
    scheduler = GASScheduler.from_config(scheduler_config(pipe))
    arguments = SampleInputs.create(TRAINING_SEED, 1, **arguments).pipeline_arguments(pipe)
    operations = call_with_scheduler(pipe, scheduler, type(pipe).__call__, arguments)
    return {"parameters": sum(p.numel() for p in network.parameters()), "operations": operations}


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The batch size of a network's call. With guidance it is twice that of the pipeline."""
    return next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


class Clock:
    """Counts evaluations, which are rows of batches, and measures the time of a network's calls and of all.

    On an accelerator, it waits for the end of every call. Work of the host that would run meanwhile therefore counts in full.
    """

    def __init__(self, network: nn.Module, device: str):
        self.device, self.evaluations, self.network_seconds = device, 0, 0.0
        begin, end = network.register_forward_pre_hook, network.register_forward_hook
        self._hooks = [begin(self._begin, with_kwargs=True), end(self._end)]
        self._started = self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.evaluations += rows_of(args, kwargs)
        self._begun = self._now()

    def _end(self, network: nn.Module, *_: Any) -> None:
        self.network_seconds += self._now() - self._begun

    def record(self) -> dict[str, Any]:
        seconds = self._now() - self._started
        for hook in self._hooks:
            hook.remove()
        return {"evaluations": self.evaluations, "seconds": seconds, "network_seconds": self.network_seconds}


def measure(case: Case, device: str, task: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
    """One measurement; memory is what the weights and the work add to that of a process that has done nothing.

    `task` is what is measured instead of the case's own.
    """
    if case.way == "offloaded layer by layer" and device == "cpu":
        raise ValueError("Accelerate offloads layer by layer from an accelerator only.")
    memory = PeakMemory(device)
    pipe, arguments = make_pipeline(case, device)
    if case.way == "offloaded":
        pipe.enable_model_cpu_offload(device=device)
    elif case.way == "offloaded layer by layer":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    if case.way == "compiled":
        network_of(pipe).forward = compiled(network_of(pipe).forward)
    return {**(task or TASKS[case.task])(pipe, arguments, case, device), "peak_memory": memory.rise()}


def compiled(forward: Callable) -> Callable:
    """A network's `forward`, compiled and on an accelerator recorded as a CUDA graph, whose outputs it copies."""
    graph = torch.compile(forward, mode="reduce-overhead")

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, graph(*args, **kwargs))

    return call


def sample(pipe: DiffusionPipeline, arguments: dict[str, Any], case: Case, device: str) -> dict[str, Any]:
    """Samples with our solver."""
    scheduler = GASScheduler.from_config(scheduler_config(pipe), use_theory_for_untrained_steps=True)
    add_solver_with_all_coefficients(scheduler, case.steps, torch.Generator().manual_seed(0))
    return sample_with(scheduler, pipe, arguments, case, device)


def sample_with(
    scheduler: SchedulerMixin, pipe: DiffusionPipeline, arguments: dict[str, Any], case: Case, device: str
) -> dict[str, Any]:
    """Samples after a first evaluation, on an accelerator after a first sampling."""

    def call(num_inference_steps: int) -> Tensor:
        inputs = SampleInputs.create(TRAINING_SEED, 1, **arguments).pipeline_arguments(pipe)
        return pipe(**inputs, num_inference_steps=num_inference_steps, output_type="latent", return_dict=False)[0]

    pipe.scheduler = scheduler
    call(1 if device == "cpu" else case.steps)
    clock = Clock(network_of(pipe), device)
    latents = call(case.steps)
    return {**clock.record(), "finite": bool(latents.isfinite().all())}


def distill_solver(pipe: DiffusionPipeline, arguments: dict[str, Any], case: Case, device: str) -> dict[str, Any]:
    """A distillation from a theory solver, with the teacher's samples and the check by the plain pipeline."""
    start = GASScheduler.from_config(scheduler_config(pipe))
    start.add_solver(start.theory_solver(DISTILLED_STEPS, mu=1.0))
    inputs = SampleInputs.create(TRAINING_SEED, NUM_SAMPLES, **arguments)
    settings = {"teacher_num_inference_steps": TEACHER_STEPS, "initialize_from": start, "max_iterations": 1}
    clock = Clock(network_of(pipe), device)
    scheduler = distill(pipe, DISTILLED_STEPS, inputs=inputs, **settings)
    provenance = scheduler.solvers[DISTILLED_STEPS].provenance
    measured = ("initial_distance", "distance", "sampled_distance")
    return clock.record() | {name: provenance[name] for name in measured}


def adversarial_step(pipe: DiffusionPipeline, arguments: dict[str, Any], case: Case, device: str) -> dict[str, Any]:
    """A step of solver and discriminator after the teacher's sample of two steps, with gradient checkpointing."""
    inputs = SampleInputs.create(TRAINING_SEED, NUM_ADVERSARIAL, **arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples = TeacherCache(folder, case.model, default_teacher(pipe), 2).collect(pipe, inputs, 1, "Teacher")
    to_grid = partial(as_grid, pipe=pipe, **case.size)
    discriminator = R3GANDiscriminator.for_samples(tuple(to_grid(samples.final).shape[1:])).to(device)
    solver = GASScheduler.from_config(scheduler_config(pipe)).theory_solver(DISTILLED_STEPS, mu=1.0)
    recipe = Recipe(train_batch_size=NUM_ADVERSARIAL, gradient_checkpointing=True)
    trainer = GradientDescent(
        pipe,
        solver,
        samples,
        loss=Loss("l1"),
        recipe=recipe,
        accelerator=Accelerator(cpu=device == "cpu"),
        adversary=Adversary(discriminator, AdversarialRecipe(), to_grid),
    )
    clock = Clock(network_of(pipe), device)
    log = trainer.step()
    # The way back through the network has no hooks.
    return clock.record() | {"network_seconds": None, "gradient_norm": log["gradient_norm"]}


TASKS = {"sample": sample, "distill": distill_solver, "adversarial": adversarial_step}


def num_expected(case: Case) -> float:
    """The evaluations that a case is expected to take. The way back counts as two."""
    n = DISTILLED_STEPS
    if case.task == "sample":
        steps = case.steps + 1
    elif case.task == "adversarial":
        # The teacher's sample, the discriminator's fake, and forward, forward again, the blocks again and back.
        steps = NUM_ADVERSARIAL * (2 + n + 5 * n)
    else:
        num_training = NUM_SAMPLES - 1
        # A trial, and the held-out sample before, after, and twice for the check.
        steps = NUM_SAMPLES * TEACHER_STEPS + num_training * (num_evaluations(n) + n) + 4 * n
    return steps * (1 + case.guided)


def matrix_speed(precision: str, device: str) -> float:
    """Operations per second of a product of matrices."""
    size = 512 if device == "cpu" else 8192
    a = torch.randn(size, size).to(device, getattr(torch, precision))

    def seconds() -> float:
        started = time.perf_counter()
        (a @ a).flatten()[0].item()
        return time.perf_counter() - started

    return 2 * size**3 / min(seconds() for _ in range(3))


def cpu_cases() -> list[Case]:
    """The cases for which a CPU core takes minutes; the longest is the last."""
    image, large = {"height": 512, "width": 512}, {"height": 1024, "width": 1024}
    small, video = {"height": 256, "width": 256}, {"height": 256, "width": 256, "num_frames": 5}
    fewer = {"num_layers": 4, "num_single_layers": 8}
    tiny, tiny_video = {"height": 64, "width": 64}, {"height": 64, "width": 64, "num_frames": 5}
    sd, xl, flux_dev, wan_small = "Stable Diffusion 1.5", "SDXL", "FLUX.1-dev", "Wan 2.1 1.3B"
    full_video = {"height": 480, "width": 832, "num_frames": 81}
    return [
        Case(sd, "sample", "float32", image, 77, steps=2),
        Case(sd, "sample", "bfloat16", image, 77),
        # Processors without this arithmetic take minutes for an evaluation of full size.
        Case(sd, "sample", "float16", tiny, 77, steps=2),
        Case(sd, "sample", "bfloat16", image, 77, way="offloaded"),
        Case(xl, "sample", "bfloat16", large, 77, steps=2),
        Case(xl, "distill", "bfloat16", tiny, 77),
        Case(xl, "adversarial", "bfloat16", small, 77),
        Case(flux_dev, "sample", "bfloat16", large, 512),
        Case(flux_dev, "sample", "bfloat16", image, 512, steps=2, settings=fewer),
        Case(flux_dev, "distill", "bfloat16", tiny, 16, settings=fewer),
        Case(flux_dev, "adversarial", "bfloat16", tiny, 16, settings=fewer),
        Case(wan_small, "sample", "bfloat16", video, 64, steps=2),
        Case(wan_small, "distill", "bfloat16", tiny_video, 16),
        Case(wan_small, "adversarial", "bfloat16", tiny_video, 16),
        Case("Wan 2.1 14B", "sample", "bfloat16", full_video, 512),
        Case(sd, "adversarial", "bfloat16", image, 77),
        Case(sd, "distill", "bfloat16", image, 77),
    ]


def accelerator_cases() -> list[Case]:
    """All models in full."""
    sizes = {
        "Stable Diffusion 1.5": ({"height": 512, "width": 512}, 77),
        "SDXL": ({"height": 1024, "width": 1024}, 77),
        "FLUX.1-dev": ({"height": 1024, "width": 1024}, 512),
        **dict.fromkeys(("Wan 2.1 1.3B", "Wan 2.1 14B"), ({"height": 480, "width": 832, "num_frames": 81}, 512)),
    }
    cases = []
    for model, (size, text_tokens) in sizes.items():
        for precision in ("bfloat16", "float16"):
            case = partial(Case, model, precision=precision, size=size, text_tokens=text_tokens)
            case = partial(case, guided=MODELS[model].guided)
            cases += [case("sample", way=way) for way in WAYS]
        cases += [case(task, precision="bfloat16") for task in ("distill", "adversarial")]
    return cases


def small_cases() -> list[Case]:
    """Tiny networks for all tasks, and a case that needs an accelerator."""
    cases = []
    for model, settings in SMALL.items():
        size = {"height": 32, "width": 32} | ({"num_frames": 5} if model.startswith("Wan") else {})
        guided = MODELS[model].guided
        case = partial(Case, model, precision="float32", size=size, text_tokens=5, settings=settings)
        cases += [case("sample", guided=guided), case("distill"), case("adversarial", guided=guided)]
    return [*cases, replace(cases[0], way="offloaded")]


def gibibytes(case: Case, numbers: Mapping[str, int]) -> float:
    """The memory of a network's weights."""
    return numbers["parameters"] * getattr(torch, case.precision).itemsize / 2**30


def obstacle(case: Case, numbers: Mapping[str, int], device: str, memory: float) -> str | None:
    """Why a case is not run."""
    if case.way.startswith("offloaded") and device == "cpu":
        return "not run: needs an accelerator"
    needed = 0.0 if case.way.startswith("offloaded") else gibibytes(case, numbers)  # offloaded weights lie on the host
    return f"not run: needs {needed:.1f} GiB for its weights" if needed > memory else None


def free_memory(device: str) -> float:
    """Free memory in GiB."""
    return (torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available) / 2**30


def name_of(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{model}, {threads} CPU thread{'s' * (threads > 1)}"


def number(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters > 1e8 else f"{parameters / 1e3:.0f} k"


def share(row: dict[str, Any]) -> float | None:
    """The share of the time that the network did not take."""
    return None if row.get("network_seconds") is None else 1 - row["network_seconds"] / row["seconds"]


def place(row: dict[str, Any]) -> list[int]:
    """The place of a row among those of its device."""
    orders = {"model": MODELS, "task": TASKS, "precision": PRECISIONS, "way": WAYS}
    return [list(order).index(row["case"][name]) for name, order in orders.items()]


def table(rows: list[dict[str, Any]]) -> str:
    header = ["model", "parameters", "run", "precision", "evaluations", "time", "evaluations per second"]
    header += ["GFLOP per second", "peak memory", "not the network"]
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        cells = [table_row(row) for row in rows if row["device"] == device]
        parts.append(f"On {device}:\n\n{markdown_table(header, cells)}")
    return "\n\n".join(parts)


def table_row(row: dict[str, Any]) -> list[str]:
    case = Case(**row["case"])
    cells = [case.label(), number(row["parameters"]), case.description(), case.precision]
    if "not_run" in row:
        return [*cells, row["not_run"], *[""] * 5]
    rest, speed = share(row), row["evaluations"] * row["operations"] / (row["network_seconds"] or math.inf)
    return [
        *cells,
        str(row["evaluations"]),
        f"{row['seconds']:.1f} s",
        f"{row['evaluations'] / row['seconds']:.3g}",
        f"{speed / 1e9:.0f}" if speed else "-",
        f"{row['peak_memory'] / 2**30:.1f} GiB",
        "-" if rest is None else f"{rest:.2%}",
    ]


def draw(rows: list[dict[str, Any]]) -> Any:
    found = [row for row in rows if share(row) is not None]
    picture, axes = figure(1, 2, size=(11, 0.9 + 0.45 * len(found)), sharey=True)
    shares, speeds = axes[0]
    cases = [Case(**row["case"]) for row in found]
    labels = [
        f"{case.label()}, {case.precision}\n{case.description().split(';')[0].split(':')[0]}; {row['device']}"
        for case, row in zip(cases, found)
    ]
    places = range(len(found))
    shares.barh(places, [100 * share(row) for row in found], color="C0")
    shares.axvline(100 * GOAL, color="black", linewidth=0.8, label=f"goal: {GOAL:.0%}")
    shares.set(xlabel="time that is not the network's, %")
    shares.legend(fontsize=7)
    speeds.barh(
        places, [row["evaluations"] * row["operations"] / row["network_seconds"] / 1e9 for row in found], color="C1"
    )
    speeds.set(xlabel="operations of the network, GFLOP per second", xscale="log")
    shares.set_yticks(places, labels, fontsize=6)
    shares.invert_yaxis()
    for axis in (shares, speeds):
        axis.grid(alpha=0.3, axis="x")
    return picture


def key(case: Mapping[str, Any], device: str) -> str:
    """What tells measurements apart."""
    return f"{device}: {json.dumps(case, sort_keys=True)}"


def kept(script: str, device: str, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """The measurements of earlier runs: those of these cases and those of other devices."""
    path = output_path(script, ".json")
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    current = {key(asdict(case), device) for case in cases}
    keyed = {key(row["case"], row["device"]): row for row in rows}
    return {name: row for name, row in keyed.items() if name in current or row["device"] != device}


def announce(cases: list[Case], counted: list[dict[str, int]], device: str, memory: float) -> None:
    """Says what will be run and how long it will take."""
    runs = [pair for pair in zip(cases, counted) if obstacle(*pair, device, memory) is None]
    precisions = {case.precision for case, _ in runs}
    speeds = {precision: matrix_speed(precision, device) for precision in precisions}
    seconds = sum(
        num_expected(case) * numbers["operations"] / (SPEED * speeds[case.precision]) for case, numbers in runs
    )
    weights = max((gibibytes(*run) for run in runs), default=0.0)
    print(
        f"{len(runs)} of {len(cases)} measurements run on {name_of(device)}, with at most {weights:.1f} GiB of weights. They take "
        f"about {math.ceil(seconds / 60)} minutes if the networks reach {SPEED:.0%} of the speed of a product of matrices.",
        flush=True,
    )


def run(case: Case, device: str) -> dict[str, Any]:
    """A measurement in its own process. What needs too much memory is no obstacle to the other cases."""
    try:
        return in_own_process(measure, case, device)
    except (torch.OutOfMemoryError, BrokenProcessPool):
        return {"not_run": "failed: not enough memory"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--memory", type=float, help="the most GiB for a network's weights; default: what is free")
    parser.add_argument("--again", action="store_true", help="repeat what has been measured on this device")
    parser.add_argument("--small", action="store_true", help="tiny networks, in seconds")
    args = parser.parse_args()
    script = "real_sizes-small" if args.small else __file__
    cases = small_cases() if args.small else cpu_cases() if args.device == "cpu" else accelerator_cases()
    device = name_of(args.device)
    memory = free_memory(args.device) if args.memory is None else args.memory
    rows = kept(script, device, cases)
    pending = [case for case in cases if case.model in args.models]
    if not args.again:
        pending = [case for case in pending if "seconds" not in rows.get(key(asdict(case), device), {})]
    counted = [count(case) for case in tqdm(pending, desc="Counting operations", unit="case")]
    announce(pending, counted, args.device, memory)
    with tqdm(list(zip(pending, counted)), unit="case") as bar:
        for case, numbers in bar:
            bar.set_description(f"{case.label()}, {case.task}, {case.precision}")
            row = {"device": device, "accelerator": args.device != "cpu", "case": asdict(case), "versions": VERSIONS}
            reason = obstacle(case, numbers, args.device, memory)
            rows[key(asdict(case), device)] = (
                row | numbers | ({"not_run": reason} if reason else run(case, args.device))
            )
            write_results(script, list(rows.values()))
    found = sorted(rows.values(), key=place)
    write(script, found, table(found), draw(found))


if __name__ == "__main__":
    main()
