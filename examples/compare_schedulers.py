"""Compares schedulers on your prompts, from the same noise: a picture, and distances to a teacher with many steps.

    python examples/compare_schedulers.py
    python examples/compare_schedulers.py --model some/model --guidance_scale 5 --prompts "a fox" "an old lighthouse" \
        --schedulers you/some-model-gas UniPCMultistepScheduler DPMSolverMultistepScheduler:use_karras_sigmas=true

A scheduler is a folder, a Hub repository, or a class of Diffusers or of this package with settings after a colon.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_gas import SampleInputs
from diffusers_gas.comparison import errors_to_teacher
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED
from diffusers_gas.pipelines.named_schedulers import check_step_counts, load_scheduler
from diffusers_gas.pipelines.sampling import sample_images
from diffusers_gas.pipelines.teacher import TeacherSamples, default_teacher
from diffusers_gas.presentation.figures import comparison_picture


HERE = Path(__file__).resolve().parent
PROMPTS = [
    "red apple",
    "cat face with tears of joy",
    "police car",
    "penguin",
    "sunflower",
    "slice of pizza",
]
SCHEDULERS = [
    str(HERE / "solvers" / "text-to-emoji" / "gs"),
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
]
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=HERE / "teachers" / "text-to-emoji", help="a folder or a Hub repository")
parser.add_argument("--schedulers", nargs="+", default=SCHEDULERS)
parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[4])
parser.add_argument("--prompts", nargs="+", default=PROMPTS)
parser.add_argument("--guidance_scale", type=float, default=7.5)
parser.add_argument("--device", default=ACCELERATOR)
parser.add_argument("--output", type=Path, default=Path("example_output/compare_schedulers.png"))
args = parser.parse_args()

dtype = torch.float32 if str(args.device) == "cpu" else torch.float16
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
prompts = [{"prompt": prompt} for prompt in args.prompts]
samples = SampleInputs.create(EVALUATION_SEED, len(prompts), prompts, guidance_scale=args.guidance_scale)
schedulers = {"/".join(Path(entry).parts[-2:]): load_scheduler(entry, pipe) for entry in args.schedulers}
for name, scheduler in schedulers.items():
    check_step_counts(name, scheduler, args.num_inference_steps)

teacher, n = default_teacher(pipe), 50
reference = TeacherSamples(samples, *sample_latents(pipe, teacher, n, **samples.pipeline_arguments(pipe)))
rows = {f"teacher, {n} steps": sample_images(pipe, teacher, n, samples)}
print(f"Mean squared distance of latents to {type(teacher).__name__} with {n} steps:")
for n in args.num_inference_steps:
    for name, scheduler in schedulers.items():
        rows[f"{name}, {n} steps"] = sample_images(pipe, scheduler, n, samples)
        distance, _ = errors_to_teacher(pipe, scheduler, n, reference, batch_size=8)
        print(f"{n:>3} steps  {distance:.5f}  {name}")

comparison_picture(rows, args.output, args.prompts)
print(f"Picture: {args.output}")
