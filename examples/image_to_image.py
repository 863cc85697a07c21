"""Image to image with a solver that was distilled on text to image, beside an untrained solver.

    python examples/image_to_image.py
    python examples/image_to_image.py --model some/model --solver you/some-model-gas --image sketch.png --prompt "a fox"

With 4 steps and a strength of 0.75, sampling begins at the second step and takes 3 network evaluations. The solver was distilled
for all 4 steps. Here it comes closer to 50 steps than the untrained solver, DPM-Solver++ 2M, but that need not be so. Compare
both on your images. The script writes a picture of the sketch and of the images that each solver makes from it with the same noise.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageDraw

from diffusers_gas import GASScheduler
from diffusers_gas.presentation.figures import comparison_picture


HERE = Path(__file__).resolve().parent
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=HERE / "teachers" / "text-to-emoji", help="a folder or a Hub repository")
parser.add_argument("--solver", default=HERE / "solvers" / "text-to-emoji" / "gs", help="a folder or a Hub repository")
parser.add_argument("--image", help="an image file; the default is a drawn face")
parser.add_argument("--prompt", default="smiling face with open mouth")
parser.add_argument("--num_inference_steps", type=int, default=4)
parser.add_argument("--strength", type=float, default=0.75, help="the share of the steps that is sampled")
parser.add_argument("--guidance_scale", type=float, default=7.5, help="the scale that the solver was distilled with")
parser.add_argument("--device", default=ACCELERATOR)
parser.add_argument("--output", type=Path, default=Path("example_output/image_to_image.png"))
args = parser.parse_args()

if args.image is None:
    sketch = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(sketch)
    pen.ellipse([5, 5, 58, 58], fill="gold")
    pen.ellipse([18, 18, 25, 28], fill="saddlebrown")
    pen.ellipse([38, 18, 45, 28], fill="saddlebrown")
    pen.chord([18, 26, 45, 52], 0, 180, fill="saddlebrown")
else:
    sketch = Image.open(args.image).convert("RGB")

dtype = torch.float32 if str(args.device) == "cpu" else torch.float16
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
pipe = AutoPipelineForImage2Image.from_pipe(pipe)
own, n = pipe.scheduler, args.num_inference_steps
# With the noise schedule of the model, which solvers for others do not fit.
ours = GASScheduler.from_pretrained(args.model, subfolder="scheduler", solver=args.solver)


def images(scheduler: SchedulerMixin, num_inference_steps: int) -> list[np.ndarray]:
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    call = {"strength": args.strength, "guidance_scale": args.guidance_scale, "output_type": "np"}
    prompts = [args.prompt] * len(generators)
    return pipe(prompts, sketch, num_inference_steps=num_inference_steps, generator=generators, **call).images


rows = {
    "sketch": [np.asarray(sketch) / 255],
    f"distilled solver, {n} steps": images(ours, n),
    f"untrained solver, {n} steps": images(GASScheduler.from_config(own.config), n),
    f"{type(own).__name__}, {n} steps": images(own, n),
    f"{type(own).__name__}, 50 steps": images(own, 50),
}
comparison_picture(rows, args.output)
print(f"Picture: {args.output}")
