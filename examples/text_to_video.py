"""Text to video with a distilled solver: 4 network evaluations instead of 50.

    python examples/text_to_video.py
    python examples/text_to_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --solver you/wan-gas --prompts "a fox runs" \
        --pipeline_arguments '{"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 5.0}' --output fox.mp4

The script writes a video of samples from the same noise: of the solver, and of the model's own scheduler with the same number of
steps and with 50 steps. The default model is the one of this repository that makes videos.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import export_to_gif, export_to_video
from diffusers.utils.import_utils import is_imageio_available
from PIL import Image, ImageDraw, ImageFont

from diffusers_gas import GASScheduler


HERE = Path(__file__).resolve().parent
TEACHER = HERE / "teachers" / "moving-digits"
PROMPTS = ["the number seven in yellow moving down", "the blue digit four moving left"]
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
MIN_WIDTH, LABEL_HEIGHT = 160, 20  # of a video and of its label, in pixels

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=TEACHER, help="a folder or a Hub repository")
parser.add_argument("--solver", default=HERE / "solvers" / "moving-digits" / "gs", help="a folder or a Hub repository")
parser.add_argument("--prompts", nargs="+", default=PROMPTS)
parser.add_argument("--num_inference_steps", type=int, default=4)
parser.add_argument(
    "--pipeline_arguments", type=json.loads, default={}, help="arguments of the pipeline's call, a JSON object"
)
parser.add_argument("--device", default=ACCELERATOR)
parser.add_argument("--output", type=Path, default=Path("example_output/text_to_video.gif"), help=".gif or .mp4")
args = parser.parse_args()
if args.output.suffix != ".gif" and not is_imageio_available():
    parser.error("Other videos than .gif need imageio: pip install imageio imageio-ffmpeg")

dtype = torch.float32 if str(args.device) == "cpu" else torch.bfloat16
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
own, n = pipe.scheduler, args.num_inference_steps
# With the noise schedule of the model, which solvers for others do not fit.
ours = GASScheduler.from_pretrained(args.model, subfolder="scheduler", solver=args.solver)
beside = Path(args.model) / "pipeline_arguments.json"
call = {**(json.loads(beside.read_text()) if beside.is_file() else {}), **args.pipeline_arguments}


def videos(scheduler: SchedulerMixin, num_inference_steps: int) -> np.ndarray:
    """Samples videos of shape `(prompts, frames, height, width, 3)` in [0, 1]."""
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(args.prompts))]
    return pipe(args.prompts, num_inference_steps=num_inference_steps, generator=generators, **call).frames


def beside_each_other(frames: dict[str, np.ndarray]) -> Image.Image:
    """Puts one frame of the videos of each sampler into a labelled column."""
    width = next(iter(frames.values())).shape[2]
    scale = max(1, MIN_WIDTH // width)
    columns = []
    for label, column in frames.items():
        pixels = (np.concatenate(column) * 255).round().astype(np.uint8)
        image = Image.new("RGB", (scale * width, LABEL_HEIGHT + scale * len(pixels)))
        image.paste(
            Image.fromarray(pixels).resize((scale * width, scale * len(pixels)), Image.NEAREST), (0, LABEL_HEIGHT)
        )
        ImageDraw.Draw(image).text((4, 2), label, font=ImageFont.load_default(13))
        columns.append(np.asarray(image))
    return Image.fromarray(np.concatenate(columns, axis=1))


samples = {
    f"distilled, {n} steps": videos(ours, n),
    f"{type(own).__name__.removesuffix('MultistepScheduler')}, {n} steps": videos(own, n),
    f"{type(own).__name__.removesuffix('MultistepScheduler')}, 50 steps": videos(own, 50),
}
num_frames = next(iter(samples.values())).shape[1]
film = [beside_each_other({label: video[:, i] for label, video in samples.items()}) for i in range(num_frames)]
args.output.parent.mkdir(parents=True, exist_ok=True)
export = export_to_gif if args.output.suffix == ".gif" else export_to_video
export(film, str(args.output), fps=8 if num_frames < 24 else 16)
print(f"Video: {args.output}, {num_frames} frames")
