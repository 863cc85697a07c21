"""A scheduler's tables as JSON, for programs without this package: ComfyUI, servers, a sampler of one's own.

The file has the numbers that `step` uses, in float64, so that whoever applies them in the same order gets the same samples bit by
bit. `examples/scheduling_solver_table.py` does so in a page of code.
"""

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from ..guided_solver import GuidedSolver
from ..noise_schedules import EDMPreconditioned, FlowMatchSchedule, NoiseSchedule, VESchedule, data_prediction_weights
from ..utils.files import write_text
from .configs import PIPELINE_SETTINGS, current_settings


SCHEMA, VERSION = "diffusers_gas/solver_table", 1

RULE = (
    "Step k asks the network at input_scale * x[k] and timestep, and takes D[k] = prediction[0] * x[k] + prediction[1] * output. "
    "Where only a denoised estimate at the noise level (evaluation_alpha, evaluation_sigma) is known, D[k] = denoised[0] * x[k] + "
    "denoised[1] * estimate. Then x[k+1] = weights[0] * x[k] + weights[1] * x[0] + sum_j weights[2 + j] * D[j]. x[0] is "
    "init_noise_sigma * unit noise. For a start at step b with x[b] = alpha * data + sigma * noise, the rows in weights_from[b] are "
    "those of the steps b, b + 1, ..., and x[b] takes the place of x[0], D[b] that of D[0]."
)


def write_tables(content: dict[str, Any], path: Path) -> None:
    """Writes what `exported` returns as JSON, in which a list of numbers is one line."""
    text = json.dumps(content, indent=2, allow_nan=False)
    write_text(path, re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")


def exported(
    scheduler: SchedulerMixin,
    num_inference_steps: Sequence[int] | None = None,
    *,
    shifts: Sequence[float] | None = None,
    mu: Sequence[float] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The content of the file; see [`ODEScheduler.export`]."""
    config = scheduler.config
    step_counts = sorted(set(scheduler.learned if num_inference_steps is None else num_inference_steps))
    if not step_counts:
        raise ValueError("This scheduler has learned nothing: pass the step counts to export, `num_inference_steps`.")
    if config.thresholding or config.get("online"):
        raise ValueError("`thresholding` and `online` sampling are no fixed sums, so that no table describes them.")
    if shifts is not None and (not config.use_flow_sigmas or config.use_dynamic_shifting):
        raise ValueError("`shifts` are for flow matching with a static shift: leave them out, or pass `mu`.")
    if (mu is not None) != bool(config.use_dynamic_shifting):
        raise ValueError("`mu` is required with `use_dynamic_shifting`, and has no meaning without it.")
    guided = [n for n in step_counts if isinstance(scheduler.learned.get(n), GuidedSolver)]
    if guidance_scales is not None and not guided:
        raise ValueError("`guidance_scales` are for solvers of a range of guidance scales: leave them out.")
    tables = []
    for one_mu in [None] if mu is None else mu:
        for shift in [None] if shifts is None else shifts:
            shifted = deepcopy(scheduler)
            if shift is not None:
                shifted.set_shift(shift)
            for n in step_counts:
                scales = guidance_scales or [scheduler.learned[n].usual_scale] if n in guided else [None]
                tables += [_table(shifted, n, one_mu, scale) for scale in scales]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "rule": RULE,
        "noise_schedule": _kind(scheduler.noise_schedule(mu=1.0)),
        "prediction_type": config.prediction_type,
        "variance_type": config.variance_type,
        "num_train_timesteps": config.num_train_timesteps,
        "init_noise_sigma": float(scheduler.init_noise_sigma),
        "pipeline_settings": current_settings(config, ("use_dynamic_shifting", *PIPELINE_SETTINGS)),
        "tables": tables,
    }


def _kind(noise_schedule: NoiseSchedule) -> str:
    if isinstance(noise_schedule, FlowMatchSchedule):
        return "inverted_flow_matching" if noise_schedule.inverted else "flow_matching"
    if isinstance(noise_schedule, EDMPreconditioned):
        return "edm"
    return "variance_exploding" if isinstance(noise_schedule, VESchedule) else "variance_preserving"


@torch.no_grad()
def _table(
    scheduler: SchedulerMixin, num_inference_steps: int, mu: float | None, guidance_scale: float | None
) -> dict[str, Any]:
    """The numbers of one step count. The scheduler's position changes."""
    if guidance_scale is not None:
        scheduler.set_guidance_scale(guidance_scale)
    scheduler.set_timesteps(num_inference_steps, mu=mu)
    numbers = scheduler.step_numbers()
    noise_schedule = numbers.noise_schedule
    prediction_type = scheduler.config.prediction_type
    evaluation_times = numbers.evaluation_times
    n = len(evaluation_times)
    from_state, from_output = data_prediction_weights(
        prediction_type, noise_schedule, evaluation_times, evaluation_times
    )
    steps = []
    for k, (p, q) in enumerate(numbers.prediction_weights):
        of_estimate = q / from_output[k].item()
        steps.append(
            {
                "alpha": numbers.alphas[k],
                "sigma": numbers.noise_levels[k],
                "timestep": numbers.timesteps[k].item(),
                "evaluation_alpha": noise_schedule.alpha(evaluation_times[k]).item(),
                "evaluation_sigma": noise_schedule.sigma(evaluation_times[k]).item(),
                "input_scale": float(numbers.input_scales[k]),
                "prediction": [p, q],
                "denoised": [p - of_estimate * from_state[k].item(), of_estimate],
                "weights": _row(numbers.weights, k),
            }
        )
    starts = {begin: scheduler.step_numbers(begin).weights for begin in range(1, n)}
    return {
        "num_inference_steps": n,
        "shift": noise_schedule.shift if isinstance(noise_schedule, FlowMatchSchedule) else None,
        "mu": mu,
        **({} if guidance_scale is None else {"guidance_scale": float(guidance_scale)}),
        "steps": steps,
        "end": {"alpha": numbers.alphas[n], "sigma": numbers.noise_levels[n]},
        "weights_from": {str(begin): [_row(rows, k) for k in range(len(rows))] for begin, rows in starts.items()},
    }


def _row(weights: Any, k: int) -> list[float]:
    """Weights of step k without those of predictions that do not exist yet."""
    return [float(weight) for weight in weights[k][: 3 + k]]
