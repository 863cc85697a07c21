"""The command `diffusers-gas`, also `python -m diffusers_gas`. The scripts in training/ run the same commands."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


# The commands: their modules in this package, which have a function `main`, and what users are told of them.
COMMANDS = {
    "train": ("train", "distills few-step solvers from a diffusion pipeline"),
    "calibrate": ("calibrate", "plans SDM's steps by where a pipeline's trajectories bend"),
    "evaluate": ("evaluate", "measures schedulers on many samples of a pipeline"),
    "inspect": ("inspect_solver", "shows what a saved scheduler has learned"),
    "export": ("export", "writes a saved scheduler's solvers as a JSON file for other programs"),
    "list": ("list_published", "shows the published solvers that there are by name"),
    "convert": ("convert", "turns checkpoints of the papers' code into folders for Diffusers"),
}
# What they say when they were interrupted.
INTERRUPTED = {
    "train": "samples, checkpoints and solvers so far are kept.",
    "calibrate": "the same command goes on from the plans so far.",
    "evaluate": "the same command goes on from what was measured.",
}


def main() -> None:
    """Runs the command that the first word of the command line names."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="diffusers-gas",
        description="Learned and adaptive ODE solvers for diffusion pipelines. Every COMMAND has a --help of its own.",
        epilog="commands:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="what to do, with the arguments for it")
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"diffusers-gas {command}", *sys.argv[2:]]
    run(command)


def run(name: str, **options: Any) -> None:
    """Runs one of `COMMANDS` with the arguments in `sys.argv`. An error or Ctrl-C ends the process with one line.

    `options` are those of the command's `main`.
    """
    program = Path(sys.argv[0]).name
    try:
        import_module(f"{__package__}.{COMMANDS[name][0]}").main(**options)
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; {INTERRUPTED.get(name, 'nothing is written.')}")
