"""What the node does: finds a solver's table for a MODEL, and makes SAMPLER and SIGMAS of it."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path

import comfy.samplers
import torch

from .sampling import SolverTable, nearest, sampler_function


NAME, CATEGORY = "Load GAS solver", "sampling/custom_sampling/samplers"
INPUTS = {
    "solver": {
        "default": "solver.json",
        "tooltip": "A file of `diffusers-gas export`, or the folder or Hub id of a solver.",
    },
    "steps": {"default": 4, "min": 1, "max": 1000, "tooltip": "A number of steps that the solver was made for."},
    "denoise": {
        "default": 1.0,
        "min": 0.0,
        "max": 1.0,
        "step": 0.01,
        "tooltip": "The share of the steps that is sampled, the last ones. Below 1 for image to image.",
    },
    "guidance_scale": {
        "default": 0.0,
        "min": 0.0,
        "max": 100.0,
        "step": 0.1,
        "tooltip": "For solvers of several guidance scales: 0 follows the CFG of the sampler.",
    },
}
EXPORTED = "solver.json"  # the name of an exported file in a folder or a Hub repository
NUM_SCALES = 17  # neighbours differ by a tenth in a range from 2 to 10


def load(model, solver, steps, denoise=1.0, guidance_scale=0.0):
    """Samples with a learned solver in few steps. Connect both outputs with SamplerCustom or SamplerCustomAdvanced."""
    model_sampling = model.get_model_object("model_sampling")
    shift = _shift(model_sampling)
    content = _content(solver, steps, shift, guidance_scale)
    tables = SolverTable.of(content, steps, shift, solver, model_sampling)
    if guidance_scale:
        tables = [nearest(tables, guidance_scale)]
    levels = tables[len(tables) // 2].levels  # the sampler may take those of another scale
    kept = round(steps * denoise)
    sigmas = torch.tensor(levels[-kept - 1 :] if kept else [], dtype=torch.float32)
    return comfy.samplers.KSAMPLER(sampler_function(tables, levels)), sigmas


def fingerprint(solver):
    """Changes when a local solver does, so that ComfyUI loads it again."""
    path = Path(solver)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return [solver, *((str(file), file.stat().st_mtime_ns) for file in files)]


def _shift(model_sampling):
    """The shift of a flow-matching MODEL, whatever kind of shift its class has; `None` for other models."""
    half = torch.full((1,), 0.5)
    # Between noise and an image of ones, only flow matching has less of the image where there is noise.
    if float(model_sampling.noise_scaling(half, torch.zeros(1), torch.ones(1))) == 1:
        return None
    middle = float(model_sampling.percent_to_sigma(0.5))
    return middle / (1 - middle)


def _content(solver, steps, shift, guidance_scale):
    """The content of an exported file, or the same made by the package from the solver of a folder or a Hub repository.

    A solver for a range of guidance scales gives the table of one, or without one those of `NUM_SCALES`.
    """
    path = Path(solver)
    if path.is_file():
        return _read(path)
    if (path / EXPORTED).is_file() and not any(path.rglob("scheduler_config.json")):
        return _read(path / EXPORTED)
    if not path.is_dir() and solver.count("/") != 1:
        raise ValueError(f"Load GAS solver: there is no {os.path.abspath(solver)}. Give a file, a folder or a Hub id.")
    try:
        from diffusers_gas.pipelines.named_schedulers import load_our_scheduler
        from diffusers_gas.schedulers.exporting import exported
    except ImportError:
        return _read(path / EXPORTED if path.is_dir() else _download(solver))
    try:
        scheduler = load_our_scheduler(solver)
    except OSError:
        if not path.is_dir():
            with suppress(ValueError):  # a repository may have an exported file only
                return _read(_download(solver))
        raise
    config, options = scheduler.config, {}
    low, *_, high = getattr(getattr(scheduler, "solvers", {}).get(steps), "scales", (None, None))
    if low is not None:
        scales = (low * (high / low) ** (k / (NUM_SCALES - 1)) for k in range(NUM_SCALES))
        options["guidance_scales"] = [guidance_scale] if guidance_scale else list(scales)
    if shift is not None and config.use_flow_sigmas:
        if config.use_dynamic_shifting:
            options["mu"] = [shift if config.time_shift_type == "linear" else math.log(shift)]
        else:
            options["shifts"] = [shift]
    return exported(scheduler, [steps], **options)


def _read(path):
    advice = (
        "Write it with `diffusers-gas export`, or install diffusers_gas here to load solvers from folders and the Hub."
    )
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"Load GAS solver: {path} cannot be read ({error.strerror}). {advice}") from error
    except ValueError as error:
        raise ValueError(f"Load GAS solver: {path} is no JSON file ({error}). {advice}") from error


def _download(repo_id):
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo_id, EXPORTED)
    except Exception as error:
        raise ValueError(
            f"Load GAS solver: the Hub gives no {EXPORTED} of {repo_id} ({type(error).__name__}). Give an exported file, or "
            "install diffusers_gas here to load its solver."
        ) from error
