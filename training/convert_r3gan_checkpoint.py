"""Turns the discriminator of a published R3GAN snapshot into a folder, to start adversarial distillation from.

    python training/convert_r3gan_checkpoint.py --checkpoint network-snapshot-final.pkl --output_dir r3gan-discriminator

The snapshot is a pickle, of which only tensors and plain data are read: nothing in it runs. The folder is to be loaded with
`R3GANDiscriminator.from_pretrained`.
"""

import sys

from diffusers_gas.commands.convert_r3gan import main


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"convert_r3gan_checkpoint.py: {error}")
    except KeyboardInterrupt:
        sys.exit("convert_r3gan_checkpoint.py: interrupted; nothing is written.")
