"""Distils a solver from a pipeline, in a few lines of Python.

    python examples/distil_your_own.py
    python examples/distil_your_own.py --model some/model --prompts_file prompts.txt --num_samples 1024 --guidance_scale 7.5

Only samples the pipeline: no gradients, no data. The few samples of the default are for a first look, at 4 evaluations. The
scheduler folder that it writes is what `GASScheduler.from_pretrained` loads, and `scheduler.push_to_hub` shares.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_gas import GASScheduler
from diffusers_gas.comparison import comparison_picture
from diffusers_gas.pipelines.inputs import SampleInputs


TEACHER = Path(__file__).resolve().parent / "teachers" / "text-to-digits"
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=TEACHER, help="a folder or a Hub id")
parser.add_argument("--prompts_file", type=Path, default=TEACHER / "prompts.txt", help="with a prompt in each line")
parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[4])
parser.add_argument("--num_samples", type=int, default=60, help="1000 for a good solver; every fifth is held out")
parser.add_argument("--max_iterations", type=int, default=2, help="60 for a good solver; it stops by itself")
parser.add_argument("--guidance_scale", type=float, default=4.0, help="the one that you sample with")
parser.add_argument("--device", default=ACCELERATOR)
parser.add_argument("--output_dir", type=Path, default=Path("example_output/distilled"))
args = parser.parse_args()

dtype = torch.float32 if str(args.device) == "cpu" else torch.float16
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)

prompts = [{"prompt": line} for line in args.prompts_file.read_text(encoding="utf-8").splitlines()]
samples = SampleInputs.create(0, args.num_samples, prompts, guidance_scale=args.guidance_scale)
scheduler = GASScheduler.distill(
    pipe, args.num_inference_steps, inputs=samples, max_iterations=args.max_iterations, batch_size=64
)
scheduler.save_pretrained(args.output_dir)

for n, solver in scheduler.solvers.items():
    before, after = (solver.provenance[name] for name in ("initial_distance", "distance"))
    print(f"{n} steps, distance to the teacher on held-out samples: {before:.4f} before, {after:.4f} after")

pipe.scheduler = GASScheduler.from_pretrained(args.output_dir)
n, texts = args.num_inference_steps[0], [sample["prompt"] for sample in prompts[:6]]
call = {"guidance_scale": args.guidance_scale, "generator": torch.Generator().manual_seed(7), "output_type": "np"}
images = pipe(texts, num_inference_steps=n, **call).images
comparison_picture({f"distilled, {n} steps": images}, args.output_dir / "samples.png", texts)
print(f"Scheduler: {args.output_dir}\nSamples:   {args.output_dir / 'samples.png'}")
