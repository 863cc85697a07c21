"""Shows a saved scheduler: where its solvers evaluate the network, what they add up, and what made them.

    diffusers-gas inspect examples/solvers/text-to-digits/gs
    diffusers-gas inspect you/some-model-gas --num_inference_steps 4 --output solver.png

Tables go to the terminal. The picture, for which matplotlib is needed, shows a solver's times and coefficients beside those of
DPM-Solver++ 2M; for SDM the noise levels of its plans, and what was measured along them.
"""

import argparse
from pathlib import Path

from ..pipelines.named_schedulers import check_step_counts, load_our_scheduler
from ..presentation.description import describe
from .reporting import draw_scheduler


# Of an untrained scheduler, unless another number is asked for.
UNTRAINED_STEPS = 6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("path", help="a scheduler's folder, or a Hub id")
    add("--num_inference_steps", type=int, nargs="+", help=f"all that it has; {UNTRAINED_STEPS} of an untrained one")
    add("--output", type=Path, help="a file for the picture, .png, .svg or .pdf; without it there is none")
    args = parser.parse_args(arguments)
    scheduler = load_our_scheduler(args.path)
    step_counts = sorted(set(args.num_inference_steps or scheduler.learned or [UNTRAINED_STEPS]))
    check_step_counts(args.path, scheduler, step_counts)
    print(f"{type(scheduler).__name__} in {args.path}\n\n{describe(scheduler, step_counts)}")
    if args.output is not None:
        draw_scheduler(scheduler, step_counts, args.output)
        print(f"\nPicture: {args.output}")
