"""The command lines, which `python -m diffusers_gas` and the command `diffusers-gas` run."""
