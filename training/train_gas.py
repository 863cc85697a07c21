"""Distills few-step solvers from any Diffusers pipeline: `diffusers-gas train` as a script. See README.md beside it.

accelerate launch training/train_gas.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt
"""

from shipped_models import MODEL

from diffusers_gas.commands.main import run


if __name__ == "__main__":
    run("train", model=MODEL)
