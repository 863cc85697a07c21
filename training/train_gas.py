"""Distils few-step solvers from a diffusion pipeline, and shows what they gain.

    accelerate launch training/train_gas.py
    accelerate launch training/train_gas.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt
    accelerate launch training/train_gas.py --loss gas --num_inference_steps 4

Without arguments it distils a 4-step solver from the teacher in examples/teachers/digits. The solvers end up in
`{output_dir}/scheduler`, to be loaded with `GASScheduler.from_pretrained`. What the arguments mean, and which to choose, is
in training/README.md.
"""

import sys

from diffusers_gas.commands.common import start_all_processes
from diffusers_gas.commands.train import main


if __name__ == "__main__":
    try:
        start_all_processes()
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_gas.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_gas.py: interrupted; samples, checkpoints and solvers so far are kept.")
