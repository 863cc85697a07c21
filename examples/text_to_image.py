"""Text to image with a distilled solver: 4 network evaluations instead of 50.

    python examples/text_to_image.py
    python examples/text_to_image.py --model some/model --solver you/some-model-gas --guidance_scale 5 --prompts "a fox"

The script writes a picture of samples from the same noise: of the solver, and of the model's own scheduler with the same number
of steps and with 50 steps.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from diffusers_gas import GASScheduler
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
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=HERE / "teachers" / "text-to-emoji", help="a folder or a Hub repository")
parser.add_argument("--solver", default=HERE / "solvers" / "text-to-emoji" / "gs", help="a folder or a Hub repository")
parser.add_argument("--prompts", nargs="+", default=PROMPTS)
parser.add_argument("--num_inference_steps", type=int, default=4)
parser.add_argument("--guidance_scale", type=float, default=7.5, help="the scale that the solver was distilled with")
parser.add_argument("--device", default=ACCELERATOR)
parser.add_argument("--output", type=Path, default=Path("example_output/text_to_image.png"))
args = parser.parse_args()

dtype = torch.float32 if str(args.device) == "cpu" else torch.float16
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
own, n = pipe.scheduler, args.num_inference_steps
# With the noise schedule of the model, which solvers for others do not fit.
ours = GASScheduler.from_pretrained(args.model, subfolder="scheduler", solver=args.solver)


def images(scheduler: SchedulerMixin, num_inference_steps: int) -> list[np.ndarray]:
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(args.prompts))]
    call = {"guidance_scale": args.guidance_scale, "generator": generators, "output_type": "np"}
    return pipe(args.prompts, num_inference_steps=num_inference_steps, **call).images


rows = {
    f"distilled solver, {n} steps": images(ours, n),
    f"{type(own).__name__}, {n} steps": images(own, n),
    f"{type(own).__name__}, 50 steps": images(own, 50),
}
comparison_picture(rows, args.output, args.prompts)
print(f"Picture: {args.output}")
