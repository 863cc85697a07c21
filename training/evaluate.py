"""Measures samplers of a diffusion pipeline on many seeded samples: Frechet distance, distance to a teacher, CLIP score.

    accelerate launch training/evaluate.py
    accelerate launch training/evaluate.py --schedulers gas_output/scheduler UniPCMultistepScheduler --num_inference_steps 4
    accelerate launch training/evaluate.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt \\
        --schedulers you/some-model-gas DPMSolverMultistepScheduler:timestep_spacing=trailing --num_samples 50000 \\
        --feature_extractor inception --reference statistics.npz

Without arguments it compares training-free schedulers on the teacher in examples/teachers/digits. A run that was ended goes
on when started again; an added sampler costs its own samples only.
"""

import sys

from diffusers_gas.commands.common import start_all_processes
from diffusers_gas.commands.evaluate import main


if __name__ == "__main__":
    try:
        start_all_processes()
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted. The same command goes on where it was.")
