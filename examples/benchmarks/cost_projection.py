"""Projected cost of distilling solvers for large models, and a check of the projection for several processes.

    python examples/benchmarks/cost_projection.py

This script runs no large model. The operations of a network evaluation are those that PyTorch counts on the published architectures
without weights; a multiplication and an addition count as two. The evaluations of a fit are those that the most similar shipped model
took, all included, read from the file `FITS`. A plan of SDM for 8 steps takes at most the evaluations of `default_budget`. Operations become hours with
the speed that real_sizes.py measured with this model on an accelerator, or else with an assumed speed: `UTILIZATION` of `PEAK`. Text
encoders, the decoder and activations are not counted.

Several GPUs share the evaluations. The rest of an iteration, and the number of bytes that processes exchange, are taken from
distillation_cost.json; the speed of the exchange is assumed (`LATENCY` and `BANDWIDTH`). More processes than `LINEARIZED` of
gauss_newton.py have nothing to do. Teacher samples are made in files of `LAZY_SHARD_SIZE` samples, each by one process. As a check,
the same model predicts the two-process times of distillation_cost.json from the one-process times. A second check compares the
speeds of different networks on one device, which the projection takes to be equal.

The results are cost_projection.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script
takes a minute on a CPU core.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, UNet2DConditionModel, WanTransformer3DModel
from report import figure, markdown_table, read, write
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers_gas.calibration import default_budget
from diffusers_gas.distillation.distill import NUM_HELD_OUT
from diffusers_gas.distillation.gauss_newton import LINEARIZED
from diffusers_gas.pipelines.driving import num_evaluations
from diffusers_gas.pipelines.teacher import LAZY_SHARD_SIZE


FITS = "solver_cost"  # solver_cost.json
STEP_COUNTS = (4, 8)
TEACHER_STEPS = 50
NUM_PROCESSES = (1, 2, 4, 8)
# Dense bfloat16 operations per second of an H100, and the share of them that transformers of this size are assumed to reach.
PEAK, UTILIZATION = 989e12, 0.4
# Seconds per sum over processes on several machines, and bytes per second.
LATENCY, BANDWIDTH = 1e-3, 1e9

Shapes = Mapping[str, Any]  # tuples of integers, or mappings of further shapes


@dataclass(frozen=True)
class Model:
    """A published network and how its pipeline calls it by default.

    Attributes:
        network, settings: The class of the network, and the settings of its published configuration.
        source: Where the configuration is published.
        parameters: The published number of parameters.
        inputs: Shapes of the network's inputs for one sample.
        latents: Shape of a sample.
        guided: Whether the pipeline evaluates twice for guidance.
        like: The shipped model whose number of evaluations is assumed for this one.
    """

    network: type[ModelMixin]
    settings: Mapping[str, Any]
    source: str
    parameters: float
    inputs: Shapes
    latents: tuple[int, ...]
    guided: bool
    like: str


def wan(parameters: float, source: str, **settings: int) -> Model:
    latents = (16, 21, 60, 104)  # 81 frames of 480 x 832
    inputs = {"hidden_states": (1, *latents), "timestep": (1,), "encoder_hidden_states": (1, 512, 4096)}
    return Model(WanTransformer3DModel, settings, source, parameters, inputs, latents, True, "flow-digits")


MODELS = {
    "Stable Diffusion 1.5": Model(
        network=UNet2DConditionModel,
        settings={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        source="stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json",
        parameters=0.86e9,
        inputs={"sample": (1, 4, 64, 64), "timestep": (1,), "encoder_hidden_states": (1, 77, 768)},
        latents=(4, 64, 64),
        guided=True,
        like="text-to-digits",
    ),
    "SDXL": Model(
        network=UNet2DConditionModel,
        settings={
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        source="stabilityai/stable-diffusion-xl-base-1.0, unet/config.json",
        parameters=2.57e9,
        inputs={
            "sample": (1, 4, 128, 128),
            "timestep": (1,),
            "encoder_hidden_states": (1, 77, 2048),
            "added_cond_kwargs": {"text_embeds": (1, 1280), "time_ids": (1, 6)},
        },
        latents=(4, 128, 128),
        guided=True,
        like="text-to-digits",
    ),
    "FLUX.1-dev": Model(
        network=FluxTransformer2DModel,
        settings={"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "guidance_embeds": True},
        source="black-forest-labs/FLUX.1-dev, transformer/config.json",
        parameters=12e9,
        inputs={
            "hidden_states": (1, 4096, 64),
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
            "timestep": (1,),
            "guidance": (1,),
            "img_ids": (4096, 3),
            "txt_ids": (512, 3),
        },
        latents=(4096, 64),
        guided=False,
        like="flow-digits",
    ),
    "Wan 2.1 1.3B": wan(
        1.4e9,
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json",
        num_attention_heads=12,
        ffn_dim=8960,
        num_layers=30,
    ),
    "Wan 2.1 14B": wan(
        14e9,
        "Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json",
        num_attention_heads=40,
        ffn_dim=13824,
        num_layers=40,
    ),
}


def count_parameters(model: Model) -> int:
    with torch.device("meta"):
        network = model.network(**model.settings)
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def count_operations(model: Model) -> int:
    """The number of operations of one evaluation of the network, without guidance."""
    with torch.device("meta"):
        network, inputs = model.network(**model.settings), tensors(model.inputs)
        with FlopCounterMode(display=False) as counter:
            network(**inputs)
    return counter.get_total_flops()


def tensors(shapes: Shapes) -> dict[str, Any]:
    return {name: torch.empty(shape) if isinstance(shape, tuple) else tensors(shape) for name, shape in shapes.items()}


def measured_fit(teacher: str, num_inference_steps: int) -> dict[str, int]:
    """The fit on a shipped model by default settings that took most evaluations."""
    (row,) = (row for row in read(FITS) if (row["model"], row["steps"]) == (teacher, num_inference_steps))
    return max(row["fits"], key=lambda fit: fit["evaluations"])


@dataclass(frozen=True)
class Iterations:
    """The measured cost of a Gauss-Newton iteration without the network."""

    fixed_seconds: float
    reduce_calls: int
    reduce_bytes: int

    @classmethod
    def measured(cls, num_inference_steps: int, measurements: list[dict]) -> "Iterations":
        rows = [r for r in measurements if r["method"] == "Gauss-Newton" and r["processes"] == 1]
        row = min(rows, key=lambda row: abs(row["steps"] - num_inference_steps))
        # A measurement with at least as many unknowns, because the exchanged bytes grow with the square of their number.
        growth = max(1.0, (num_inference_steps / row["steps"])) ** 4
        return cls(row["fixed_seconds"], row["reduce_calls"], math.ceil(growth * row["reduce_bytes"]))

    def seconds(self, num_processes: int) -> float:
        exchange = self.reduce_calls * LATENCY + self.reduce_bytes / BANDWIDTH
        return self.fixed_seconds + (num_processes > 1) * exchange


def states_in_memory(num_inference_steps: int) -> int:
    """Bytes of the states for each sample of a batch: three for each unknown, the initial state, outputs and directions."""
    n = num_inference_steps
    neighbours = n * (n + 3) // 2 + n
    return 3 * neighbours + 3 * (n + 1)


def project(name: str, seconds: float, steps: int, iterations: Iterations) -> dict[str, Any]:
    """The projected cost of a distillation, from the seconds of an evaluation."""
    model = MODELS[name]
    measured = measured_fit(model.like, steps)
    samples = measured["num_teacher_samples"]
    teacher = (samples + NUM_HELD_OUT) * TEACHER_STEPS
    fit = measured["evaluations"] - teacher
    wall = {}
    for processes in NUM_PROCESSES:
        files = sum(math.ceil(math.ceil(count / LAZY_SHARD_SIZE) / processes) for count in (samples, NUM_HELD_OUT))
        sampling = min(files * LAZY_SHARD_SIZE * TEACHER_STEPS, teacher) * seconds
        overhead = fit / (LINEARIZED * (num_evaluations(steps) + steps)) * iterations.seconds(processes)
        wall[processes] = fit * seconds / processes + overhead + sampling
    return {
        "model": name,
        "steps": steps,
        "samples": samples,
        "evaluations": {"fit": fit, "teacher": teacher},
        "teacher_images": measured["teacher_images"],
        "gpu_hours": (fit + teacher) * seconds / 3600,
        "wall_hours": {processes: total / 3600 for processes, total in wall.items()},
        "states_bytes": 4 * math.prod(model.latents) * states_in_memory(steps),
        "teacher_bytes": 2 * 4 * math.prod(model.latents) * (samples + NUM_HELD_OUT),
        "exchanged_bytes": iterations.reduce_bytes,
    }


def check(measurements: list[dict]) -> list[dict]:
    """Times of several processes: predicted by the same model from those of one process, and measured."""
    found = {
        (row["steps"], row["samples"], row["processes"]): row
        for row in measurements
        if row["method"] == "Gauss-Newton"
    }
    rows = []
    for (steps, samples, processes), row in found.items():
        alone = found.get((steps, samples, 1))
        if processes == 1 or alone is None:
            continue
        predicted = alone["fixed_seconds"] + (alone["seconds"] - alone["fixed_seconds"]) / processes
        case = {"steps": steps, "samples": samples, "processes": processes, "alone": alone["seconds"]}
        rows.append({**case, "predicted": predicted, "measured": row["seconds"]})
    return rows


@dataclass(frozen=True)
class Speed:
    """Operations per second of a network."""

    operations: float
    source: str


def speed_of(model: str, sizes: list[dict]) -> Speed:
    """The highest speed of a sampling that real_sizes.py measured on an accelerator, or else the assumed one."""
    rows = [row for row in measured_samplings(sizes) if row["accelerator"] and row["case"]["model"] == model]
    if not rows:
        return Speed(PEAK * UTILIZATION, f"assumed: {UTILIZATION:.0%} of an H100")
    best = max(rows, key=operations_per_second)
    return Speed(operations_per_second(best), f"measured: {best['device']}")


def measured_samplings(sizes: list[dict]) -> list[dict]:
    return [row for row in sizes if row["case"]["task"] == "sample" and "seconds" in row]


def operations_per_second(row: dict) -> float:
    return row["operations"] * row["evaluations"] / row["seconds"]


def speeds_of_networks(sizes: list[dict]) -> list[dict]:
    """The highest speed in bfloat16 that real_sizes.py measured, for every device and model."""
    found: dict[tuple[str, str], float] = {}
    for row in measured_samplings(sizes):
        if row["case"]["precision"] == "bfloat16":
            case = row["device"], row["case"]["model"]
            found[case] = max(found.get(case, 0.0), operations_per_second(row))
    return [{"device": device, "model": model, "speed": speed} for (device, model), speed in found.items()]


def duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def table(
    networks: dict[str, dict],
    projections: list[dict],
    checked: list[dict],
    sdm: dict[str, float],
    speeds: list[dict],
) -> str:
    of_networks = [
        [
            name,
            f"{network['parameters'] / 1e9:.2f} B ({MODELS[name].parameters / 1e9:g} B)",
            f"{network['operations'] / 1e12:.2f}" + " x 2" * MODELS[name].guided,
            f"{network['seconds']:.3f} s ({network['speed']})",
            f"{2 * network['parameters'] / 2**30:.1f} GB",
            duration(sdm[name]),
        ]
        for name, network in networks.items()
    ]
    of_projections = [
        [
            row["model"],
            str(row["steps"]),
            str(row["samples"]),
            str(row["teacher_images"]),
            f"{row['evaluations']['fit'] / 1e3:.0f} k + {row['evaluations']['teacher'] / 1e3:.0f} k",
            *map(duration, row["wall_hours"].values()),
            f"{row['states_bytes'] / 2**20:.0f} MB",
            f"{row['teacher_bytes'] / 2**20:.0f} MB",
        ]
        for row in projections
    ]
    of_checks = [
        [str(row["steps"]), str(row["samples"]), str(row["processes"])]
        + [f"{row[name]:.2f} s" for name in ("alone", "predicted", "measured")]
        for row in checked
    ]
    header = ["model", "parameters (published)", "TFLOP per evaluation", "time of an evaluation"]
    networks_table = markdown_table([*header, "weights in bfloat16", "plan of SDM"], of_networks)
    header = ["model", "steps", "samples", "images of the teacher", "evaluations: fit + teacher", "1 GPU"]
    header += map(str, NUM_PROCESSES[1:])
    projections_table = markdown_table(
        [*header, "states for each sample of a batch", "teacher samples"], of_projections
    )
    checks_table = markdown_table(["steps", "samples", "processes", "one process", "predicted", "measured"], of_checks)
    speeds_table = markdown_table(
        ["device", "model", "GFLOP per second"],
        [[row["device"], row["model"], f"{row['speed'] / 1e9:.0f}"] for row in speeds],
    )
    exchanged = max(row["exchanged_bytes"] for row in projections)
    return (
        f"{networks_table}\n\n{projections_table}\n\nIn an iteration, processes exchange at most {exchanged / 1e3:.0f} kB. "
        f"Check of the projection: the time of a linearization on CPU cores, predicted and measured.\n\n{checks_table}\n\n"
        "Check of equal speeds: what different networks reach in bfloat16 on one device, by the samplings of real_sizes.py. Other load ran beside them on the CPU, so that they are lower bounds.\n\n"
        f"{speeds_table}"
    )


def draw(projections: list[dict]) -> Any:
    picture, axes = figure(1, 2, size=(10, 3.8))
    hours, scaling = axes[0]
    height = 0.8 / len(STEP_COUNTS)
    for i, steps in enumerate(STEP_COUNTS):
        rows = [row for row in projections if row["steps"] == steps]
        places = [place + (i - (len(STEP_COUNTS) - 1) / 2) * height for place in range(len(rows))]
        hours.barh(places, [row["gpu_hours"] for row in rows], height, label=f"{steps} steps")
    hours.set_yticks(range(len(MODELS)), MODELS)
    hours.invert_yaxis()
    hours.set(xscale="log", xlabel="GPU hours")
    hours.legend(fontsize=7)
    for i, name in enumerate(MODELS):
        (row,) = (r for r in projections if (r["model"], r["steps"]) == (name, STEP_COUNTS[-1]))
        wall = row["wall_hours"]
        scaling.plot(list(wall), list(wall.values()), "o-", color=f"C{i}", markersize=4, label=name)
        scaling.plot(list(wall), [row["gpu_hours"] / n for n in wall], ":", color=f"C{i}", linewidth=1)
    scaling.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="hours; dotted: perfect sharing")
    scaling.set_title(f"{STEP_COUNTS[-1]} steps", fontsize=10)
    scaling.set_xticks(NUM_PROCESSES, NUM_PROCESSES)
    scaling.set_xticks([], minor=True)
    scaling.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (hours, scaling):
        axis.grid(alpha=0.3)
    return picture


def main() -> None:
    measurements, sizes = read("distillation_cost"), read("real_sizes")
    networks = {}
    for name, model in tqdm(MODELS.items(), desc="Counting operations"):
        operations = count_operations(model)
        speed = speed_of(name, sizes)
        seconds = operations * (1 + model.guided) / speed.operations
        networks[name] = {"parameters": count_parameters(model), "published": model.parameters, "source": model.source}
        networks[name] |= {"operations": operations, "guided": model.guided, "seconds": seconds}
        networks[name]["speed"] = speed.source
    projections = [
        project(name, networks[name]["seconds"], steps, Iterations.measured(steps, measurements))
        for name in MODELS
        for steps in STEP_COUNTS
    ]
    sdm = {name: default_budget(8) * network["seconds"] / 3600 for name, network in networks.items()}
    checked, speeds = check(measurements), speeds_of_networks(sizes)
    assumptions = {"peak": PEAK, "utilization": UTILIZATION, "latency": LATENCY, "bandwidth": BANDWIDTH}
    results = {"assumptions": assumptions, "fits": FITS, "networks": networks, "projections": projections}
    results |= {"sdm_hours": sdm, "check": checked, "speeds": speeds}
    write(__file__, results, table(networks, projections, checked, sdm, speeds), draw(projections))


if __name__ == "__main__":
    main()
