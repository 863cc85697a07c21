"""Turns a network snapshot of EDM (arXiv 2206.00364) into a Diffusers pipeline.

    python training/convert_edm_checkpoint.py --checkpoint edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10

DDPM++, NCSN++ and ADM networks, class-conditional or not, with EDM's preconditioning or that of the VP, VE and iDDPM
baselines. The snapshot is a pickle, of which only tensors and plain data are read: nothing in it runs. The folder is to be
loaded with `DiffusionPipeline.from_pretrained` after `import diffusers_gas`.
"""

import argparse

from diffusers import EDMDPMSolverMultistepScheduler

from ..papers.edm.pipeline import EDMPipeline
from ..papers.edm.published import convert_snapshot
from ..papers.pickles import load_pickle
from .conversion import new_folder


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a snapshot (.pkl) of the authors' training")
    add("--output_dir", required=True, help="the pipeline's folder, which must not exist")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    snapshot = load_pickle(args.checkpoint)
    try:
        network = convert_snapshot(snapshot)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint} is not a snapshot of EDM: {error}") from error
    unet, config = network.unet, network.unet.config
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=network.sigma_min, sigma_max=network.sigma_max, sigma_data=config.sigma_data
    )
    classes = "unconditional" if config.num_class_embeds is None else f"{config.num_class_embeds} classes"
    print(
        f"Found:   {network.wrapper} with {network.model} ({config.architecture}), {unet.num_parameters() / 1e6:.2f} M "
        f"weights, {config.in_channels} x {config.sample_size} x {config.sample_size}, {classes}"
    )
    with new_folder(args.output_dir) as folder:
        EDMPipeline(unet, scheduler).save_pretrained(folder)
    print(f"Written: {args.output_dir}, sigma from {network.sigma_min:g} to {network.sigma_max:g}\n")
    print("import diffusers_gas\nfrom diffusers import DiffusionPipeline\n")
    labels = "" if config.num_class_embeds is None else ", class_labels=0"
    print(f"pipe = DiffusionPipeline.from_pretrained({args.output_dir!r})")
    print(f"image = pipe(num_inference_steps=18{labels}).images[0]")
