"""Turns a network snapshot of EDM into a Diffusers pipeline: `diffusers-gas convert edm` as a script. See README.md beside it.

python training/convert_edm_checkpoint.py --checkpoint edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10
"""

import sys

from diffusers_gas.commands.main import run


if __name__ == "__main__":
    sys.argv.insert(1, "edm")
    run("convert")
