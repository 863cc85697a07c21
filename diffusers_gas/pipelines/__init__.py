"""The pipeline as the model: any algorithm, evaluated by any Diffusers pipeline with its own prompts and guidance."""
