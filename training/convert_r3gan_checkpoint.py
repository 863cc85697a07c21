"""Turns the discriminator of an R3GAN snapshot into a folder: `diffusers-gas convert r3gan` as a script. See README.md beside it.

python training/convert_r3gan_checkpoint.py --checkpoint network-snapshot-final.pkl --output_dir r3gan-discriminator
"""

import sys

from diffusers_gas.commands.main import run


if __name__ == "__main__":
    sys.argv.insert(1, "r3gan")
    run("convert")
