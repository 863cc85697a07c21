"""The command `diffusers-gas`, also `python -m diffusers_gas`. The scripts in training/ run the same commands."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command: its module in this package, which has a function `main`, and what users are told of it."""

    module: str
    description: str
    interrupted: str = "nothing is written."


COMMANDS = {
    "train": Command(
        "train",
        "distills few-step solvers from a diffusion pipeline",
        "samples, checkpoints and solvers so far are kept.",
    ),
    "calibrate": Command(
        "calibrate",
        "plans SDM's steps by where a pipeline's trajectories bend",
        "the same command goes on from the plans so far.",
    ),
    "evaluate": Command(
        "evaluate",
        "measures schedulers on many samples of a pipeline",
        "the same command goes on from what was measured.",
    ),
    "inspect": Command("inspect_solver", "shows what a saved scheduler has learned"),
    "export": Command("export", "writes a saved scheduler's solvers as a JSON file for other programs"),
    "convert": Command("convert", "turns checkpoints of the papers' code into folders for Diffusers"),
}


def main() -> None:
    """Runs the command that the first word of the command line names."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="diffusers-gas",
        description="Learned and adaptive ODE solvers for diffusion pipelines. Every COMMAND has a --help of its own.",
        epilog="commands:\n" + "\n".join(f"  {name:<{width}}  {c.description}" for name, c in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="what to do, with the arguments for it")
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"diffusers-gas {command}", *sys.argv[2:]]
    run(command)


def run(name: str) -> None:
    """Runs one of `COMMANDS` with the arguments in `sys.argv`. An error or Ctrl-C ends the process with one line."""
    program, command = Path(sys.argv[0]).name, COMMANDS[name]
    try:
        import_module(f"{__package__}.{command.module}").main()
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; {command.interrupted}")
