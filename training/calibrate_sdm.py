"""Finds where a diffusion pipeline's trajectories bend, and plans few-evaluation sampling accordingly. Trains nothing.

    python training/calibrate_sdm.py
    python training/calibrate_sdm.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt

Without arguments it calibrates for the model in examples/teachers/digits. The plans end up in `{output_dir}/scheduler`, to
be loaded with `SDMScheduler.from_pretrained`.
"""

import sys

from diffusers_gas.commands.calibrate import main


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"calibrate_sdm.py: {error}")
    except KeyboardInterrupt:
        sys.exit("calibrate_sdm.py: interrupted; the plans so far are kept.")
