"""The models of this repository, which the scripts offer by `--teacher NAME` and use if they are given no model."""

from pathlib import Path


TEACHERS = Path(__file__).resolve().parent.parent / "examples" / "teachers"
NAMES = ("digits", "flow-digits", "moving-digits", "text-to-digits", "text-to-emoji")
MODELS = {name: {"pretrained_model_name_or_path": str(TEACHERS / name)} for name in NAMES}

# A classifier whose features tell samples of these models apart.
CLASSIFIER = str(TEACHERS / "digits" / "classifier")
