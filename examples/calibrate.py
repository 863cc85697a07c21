"""Calibrates SDM for a pipeline: measures where its trajectories bend, plans the steps accordingly, and samples.

    python examples/calibrate.py
    python examples/calibrate.py --model stabilityai/stable-diffusion-xl-base-1.0 --guidance_scale 5 \
        --num_inference_steps 10 15 20 --num_samples 8 --prompts "a fox in the snow" "an old lighthouse in a storm"

Nothing is trained. Calibration takes 20 seconds of a CPU core here, and minutes for a large model on a GPU. The plans are a few
kilobytes: `SDMScheduler.from_pretrained` loads them, and `scheduler.push_to_hub` shares them.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_gas import SampleInputs, SDMScheduler, calibrate
from diffusers_gas.calibration import summary
from diffusers_gas.presentation.description import describe
from diffusers_gas.presentation.figures import comparison_picture


TEACHER = Path(__file__).resolve().parent / "teachers" / "text-to-emoji"
PROMPTS = [
    "red apple",
    "cat face with tears of joy",
    "police car",
    "penguin",
    "sunflower",
    "slice of pizza",
]
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=TEACHER, help="a folder or a Hub repository")
parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="prompts to measure with")
parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[8], help="numbers of network evaluations")
parser.add_argument("--num_samples", type=int, default=6, help="samples to measure with; 24 for a good plan")
parser.add_argument(
    "--most_evaluations", type=int, default=1500, help="network evaluations that a plan may take; 5000 for a good one"
)
parser.add_argument(
    "--guidance_scale", type=float, default=7.5, help="the scale that you sample with, which bends trajectories"
)
parser.add_argument("--device", default=ACCELERATOR)
parser.add_argument("--output_dir", type=Path, default=Path("example_output/calibrated"))
args = parser.parse_args()

dtype = torch.float32 if str(args.device) == "cpu" else torch.float16
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
pipe.set_progress_bar_config(disable=True)

prompts = [{"prompt": prompt} for prompt in args.prompts]
samples = SampleInputs.create(0, args.num_samples, prompts, guidance_scale=args.guidance_scale)
limits = {"batch_size": 8, "most_evaluations": args.most_evaluations}
scheduler = calibrate(pipe, args.num_inference_steps, inputs=samples, **limits)
scheduler.save_pretrained(args.output_dir)
print(f"{describe(scheduler, args.num_inference_steps)}\n\n{summary(scheduler)}")

pipe.scheduler = SDMScheduler.from_pretrained(args.output_dir)
rows = {}
for n in args.num_inference_steps:
    call = {"guidance_scale": args.guidance_scale, "generator": torch.Generator().manual_seed(7), "output_type": "np"}
    rows[f"SDM, {n} evaluations"] = pipe(args.prompts, num_inference_steps=n, **call).images
comparison_picture(rows, args.output_dir / "samples.png", args.prompts)
print(f"\nScheduler: {args.output_dir}\nSamples:   {args.output_dir / 'samples.png'}")
