"""Trains the small unconditional DDPM on 8x8 digits that ships in this folder.

The data are the 1797 grey images of `sklearn.datasets.load_digits`, so nothing is downloaded. The result is a pipeline
folder with half-precision weights, to be loaded with `DDPMPipeline.from_pretrained(output_dir)`, and a picture of its
samples. The shipped teacher was made with the defaults:

    OMP_NUM_THREADS=1 python examples/teachers/digits/train_teacher.py --output_dir my_teacher

Ctrl-C ends the training early. The teacher is saved as it is then.
"""

import argparse
from collections import deque
from itertools import chain, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small DDPM on the 8x8 digits of scikit-learn.")
    parser.add_argument("--output_dir", type=Path, default=Path("digits_teacher"), help="Pipeline folder to write.")
    parser.add_argument("--max_train_steps", type=int, default=10_000)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Peak of the cosine schedule.")
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--num_sample_steps", type=int, default=50, help="Solver steps for samples.png.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model() -> UNet2DModel:
    """A network with two resolutions, 8x8 and 4x4, and attention in the middle block."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )


def load_images() -> torch.Tensor:
    """The digits as a (1797, 1, 8, 8) tensor, with the grey levels 0..16 scaled to [-1, 1]."""
    return torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1


def save_samples(output_dir: Path, device: torch.device, num_steps: int, seed: int) -> None:
    """Loads the saved pipeline, and writes a grid of 64 samples."""
    pipeline = DDPMPipeline.from_pretrained(output_dir).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(64, torch.Generator().manual_seed(seed), num_inference_steps=num_steps).images
    framed = [ImageOps.expand(image, border=1, fill=96) for image in images]
    grid = make_image_grid(framed, 8, 8).convert("L").resize((480, 480), Image.Resampling.NEAREST)
    picture = Image.new("L", (480, 504))
    picture.paste(grid, (0, 24))
    label = f"digits teacher: 64 samples, DPM-Solver++(2M), {num_steps} steps, seed {seed}"
    ImageDraw.Draw(picture).text((6, 6), label, fill=255)
    picture.save(output_dir / "samples.png", optimize=True)


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    set_seed(args.seed)

    images, model = load_images(), build_model()
    # Without clipping, and with sampling from the last timestep, a solver made from this config follows the exact ODE.
    noise_scheduler = DDPMScheduler(1000, beta_schedule="linear", clip_sample=False, timestep_spacing="linspace")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    loader = DataLoader(TensorDataset(images), batch_size=args.train_batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = EMAModel(model.parameters(), decay=args.ema_decay)

    accelerator.print(
        f"Training a UNet2DModel of {sum(p.numel() for p in model.parameters()):,} parameters on {len(images):,} "
        f"images of 8x8, {args.max_train_steps:,} steps of {args.train_batch_size} images on {accelerator.device}; "
        f"the pipeline goes to {args.output_dir}"
    )
    losses: deque[float] = deque(maxlen=1000)
    progress = tqdm(range(args.max_train_steps), disable=not accelerator.is_main_process, desc="Training")
    try:
        for _, (clean,) in zip(progress, chain.from_iterable(repeat(loader)), strict=False):
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, clean.shape[:1]).to(clean.device)
            noise_pred = model(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = torch.nn.functional.mse_loss(noise_pred, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            losses.append(loss.item())
            progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", lr=f"{lr_scheduler.get_last_lr()[0]:.1e}")
    except KeyboardInterrupt:
        accelerator.print("Interrupted: saving the teacher as it is now.")

    if accelerator.is_main_process:
        ema.copy_to(model.parameters())
        pipeline = DDPMPipeline(accelerator.unwrap_model(model), noise_scheduler).to(torch.float16)
        pipeline.save_pretrained(args.output_dir)
        save_samples(args.output_dir, accelerator.device, args.num_sample_steps, args.seed)
        mean_loss = sum(losses) / max(len(losses), 1)
        print(f"Saved {args.output_dir}; mean loss of the last {len(losses)} steps {mean_loss:.4f}")


if __name__ == "__main__":
    main()
