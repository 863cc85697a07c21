"""Measures schedulers on many samples of a pipeline: `diffusers-gas evaluate` as a script. See README.md beside it.

Without a model it takes `digits` and its classifier. For other models of examples/teachers name the classifier, too:
`--feature_extractor examples/teachers/digits/classifier`.

accelerate launch training/evaluate.py --schedulers gas_output/scheduler UniPCMultistepScheduler --num_inference_steps 4
"""

from shipped_models import CLASSIFIER, MODEL

from diffusers_gas.commands.main import run


if __name__ == "__main__":
    run("evaluate", model={**MODEL, "feature_extractor": CLASSIFIER})
