"""Turns the discriminator of a published R3GAN snapshot into a folder, to start adversarial distillation from.

    python training/convert_r3gan_checkpoint.py --checkpoint network-snapshot-final.pkl --output_dir r3gan-discriminator

The snapshot is a pickle, of which only tensors and plain data are read: nothing in it runs. The folder is to be loaded with
`R3GANDiscriminator.from_pretrained`.
"""

import argparse
from typing import Any

from ..distillation.discriminator import from_published_state
from ..papers.pickles import PickledObject, load_pickle
from .conversion import new_folder


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a snapshot (.pkl) of the authors' training")
    add("--output_dir", required=True, help="the discriminator's folder, which must not exist")
    add("--class_label", type=int, help="of a class-conditional network; by default the mean over all classes")
    return parser.parse_args(arguments)


def discriminator_of(snapshot: Any) -> PickledObject:
    """The discriminator in a snapshot."""
    if not isinstance(snapshot, dict) or not isinstance(snapshot.get("D"), PickledObject):
        found = sorted(map(str, snapshot)) if isinstance(snapshot, dict) else type(snapshot).__name__
        raise ValueError(f"it has no discriminator 'D', only {found}.")
    return snapshot["D"]


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    snapshot = load_pickle(args.checkpoint)
    try:
        published = discriminator_of(snapshot)
        # Stages that computed in half precision may have stored their weights in it.
        tensors = {name: tensor.float() for name, tensor in published.tensors().items()}
        network = from_published_state(tensors, class_label=args.class_label)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint} is not an R3GAN snapshot: {error}") from error
    config, height = network.config, network.config.sample_size[0]
    print(
        f"Found:   {published.class_name}, {network.num_parameters() / 1e6:.2f} M weights in {len(tensors)} tensors, "
        f"{config.in_channels} x {height} x {height}\n"
        f"         widths {list(config.widths)}, groups {list(config.cardinalities)}, blocks "
        f"{list(config.blocks_per_stage)}"
    )
    with new_folder(args.output_dir) as folder:
        network.save_pretrained(folder)
    print(f"Written: {args.output_dir}\n")
    print("from diffusers_gas.distillation.discriminator import R3GANDiscriminator\n")
    print(f"discriminator = R3GANDiscriminator.from_pretrained({args.output_dir!r})")
