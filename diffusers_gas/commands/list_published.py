"""Shows the solvers of others that `GASScheduler.from_published` makes by name, with their sources.

    diffusers-gas list

A solver belongs to the model for which it was found. `diffusers_gas.list_solvers` finds solvers on the Hub.
"""

import argparse
import re

from ..schedulers.published import published_solvers


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=str(__doc__).partition("\n")[0]).parse_args(arguments)
    rows = [("name", "model", "steps", "source", "licence")]
    for name, solver in published_solvers().items():
        found = " to ".join(map(str, dict.fromkeys((min(solver.tables), max(solver.tables)))))
        steps = f"any, found for {found}" if solver.any_steps else found
        repository = re.sub("https://|/(tree|blob)/.*", "", solver.source)
        rows.append((name, solver.model, steps, f"{solver.paper}, {repository}", solver.licence))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
    print("\nscheduler = GASScheduler.from_published(name, pipe.scheduler.config, num_inference_steps=10)")
