"""Trains the small latent text-to-image model that ships in this folder: a Stable Diffusion of 64x64 emoji.

The data are the pictures of emoji_data.py, which npm fetches once. First the autoencoder is trained, then a classifier that
judges the samples, then UNet and text encoder together on the autoencoder's latents. The result is a pipeline folder with
half-precision weights, to be loaded with `StableDiffusionPipeline.from_pretrained(output_dir)`, its prompts.txt, a picture of
its samples and the classifier. The shipped teacher was made with these defaults, but for what its README says:

    OMP_NUM_THREADS=1 python examples/teachers/text-to-emoji/train_teacher.py --output_dir my_teacher

A run that was killed goes on from its last checkpoint when the same command is given again. Ctrl-C ends the current training
early. The teacher is saved as it is then.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from emoji_data import IMAGE_SIZE, MAX_TOKENS, Emoji, list_emoji, load_pictures, move, words_of
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel

from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier


sys.path.append(str(Path(__file__).resolve().parents[1]))
from teacher_training import (
    add_arguments,
    autoencoder_loss,
    encode,
    fit,
    make_byte_pair_tokenizer,
    parse_with_checkpoints,
    save,
    text_encoder_config,
)


KL_WEIGHT = 2e-3  # weight of the mean per latent, relative to the mean absolute error per pixel
COPIES = 6  # moved a little, of each picture
BATCH_SIZE = 50  # of samples
SHOWN = (
    *("red apple", "watermelon", "strawberry", "slice of pizza", "hamburger"),
    *("doughnut", "birthday cake", "avocado", "teapot", "ice cream"),
    *("face with tears of joy", "smiling face with sunglasses", "thinking face", "nerd face", "face with cowboy hat"),
    *("cat face with tears of joy", "robot face", "ghost", "clown face", "smiling face with heart-shaped eyes"),
    *("dog face", "panda face", "fox face", "penguin", "octopus"),
    *("butterfly", "turtle", "unicorn face", "tropical fish", "parrot"),
    *("police car", "rocket", "steam locomotive", "tractor", "sailboat"),
    *("red heart", "sunflower", "cactus", "rose", "four leaf clover"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Stable Diffusion of emoji.")
    add_arguments(parser, output_dir="text_to_emoji_teacher", max_train_steps=4_800, learning_rate=1.5e-3)
    add = parser.add_argument
    add("--autoencoder_train_steps", type=int, default=2_000)
    add("--autoencoder_train_batch_size", type=int, default=16)
    add("--classifier_train_steps", type=int, default=1_500)
    add("--classifier_train_batch_size", type=int, default=128)
    add(
        "--data_dir",
        type=Path,
        default=Path("emoji-datasource-google"),
        help="The unpacked npm package; it is fetched if there is no such folder.",
    )
    return parse_with_common_arguments(parser)


def parse_with_common_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Adds the arguments that the LoRA's training has, too, and parses all."""
    add = parser.add_argument
    add("--num_judged_samples", type=int, default=400, help="For the agreement with the prompts.")
    add("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.set_defaults(guidance_scale=7.5)  # the default of the pipeline
    return parse_with_checkpoints(parser, checkpointing_steps=250)


def build_pipeline(words: list[str]) -> StableDiffusionPipeline:
    """The components of Stable Diffusion, with latents of 4x16x16, three resolutions, and cross-attention at 4x4.

    The UNet also adds the pooled text to the embedding of the time. So the prompt reaches every layer at little cost.
    """
    tokenizer = make_byte_pair_tokenizer(words, MAX_TOKENS)
    text_config = text_encoder_config(tokenizer, hidden_size=96)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            sample_size=IMAGE_SIZE,
            latent_channels=4,
            block_out_channels=(24, 48, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=8,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 4,
            block_out_channels=(64, 96, 128),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=4,  # the number of heads, despite the name in Diffusers
            cross_attention_dim=text_config.hidden_size,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
        ),
        scheduler=DPMSolverMultistepScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            steps_offset=1,  # the pipeline wants it so; it does not matter with this spacing
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_autoencoder(
    vae: AutoencoderKL, pictures: Tensor, accelerator: Accelerator, args: argparse.Namespace
) -> None:
    """Absolute error of colours and of their hues, plus a small weight times the divergence."""

    def distance(decoded: Tensor, samples: Tensor) -> Tensor:
        error = decoded.float() - samples
        hue = error - error.roll(
            1, dims=1
        )  # differences between channels; without them rare colours stay grey for long
        return error.abs().mean() + hue.abs().mean()

    def loss(index: Tensor) -> Tensor:
        samples = pictures[index].to(vae.device) * 2 - 1
        with accelerator.autocast():
            return autoencoder_loss(vae, lambda z: vae.decode(z).sample, samples, KL_WEIGHT, distance)

    steps, batch_size = args.autoencoder_train_steps, args.autoencoder_train_batch_size
    fit({"autoencoder": vae}, loss, len(pictures), args, steps, batch_size, args.checkpoint_dir / "autoencoder.pt")


def moved_copies(pictures: Tensor, emoji: list[Emoji], seed: int) -> Tensor:
    """Copies of the pictures for training, each moved a little, of shape `(COPIES * number of trained ones, 3, 64, 64)`."""
    copies = pictures[torch.tensor([one.trained for one in emoji])].repeat(COPIES, 1, 1, 1)
    return move(copies, torch.Generator().manual_seed(seed), degrees=4.0, shift=1.5, zoom=(0.9, 1.0))


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Changes the autoencoder such that the channels of its latents have zero mean and unit variance. Returns latents.

    Stable Diffusion's pipeline has a single scale for all channels and no shift. Here the 1x1 convolutions that surround the
    latents take up both, exactly.
    """
    latents = encode(vae, pictures.to(vae.device) * 2 - 1)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight.flatten(1) @ mean
    after.weight *= std.view(1, -1, 1, 1)
    before.bias -= torch.cat([mean, 2 * std.log()])
    scale = torch.cat([1 / std, torch.ones_like(std)])  # of the means; the other half are logarithms of variances
    before.bias *= scale
    before.weight *= scale.view(-1, 1, 1, 1)
    return (latents - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """What the autoencoder makes of pictures in [0, 1]."""
    batches = [vae.decode(encode(vae, batch.to(vae.device) * 2 - 1)).sample for batch in pictures.split(BATCH_SIZE)]
    return (torch.cat(batches).cpu() / 2 + 0.5).clamp(0, 1)


def distort(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved, with noise and other brightness. The classifier is trained on such ones, and tested on others."""
    moved = move(pictures, generator, degrees=8.0, shift=3.0, zoom=(0.85, 1.05))
    size = (len(pictures), 1, 1, 1)
    noise = torch.randn(moved.shape, generator=generator) * torch.rand(size, generator=generator) * 0.08
    return ((moved + noise) * (1 - 0.15 * torch.rand(size, generator=generator))).clamp(0, 1)


def train_classifier(
    pictures: Tensor, reconstructions: Tensor, device: torch.device, args: argparse.Namespace
) -> SmallClassifier:
    """Trains on distortions of all pictures and of their reconstructions, of shape `(size, 3, 64, 64)` in [0, 1]."""
    classifier = SmallClassifier(
        sample_size=IMAGE_SIZE // 2,
        in_channels=3,
        channels=(32, 64, 96, 128),
        num_features=64,
        num_classes=len(pictures),
    ).to(device)
    both = torch.stack([pictures, reconstructions])

    def loss(index: Tensor) -> Tensor:
        chosen = both[torch.randint(2, index.shape), index]
        distorted = distort(chosen, torch.default_generator).to(device)
        return functional.cross_entropy(classifier(distorted), index.to(device), label_smoothing=0.05)

    steps, batch_size = args.classifier_train_steps, args.classifier_train_batch_size
    fit(
        {"classifier": classifier}, loss, len(pictures), args, steps, batch_size, args.checkpoint_dir / "classifier.pt"
    )
    return classifier


def train_to_follow_prompts(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    emoji: list[Emoji],
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> None:
    """Predicts velocities. One prompt in ten is empty, for guidance; two are short names.

    Weights that require no gradients stay as they are.

    Args:
        pipe: The teacher.
        latents: Of shape `(copies * len(emoji), 4, 16, 16)`.
        emoji: What they show.
        accelerator: For the precision.
        args: The script's arguments.
    """
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    # With so few tokens, CPUs spend less time on plain attention than on the fused one.
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.text_encoder.set_attn_implementation("eager")

    def prompt(index: int, chance: float) -> str:
        return "" if chance < 0.1 else emoji[index % len(emoji)].prompts[-1 if chance < 0.3 else 0]

    def loss(index: Tensor) -> Tensor:
        clean = latents[index.to(latents.device)]
        noise = torch.randn_like(clean)
        times = (torch.arange(len(index)) + torch.rand(len(index))) / len(index)  # spread over all times
        timesteps = (times * noise_scheduler.config.num_train_timesteps).long().to(clean.device)
        prompts = [prompt(i, chance) for i, chance in zip(index.tolist(), torch.rand(len(index)).tolist())]
        with accelerator.autocast():
            prompt_embeds, _ = pipe.encode_prompt(prompts, clean.device, 1, do_classifier_free_guidance=False)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            velocity = pipe.unet(noisy, timesteps, prompt_embeds).sample
        return functional.mse_loss(velocity.float(), noise_scheduler.get_velocity(clean, noise, timesteps))

    modules: dict[str, nn.Module] = {"UNet": pipe.unet, "text encoder": pipe.text_encoder}
    fit(modules, loss, len(latents), args, args.max_train_steps, checkpoint=args.checkpoint_dir / "unet.pt")


def sample(pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int, **call: float) -> Tensor:
    """Samples of shape `(len(prompts), 3, 64, 64)` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    batches = [list(prompts[i : i + BATCH_SIZE]) for i in range(0, len(prompts), BATCH_SIZE)]
    images = [pipe(batch, generator=generator, output_type="pt", **call).images for batch in batches]
    return torch.cat(images).float().cpu()


def evaluate(
    pipe: StableDiffusionPipeline,
    classifier: SmallClassifier,
    emoji: list[Emoji],
    pictures: Tensor,
    args: argparse.Namespace,
    **call: float,
) -> dict[str, float]:
    """The shares that the classifier calls by their name, of pictures, of their reconstructions and of samples."""
    generator = torch.Generator().manual_seed(args.seed)
    labels, count = torch.arange(len(emoji)), args.num_judged_samples
    order = torch.randperm(len(emoji), generator=generator).tolist()

    def agreement(which: list[int], count: int, prompt: int = 0) -> float:
        which = (which * count)[:count]
        images = sample(pipe, [emoji[i].prompts[prompt] for i in which], args.seed, **call)
        return classifier.accuracy(images, torch.tensor(which))

    trained = [i for i in order if emoji[i].trained]
    distorted = distort(pictures, generator)
    return {
        "the pictures": classifier.accuracy(pictures, labels),
        "the pictures, distorted in other ways than for the training": classifier.accuracy(distorted, labels),
        "the reconstructions of these": classifier.accuracy(reconstruct(pipe.vae, distorted), labels),
        "the pictures, if each has another's name": classifier.accuracy(pictures, labels.roll(1)),
        f"{count} samples": agreement(trained, count),
        f"{count // 4} samples of short names": agreement(
            [i for i in trained if len(emoji[i].prompts) > 1], count // 4, -1
        ),
        f"{count // 4} samples of held-out names": agreement([i for i in order if not emoji[i].trained], count // 4),
    }


def draw_samples(pipe: StableDiffusionPipeline, names: Sequence[str], seed: int, **call: float) -> Image.Image:
    """A page of samples with their prompts, in rows of ten."""
    width, height, columns = 108, 100, 10
    rows = -(-len(names) // columns)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(page)
    images = (sample(pipe, names, seed, **call) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (name, image) in enumerate(zip(names, images)):
        left, top = i % columns * width, i // columns * height
        page.paste(Image.fromarray(image), (left + (width - IMAGE_SIZE) // 2, top + 4))
        words, lines = name.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if pen.textlength(longer) > width - 6:
                lines.append(word)
            else:
                lines[-1] = longer
        pen.text((left + width / 2, top + IMAGE_SIZE + 8), "\n".join(lines), fill="black", anchor="ma", align="center")
    return page


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = accelerator.device
    try:
        emoji = list_emoji(args.data_dir)
    except ValueError as error:
        sys.exit(str(error))
    pictures = load_pictures(emoji)
    print(
        f"{len(emoji)} emoji, {sum(one.trained for one in emoji)} of them for training; checkpoints in {args.checkpoint_dir}"
    )

    # Every training has its own seed, because a resumed run skips the random numbers of those that are done.
    set_seed(args.seed)
    pipe = build_pipeline(words_of(emoji)).to(device)
    moved = moved_copies(pictures, emoji, args.seed)
    train_autoencoder(pipe.vae, moved, accelerator, args)

    set_seed(args.seed + 1)
    latents = whiten(pipe.vae, moved)
    classifier = train_classifier(pictures, reconstruct(pipe.vae, pictures), device, args)

    set_seed(args.seed + 2)
    train_to_follow_prompts(pipe, latents, [one for one in emoji if one.trained], accelerator, args)

    classifier.half().save_pretrained(args.output_dir / "classifier")
    names = "".join(f"{one.name}\n" for one in emoji)
    (args.output_dir / "classifier" / "names.txt").write_text(names, encoding="utf-8")
    classifier = SmallClassifier.from_pretrained(args.output_dir / "classifier").to(device)
    pipe = save(pipe, [one.name for one in emoji if one.trained], args)
    call = {"guidance_scale": args.guidance_scale}
    (args.output_dir / "pipeline_arguments.json").write_text(json.dumps(call) + "\n", encoding="utf-8")
    call |= {"num_inference_steps": args.num_sample_steps}
    page = draw_samples(pipe, SHOWN, args.seed, **call).quantize(128)
    page.save(args.output_dir / "samples.png", optimize=True)
    print(f"Saved {args.output_dir}. The classifier calls by their names, with guidance {args.guidance_scale:g}:")
    for what, share in evaluate(pipe, classifier, emoji, pictures, args, **call).items():
        print(f"{share:8.1%} of {what}")


if __name__ == "__main__":
    main()
