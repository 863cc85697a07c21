"""Turns training checkpoints of the GS / GAS papers' code into a scheduler folder.

    python training/convert_official_checkpoint.py --checkpoint 4_steps.pt 5_steps.pt --output_dir my-scheduler
    python training/convert_official_checkpoint.py --checkpoint cifar10.pt --edm --t_end 1e-3 --output_dir my-scheduler

The checkpoints say nothing about the network that they were trained for, so its noise schedule is to be given: by default it
is Stable Diffusion's, otherwise the betas, a Diffusers scheduler's config file (of any class), or `--edm`. The averaged
weights are taken, as in the papers. The folder is to be loaded with `GASScheduler.from_pretrained`.
"""

import sys

from diffusers_gas.commands.convert_official import main


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"convert_official_checkpoint.py: {error}")
    except KeyboardInterrupt:
        sys.exit("convert_official_checkpoint.py: interrupted; nothing is written.")
