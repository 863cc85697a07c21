"""Calibrates SDM for Stable Diffusion XL in a few minutes on one GPU, and samples with what it found.

    python examples/sdxl_calibrate_sdm.py

Nothing is trained. Plans are a few kilobytes; share them with `scheduler.push_to_hub("you/sdxl-sdm")`.
"""

import torch
from diffusers import StableDiffusionXLPipeline

from diffusers_gas import SDMScheduler
from diffusers_gas.distillation.teacher import SampleInputs


PROMPTS = [
    "a fox in the snow, photograph",
    "an old lighthouse in a storm, oil painting",
    "a bowl of ramen on a wooden table",
    "portrait of an astronaut, studio light",
]

pipe = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float16, variant="fp16", use_safetensors=True
).to("cuda")
pipe.set_progress_bar_config(disable=True)

# Calibrate with the guidance scale that you sample with: guidance bends trajectories. Two samples for every prompt.
samples = SampleInputs.create(0, 2 * len(PROMPTS), [{"prompt": prompt} for prompt in PROMPTS], guidance_scale=5.0)
scheduler = SDMScheduler.calibrate(pipe, [10, 15, 20], inputs=samples, batch_size=4)
scheduler.save_pretrained("sdxl-sdm")

pipe.scheduler = SDMScheduler.from_pretrained("sdxl-sdm")
image = pipe("a red panda reading a book", num_inference_steps=10, guidance_scale=5.0).images[0]
image.save("red_panda.png")
