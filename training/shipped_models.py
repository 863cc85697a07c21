"""The model of this repository that the scripts use if they are given none. The others are beside it."""

from pathlib import Path


DIGITS = Path(__file__).resolve().parent.parent / "examples" / "teachers" / "digits"
MODEL = {"pretrained_model_name_or_path": str(DIGITS)}

# A classifier whose features tell samples of these models apart.
CLASSIFIER = str(DIGITS / "classifier")
