"""Turns a network snapshot of EDM (arXiv 2206.00364) into a Diffusers pipeline.

    python training/convert_edm_checkpoint.py --checkpoint edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10

DDPM++, NCSN++ and ADM networks, class-conditional or not, with EDM's preconditioning or that of the VP, VE and iDDPM
baselines. The snapshot is a pickle, of which only tensors and plain data are read: nothing in it runs. The folder is to be
loaded with `DiffusionPipeline.from_pretrained` after `import diffusers_gas`.
"""

import sys

from diffusers_gas.commands.convert_edm import main


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"convert_edm_checkpoint.py: {error}")
    except KeyboardInterrupt:
        sys.exit("convert_edm_checkpoint.py: interrupted; nothing is written.")
