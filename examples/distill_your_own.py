"""Distills a solver from a pipeline, in a few lines of Python.

    python examples/distill_your_own.py
    python examples/distill_your_own.py --model some/model --prompts_file prompts.txt --num_samples 1024 --max_iterations 24 --guidance_scale 5

Distillation only samples the pipeline. It needs neither data nor gradients. The default, a few samples, 4 network evaluations
and 4 iterations, is for a first look. It takes about a minute of a CPU core, as long as sampling some 70 images with the teacher.
`GASScheduler.from_pretrained` loads the scheduler folder that the script writes, and `scheduler.push_to_hub` shares it.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_gas import GASScheduler, SampleInputs, distill
from diffusers_gas.presentation.figures import comparison_picture


TEACHER = Path(__file__).resolve().parent / "teachers" / "text-to-emoji"
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=TEACHER, help="a folder or a Hub repository")
parser.add_argument(
    "--prompts_file", type=Path, default=TEACHER / "prompts.txt", help="a text file with one prompt per line"
)
parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[4])
parser.add_argument("--num_samples", type=int, default=60, help="a limit; a fifth is held out, at most 32")
parser.add_argument(
    "--max_iterations", type=int, default=4, help="6 for each step for a good solver; the fit also stops by itself"
)
parser.add_argument("--guidance_scale", type=float, default=7.5, help="the scale that you sample with")
parser.add_argument("--device", default=ACCELERATOR)
parser.add_argument("--output_dir", type=Path, default=Path("example_output/distilled"))
args = parser.parse_args()

dtype = torch.float32 if str(args.device) == "cpu" else torch.float16
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)

lines = args.prompts_file.read_text(encoding="utf-8-sig").split("\n")
prompts = [{"prompt": line.strip()} for line in lines if line.strip()]
samples = SampleInputs.create(0, args.num_samples, prompts, guidance_scale=args.guidance_scale)
print("The defaults take about a minute of a CPU core, as long as sampling some 70 images with the teacher.")
scheduler = distill(pipe, args.num_inference_steps, inputs=samples, max_iterations=args.max_iterations, batch_size=64)
scheduler.save_pretrained(args.output_dir)

for n, solver in scheduler.solvers.items():
    before, after = (solver.provenance[name] for name in ("initial_distance", "distance"))
    print(f"{n} steps, distance to the teacher on held-out samples: {before:.4f} before, {after:.4f} after")
    cost, seconds = (solver.provenance[name] for name in ("teacher_images", "seconds"))
    print(f"It took {seconds:.0f} s and as many network evaluations as {cost} images of the teacher.")

pipe.scheduler = GASScheduler.from_pretrained(args.output_dir)
n, texts = args.num_inference_steps[0], [sample["prompt"] for sample in prompts[:6]]
call = {"guidance_scale": args.guidance_scale, "generator": torch.Generator().manual_seed(7), "output_type": "np"}
images = pipe(texts, num_inference_steps=n, **call).images
comparison_picture({f"distilled, {n} steps": images}, args.output_dir / "samples.png", texts)
print(f"Scheduler: {args.output_dir}\nSamples:   {args.output_dir / 'samples.png'}")
