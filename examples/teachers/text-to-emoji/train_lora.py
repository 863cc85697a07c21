"""Fine-tunes the emoji teacher to another style, that of Twemoji, with a LoRA in the linear and convolution layers of its UNet.

The data are Twitter's pictures in emoji_data.py, which npm fetches once, with the names that the teacher knows. Autoencoder and text
encoder stay as they are. The result is a file for `pipe.load_lora_weights(output_dir)` in half precision and a picture of its
samples. The shipped LoRA was made with these defaults:

    OMP_NUM_THREADS=1 python examples/teachers/text-to-emoji/train_lora.py --output_dir my_lora

A run that was killed goes on from its last checkpoint when the same command is given again. Ctrl-C ends the training early. The LoRA
is saved as it is then.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline
from emoji_data import GOOGLE, TWITTER, Emoji, list_emoji, load_pictures
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from train_teacher import (
    SHOWN,
    draw_samples,
    moved_copies,
    parse_with_common_arguments,
    reconstruct,
    sample,
    train_to_follow_prompts,
)

from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier


sys.path.append(str(Path(__file__).resolve().parents[1]))
from teacher_training import add_arguments, encode


TEACHER = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune the emoji teacher to Twemoji with a LoRA.")
    add_arguments(parser, output_dir="text_to_emoji_lora", max_train_steps=800, learning_rate=2e-3)
    add = parser.add_argument
    add("--teacher", type=Path, default=TEACHER, help="The pipeline to fine-tune, and its classifier.")
    add("--rank", type=int, default=8)
    for option, vendor in (("--data_dir", TWITTER), ("--teacher_data_dir", GOOGLE)):
        pictures = "pictures to learn" if vendor == TWITTER else "teacher's pictures, to compare with"
        text = f"The unpacked npm package of the {pictures}; it is fetched if there is no such folder."
        add(option, type=Path, default=Path(f"emoji-datasource-{vendor}"), help=text)
    parser.set_defaults(ema_decay=0.99, lr_warmup_steps=50)
    return parse_with_common_arguments(parser)


def add_lora(pipe: StableDiffusionPipeline, rank: int) -> None:
    """Puts an adapter into every linear and convolution layer of the UNet. Attention alone, in its middle, would change little."""
    for component in (pipe.vae, pipe.text_encoder, pipe.unet):
        component.requires_grad_(False)
    layers = [name for name, layer in pipe.unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))


def evaluate(
    pipe: StableDiffusionPipeline, emoji: list[Emoji], pictures: Tensor, before: Tensor, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """What samples look like with the LoRA and without: shares of samples, and mean squared distances.

    Args:
        pipe: The teacher with the LoRA.
        emoji: The emoji in the order of the classifier.
        pictures: Those that the LoRA learned, of shape `(len(emoji), 3, 64, 64)` in [0, 1].
        before: Those that the teacher learned.
        args: The script's arguments.
    """
    classifier = SmallClassifier.from_pretrained(args.teacher / "classifier").to(pipe.device)
    order = torch.randperm(len(emoji), generator=torch.Generator().manual_seed(args.seed)).tolist()
    trained = [i for i in order if emoji[i].trained]
    which = (trained * args.num_judged_samples)[: args.num_judged_samples]
    labels = torch.tensor(which)
    call = {"num_inference_steps": args.num_sample_steps, "guidance_scale": args.guidance_scale}
    images = {}
    for name, scale in (("with the LoRA", 1.0), ("without", 0.0)):
        pipe.set_adapters(pipe.get_active_adapters(), scale)
        images[name] = sample(pipe, [emoji[i].name for i in which], args.seed, **call)
    pipe.set_adapters(pipe.get_active_adapters(), 1.0)
    images |= {
        "the pictures to learn": pictures[labels],
        "their reconstructions": reconstruct(pipe.vae, pictures[labels]),
    }
    found = {}
    for name, some in images.items():
        new, old = ((some - those[labels]).square().mean((1, 2, 3)) for those in (pictures, before))
        found[name] = {
            "classified": classifier.accuracy(some, labels),
            "nearer": (new < old).float().mean().item(),
            "to_learned": new.mean().item(),
            "to_teachers": old.mean().item(),
        }
    return found


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    try:
        emoji, before = list_emoji(args.data_dir, TWITTER), list_emoji(args.teacher_data_dir, GOOGLE)
    except ValueError as error:
        sys.exit(str(error))
    pictures = load_pictures(emoji)
    print(f"{sum(one.trained for one in emoji)} pictures to learn; checkpoints in {args.checkpoint_dir}")

    set_seed(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(args.teacher).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    latents = encode(pipe.vae, moved_copies(pictures, emoji, args.seed).to(accelerator.device) * 2 - 1)
    add_lora(pipe, args.rank)
    train_to_follow_prompts(pipe, latents, [one for one in emoji if one.trained], accelerator, args)

    layers = {name: weight.half() for name, weight in get_peft_model_state_dict(pipe.unet).items()}
    pipe.save_lora_weights(args.output_dir, unet_lora_layers=layers)
    pipe = StableDiffusionPipeline.from_pretrained(args.teacher).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(args.output_dir)
    call = {"num_inference_steps": args.num_sample_steps, "guidance_scale": args.guidance_scale}
    draw_samples(pipe, SHOWN, args.seed, **call).quantize(128).save(args.output_dir / "samples.png", optimize=True)
    print(f"Saved {args.output_dir}. With guidance {args.guidance_scale:g}, {args.num_judged_samples} samples:")
    for what, values in evaluate(pipe, emoji, pictures, load_pictures(before), args).items():
        print(f"{what}: {json.dumps({name: round(value, 4) for name, value in values.items()})}")


if __name__ == "__main__":
    main()
