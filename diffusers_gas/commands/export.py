"""Writes a saved scheduler's solvers as a JSON file, for ComfyUI, servers and samplers of one's own.

    diffusers-gas export you/some-model-gas --output solver.json
    diffusers-gas export examples/solvers/flow-digits/gs --shifts 3 5 --output solver.json

The file has all numbers of a solver. Whoever steps by them samples as the scheduler does.
"""

import argparse
from pathlib import Path

from ..pipelines.named_schedulers import load_our_scheduler


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("path", help="a scheduler's folder, or a Hub id")
    add("--output", type=Path, required=True, help="the JSON file")
    add("--num_inference_steps", type=int, nargs="+", help="step counts; all that the scheduler has learned")
    add("--shifts", type=float, nargs="+", help="static shifts of flow matching, a table for each; that of the config")
    add("--mu", type=float, nargs="+", help="shifts that depend on the resolution, as a pipeline passes them")
    add("--guidance_scales", type=float, nargs="+", help="of solvers for a range, a table for each; the usual one")
    args = parser.parse_args(arguments)
    scheduler = load_our_scheduler(args.path)
    options = {"shifts": args.shifts, "mu": args.mu, "guidance_scales": args.guidance_scales}
    scheduler.export(args.output, args.num_inference_steps, **options)
    print(f"Written: {args.output}")
