"""Plans SDM's steps by where a pipeline's trajectories bend: `diffusers-gas calibrate` as a script. See README.md beside it.

python training/calibrate_sdm.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt
"""

from shipped_models import MODEL

from diffusers_gas.commands.main import run


if __name__ == "__main__":
    run("calibrate", model=MODEL)
