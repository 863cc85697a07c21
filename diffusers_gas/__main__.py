"""`python -m diffusers_gas COMMAND`, for an environment without the command `diffusers-gas`."""

from .commands.main import main


if __name__ == "__main__":
    main()
