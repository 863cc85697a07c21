"""Turns training checkpoints of the GS / GAS paper's code into a scheduler folder: `diffusers-gas convert gas` as a script. See README.md beside it.

python training/convert_official_checkpoint.py --checkpoint 4_steps.pt 5_steps.pt --output_dir my-scheduler
"""

import sys

from diffusers_gas.commands.main import run


if __name__ == "__main__":
    sys.argv.insert(1, "gas")
    run("convert")
