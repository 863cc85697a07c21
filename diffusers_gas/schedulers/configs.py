"""The config of a scheduler: what its values may be, the noise schedule that it describes, what those of Diffusers' schedulers mean,
and how it is saved and loaded together with what the scheduler has learned.

Learned parameters are files `{n}_steps.solver` beside the config, one safetensors file per step count. Names decide which files
of a pipeline Diffusers downloads. A weight file in `scheduler/` makes it leave out the config, beside `.bin` weights it leaves
out all `*.safetensors`, and `variant=` fails on a name without a dot, also of a folder. It always downloads files with another
ending.

The config lists the step counts (`STEP_COUNTS`). Other solver files in the folder are what an earlier scheduler has left there.
Configs without the list are older: their files are `solver/{n}_steps.safetensors`.
"""

import copy
import inspect
import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from glob import escape
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, HeunDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import logging
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import REPO_ID_SEPARATOR
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import Tensor
from typing_extensions import Self

from ..noise_schedules import EDMSchedule, FlowMatchSchedule, NoiseSchedule, VESchedule, VPDiscreteSchedule
from ..utils.diffusers_hooks import DEFAULT_VALUES, HookedSchedulerMixin, rescale_zero_terminal_snr
from ..utils.files import load_safetensors, lock_file_of, locked, replacing, replacing_files, save_safetensors
from ..utils.tensors import FLOAT64


logger = logging.get_logger(__name__)

_TRAINED_WITH = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("snr_shift_scale", "use_flow_sigmas", "invert_sigmas", "exploding_sigmas", "sigma_data", "edm_timestep"),
)
# What `noise_schedule_from_config` reads of a config.
NOISE_SCHEDULE_SETTINGS = (
    *_TRAINED_WITH,
    *("flow_shift", "use_dynamic_shifting", "time_shift_type", "sigma_min", "sigma_max", "rho", "round_timesteps"),
)
# Settings that a learned solver depends on. With another value its coefficients are not valid.
SOLVER_SETTINGS = (*_TRAINED_WITH, "prediction_type", "t_end")
# Values of settings that older solver files do not record, because the settings did not exist.
LATER_SETTINGS = {"snr_shift_scale": 1.0, "edm_timestep": "log", "invert_sigmas": False, "exploding_sigmas": None}
# Settings by which pipelines compute their shift, `mu`.
PIPELINE_SETTINGS = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift")
# Settings of the levels of flow matching, apart from those that a solver depends on.
FLOW_SETTINGS = ("flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")

# Earlier versions of `SDMScheduler` saved these for every network. They are those of EDM networks.
EARLIER_SDM_LIMITS = {"sigma_min": 0.002, "sigma_max": 80.0}

# Settings of Diffusers' schedulers that look like misspelled ones of ours.
SIMILAR_SETTINGS = {"solver_p", "threshold"}

_DISTILLED = "consistency models and other distilled networks predict the end of a trajectory, not its direction"
_DISCRETE = "it is for networks of discrete tokens"
_OTHER = "its networks are sampled in a way of their own"

# Schedulers whose networks do not follow the probability-flow ODE of a noise schedule, and a setting that only they have: the
# config of a new scheduler does not name its class, and one that was made from the config of another keeps that one's settings.
REFUSED_CLASSES: dict[str, tuple[str, str | None]] = {
    "CMStochasticIterativeScheduler": (_DISTILLED, "clip_denoised"),
    "FlowMapEulerDiscreteScheduler": (_DISTILLED, None),
    "FlowMatchLCMScheduler": (_DISTILLED, "scale_factors"),
    "LCMScheduler": (_DISTILLED, "original_inference_steps"),
    "SCMScheduler": (_DISTILLED, None),
    "TCDScheduler": (_DISTILLED, "original_inference_steps"),
    "AmusedScheduler": (_DISCRETE, "masking_schedule"),
    "BlockRefinementScheduler": (_DISCRETE, "editing_threshold"),
    "DiscreteDDIMScheduler": (_DISCRETE, "corrector_selection"),
    "EntropyBoundScheduler": (_DISCRETE, "entropy_bound"),
    "VQDiffusionScheduler": (_DISCRETE, "num_vec_classes"),
    "HeliosDMDScheduler": (_OTHER, "stage_range"),
    "HeliosScheduler": (_OTHER, "stage_range"),
    "KarrasVeScheduler": (_OTHER, "s_churn"),
    "LTXEulerAncestralRFScheduler": (_OTHER, None),
    "MiniMaxH3Scheduler": (_OTHER, None),
    "PiflowScheduler": (_OTHER, "num_policy_substeps"),
    "RFD4ProteinaScheduler": (_OTHER, "noise_mode"),
    "RePaintScheduler": (_OTHER, None),
    "ScoreSdeVeScheduler": (_OTHER, "sampling_eps"),
    "UnCLIPScheduler": (_OTHER, None),
}

# A bound on the memory that a config can ask for: a schedule holds a number for every training timestep.
MOST_TRAIN_TIMESTEPS = 10**6
LARGEST_FLOAT = sys.float_info.max

# Diffusers' multistep solvers end the zero-terminal-SNR schedule at this alpha_bar instead of 0, so that log alpha exists.
ZERO_SNR_ALPHA_BAR = 2.0**-24
# Below this alpha^2 a float32 state holds no trace of the data.
LOWEST_ALPHA_BAR = 1e-20

HUB_KWARGS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# Entry of a saved config. Diffusers' schedulers ignore entries that begin with an underscore.
STEP_COUNTS = "_solver_steps"
OLD_FOLDER = "solver"
METADATA_KEY = "diffusers_gas"
FILE_NAME, OLD_FILE_NAME = re.compile(r"([0-9]+)_steps\.solver"), re.compile(r"([0-9]+)_steps\.safetensors")
# The same for the Hub, of any folder. Its patterns have no repetition, and their * goes on into sub-folders.
SOLVER_FILE_PATTERNS = tuple(
    f"{start}{'[0-9]' * digits}_steps.{ending}"
    for start, ending in (("", "solver"), (f"{OLD_FOLDER}/", "safetensors"))
    for digits in range(1, 10)
)
# A solver of the most steps takes less.
LARGEST_FILE = 2**25


# Settings


def current_settings(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Settings of a config as values that can be compared.

    They are read as attributes, because some programs set those (`scheduler.config.flow_shift = 9`).
    """
    values = {name: to_python(getattr(config, name, config[name])) for name in names if name in config}
    # The shift of flow matching may have been set by its name in Diffusers' flow-matching schedulers.
    if config.get("use_flow_sigmas") and "flow_shift" in values and values["flow_shift"] == config["flow_shift"]:
        shift = to_python(getattr(config, "shift", None))
        if shift not in (None, config.get("shift")):
            values["flow_shift"] = shift
    return values


def set_later(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were set as attributes of a config, which then differ from its entries."""
    settings = current_settings(config, config)
    return {name: value for name, value in settings.items() if value != to_python(config[name])}


def to_python(value: Any) -> Any:
    """Numbers of NumPy and PyTorch, also within lists and mappings, as those of Python, which JSON can hold."""
    if value is None or type(value) in (str, bool, int, float):  # most are: every sampling asks
        return value
    if isinstance(value, Mapping):
        return {name: to_python(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_python(entry) for entry in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic | Tensor) else value


def without_earlier_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the limits of EDM networks, which earlier versions saved for other networks, too."""
    other = "tau" in config and not is_edm(config) and config.get("exploding_sigmas") is None
    limits = EARLIER_SDM_LIMITS if other and config.items() >= EARLIER_SDM_LIMITS.items() else {}
    return {name: value for name, value in config.items() if name not in limits}


def check_settings(scheduler_class: type, config: Any) -> None:
    """Raises a `ValueError` for a setting of a scheduler that is not of its annotated type, or out of range."""
    for name, parameter in inspect.signature(scheduler_class, eval_str=True).parameters.items():
        if name in config and not matches(config[name], parameter.annotation):
            kind = inspect.formatannotation(parameter.annotation)
            raise ValueError(f"`{name}` must be {kind}, got {config[name]!r:.100}.")
    steps, fewest = config.num_train_timesteps, 1 if config.use_flow_sigmas else 2  # 1 for times from 0 to 1
    if not fewest <= steps <= MOST_TRAIN_TIMESTEPS:
        raise ValueError(f"`num_train_timesteps` must be from {fewest} to {MOST_TRAIN_TIMESTEPS}, got {steps}.")
    levels = config.exploding_sigmas
    if levels is not None and (len(levels) != 2 or config.use_flow_sigmas):
        raise ValueError(f"`exploding_sigmas` must be two noise levels, without `use_flow_sigmas`, got {levels}.")
    if config.round_timesteps and (is_edm(config) or levels is not None or steps < 100):
        raise ValueError("`round_timesteps` is for networks that are told times of hundreds of steps.")
    if config.invert_sigmas and not config.use_flow_sigmas:
        raise ValueError("`invert_sigmas` is for flow matching: set `use_flow_sigmas`, too.")
    for name in ("t_end", "shift_terminal"):
        if config[name] is not None and not 0 <= config[name] < 1:
            raise ValueError(f"`{name}` must be at least 0 and less than 1, got {config[name]}.")


def matches(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type. An integer is also a float. NaN and infinity are not accepted as floats."""
    origin = get_origin(kind)
    if kind is inspect.Parameter.empty:
        return True
    if origin in (Union, UnionType):
        return any(matches(value, part) for part in get_args(kind))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is list:
        return isinstance(value, list | tuple) and all(matches(entry, *get_args(kind)) for entry in value)
    if kind in (float, int):
        number = isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
        return number and bool(abs(value) <= LARGEST_FLOAT)  # an integer may be too large for a float
    return isinstance(value, kind)


# Noise schedules


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a network with EDM's preconditioning. Cosmos' pipelines use `sigma_data` for themselves."""
    return config.get("sigma_data") is not None and config.get("exploding_sigmas") is None


def noise_schedule_from_config(
    config: Mapping[str, Any], mu: float | None = None, unshifted_timesteps: bool = False
) -> NoiseSchedule:
    """The noise schedule that a scheduler config describes. The names of the settings are Diffusers'.

    Args:
        config: A `sigma_data` selects EDM (`sigma_min`, `sigma_max`, `rho`, `edm_timestep`), `exploding_sigmas` the
            [`VESchedule`] of these lowest and highest levels, and `use_flow_sigmas` flow matching
            (`flow_shift`, `use_dynamic_shifting`, `time_shift_type`, `invert_sigmas`); otherwise the betas (`beta_start`, `beta_end`,
            `beta_schedule`, `trained_betas`, `rescale_betas_zero_snr`, `snr_shift_scale`) are used.
        mu (`float`, *optional*): Dynamic shift of a flow-matching pipeline, required with `use_dynamic_shifting`.
        unshifted_timesteps (`bool`): Whether a flow-matching network is told the noise level before the shift.

    With `round_timesteps` in the config the network is told whole times.
    """
    if is_edm(config):
        names = ("sigma_min", "sigma_max", "rho", "sigma_data", "edm_timestep")
        return EDMSchedule(**{name: config[name] for name in names if config.get(name) is not None})
    if config.get("exploding_sigmas") is not None:
        sigma_min, sigma_max = config["exploding_sigmas"]
        return VESchedule(sigma_min, sigma_max, num_train_timesteps=config["num_train_timesteps"])
    noise_schedule: NoiseSchedule
    if config["use_flow_sigmas"]:
        shift = config["flow_shift"]
        if config["use_dynamic_shifting"]:
            if mu is None:
                raise ValueError("`mu` must be passed to `set_timesteps` when `use_dynamic_shifting` is True.")
            shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
        inverted = config.get("invert_sigmas", False)
        noise_schedule = FlowMatchSchedule(shift, config["num_train_timesteps"], unshifted_timesteps, inverted)
    else:
        noise_schedule = VPDiscreteSchedule(alphas_cumprod_from_config(config))
    if config.get("round_timesteps"):
        noise_schedule.largest_whole_timestep = config["num_train_timesteps"] - (not config["use_flow_sigmas"])
    return noise_schedule


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Tensor:
    """Cumulative product of 1 - beta, float64 of shape `(num_train_timesteps,)`."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    num_train_timesteps, start, end, kind, trained_betas = (config[name] for name in names)
    if trained_betas is None and not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"`beta_start` and `beta_end` must lie between 0 and 1, got {start} and {end}.")
    if trained_betas is not None:
        betas = torch.as_tensor(trained_betas, **FLOAT64)
    elif kind == "linear":
        betas = torch.linspace(start, end, num_train_timesteps, **FLOAT64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, num_train_timesteps, **FLOAT64) ** 2
    else:  # the rarer ones as Diffusers defines them, in its float32
        # Heun's scheduler alone has Shap-E's.
        scheduler_class = HeunDiscreteScheduler if kind == "exp" else DDPMScheduler
        try:
            with torch.device("cpu"):
                betas = scheduler_class(num_train_timesteps, start, end, beta_schedule=kind).betas.double()
        except NotImplementedError as error:
            raise ValueError(f"`beta_schedule` is one that Diffusers does not have, '{kind}'.") from error
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    # CogVideoX divides the signal-to-noise ratio alpha^2 / sigma^2 by this.
    scale = float(config.get("snr_shift_scale", 1.0))
    alphas_cumprod = alphas_cumprod / (scale + (1 - scale) * alphas_cumprod)
    if config["rescale_betas_zero_snr"]:
        alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
        # Linear betas come closer to 0 than that one step earlier; the schedule must still descend.
        alphas_cumprod[-1] = min(ZERO_SNR_ALPHA_BAR, alphas_cumprod[-2].item() / 4)
    descending = alphas_cumprod.ndim == 1 and len(alphas_cumprod) > 1 and (alphas_cumprod.diff() < 0).all()
    if not descending or not LOWEST_ALPHA_BAR < alphas_cumprod[-1] < alphas_cumprod[0] < 1:
        raise ValueError(
            "`beta_start`, `beta_end`, `beta_schedule`, `num_train_timesteps`, `trained_betas` and `snr_shift_scale` must "
            f"let alpha^2 descend from below 1 to above {LOWEST_ALPHA_BAR}, got {alphas_cumprod.numel()} values that end "
            f"with {alphas_cumprod.flatten()[-2:].tolist()}."
        )
    return alphas_cumprod


# Configs of other schedulers


def translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of any Diffusers scheduler with the setting names of this package, which are DPM-Solver++'s and UniPC's.

    Raises:
        ValueError: If this package cannot follow the class, or no setting describes the noise.
    """
    config = _with_defaults_of_class(without_earlier_limits(config))
    class_name = str(config.get("_class_name", ""))
    whose = f"The config of {class_name}" if class_name else "The config"
    for name, (reason, own_setting) in REFUSED_CLASSES.items():
        if name == class_name or own_setting in config:
            what = f"has `{own_setting}`" if own_setting in config else "cannot be replaced"
            raise ValueError(f"{whose} {what}: {reason}.")
    if {"s", "scaler"} <= config.keys():
        # Stable Cascade's cosine schedule in continuous time.
        betas = wuerstchen_betas(config["s"], config["scaler"])
        config |= {"beta_schedule": "linear", "trained_betas": betas.tolist()}
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        config["sigma_data"] = 1.0  # Stable Video Diffusion: EDM's preconditioning, and the times log(sigma) / 4
    # A class's defaults are what its networks were trained with.
    passed_on = {*SOLVER_SETTINGS, *(PIPELINE_SETTINGS if "shift" in config else ())}
    # The config of a scheduler that was constructed, not loaded, does not name its class.
    looks_like_flow = not class_name and "shift" in config and "prediction_type" not in config
    if class_name.startswith("FlowMatch") or looks_like_flow:
        limits = [config.get("sigma_min"), config.get("sigma_max")]
        if None in limits:
            # `sigma_data` is a key of pipelines.
            config |= {"sigma_data": None, "use_flow_sigmas": True, "flow_shift": config.get("shift", 1.0)}
            config["prediction_type"] = "flow_prediction"
        else:
            # Cosmos' pipelines (Predict 2) put their noise levels into the config. Their states are data + sigma noise.
            config["exploding_sigmas"] = limits
    if config.get("exploding_sigmas") is not None:
        config |= {"use_flow_sigmas": False, "prediction_type": "epsilon"}
    if config.get("use_flow_sigmas"):
        passed_on |= {*FLOW_SETTINGS}
    if is_edm(config):
        passed_on |= {"sigma_min", "sigma_max", "sigma_data", "rho"}
        looks_like_cosine = "solver_order" in config and not config.keys() & {"algorithm_type", "edm_timestep"}
        if class_name.startswith("CosineDPM") or (looks_like_cosine and not class_name):
            config["edm_timestep"] = "atan"
    # `from_config` takes the new class's defaults for settings that were defaults of the old class. These must stay.
    config[DEFAULT_VALUES] = [name for name in config.get(DEFAULT_VALUES, ()) if name not in passed_on]
    if not config.keys() & {"beta_schedule", "use_flow_sigmas", "sigma_data"}:
        raise ValueError(
            f"{whose} has none of `beta_schedule`, `use_flow_sigmas` and `sigma_data`. It does not describe the noise that "
            "the network was trained on, so that its scheduler cannot be replaced."
        )
    return config


def _with_defaults_of_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what it leaves out to the defaults of the class of Diffusers that it names."""
    scheduler_class = getattr(diffusers, str(config.get("_class_name", "")), None)
    parameters = inspect.signature(scheduler_class).parameters.values() if isinstance(scheduler_class, type) else ()
    left_out = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in config}
    return {**left_out, **config, DEFAULT_VALUES: [*config.get(DEFAULT_VALUES, ()), *left_out]}


def wuerstchen_betas(s: float, scaler: float, num_train_timesteps: int = 1000) -> Tensor:
    """Betas of Stable Cascade's schedule (arXiv 2306.00637), sampled at `num_train_timesteps` times in (0, 1].

    alpha^2 is cos^2 of (t + s) / (1 + s) quarter turns, divided by its value at t = 0, and within [0.0001, 0.9999]; t is
    t^scaler or, with a scaler above 1, 1 - (1 - t)^scaler.
    """
    times = torch.arange(1, num_train_timesteps + 1, **FLOAT64) / num_train_timesteps
    times = 1 - (1 - times) ** scaler if scaler > 1 else times**scaler
    quarter_turn = math.pi / 2
    alphas_cumprod = ((times + s) / (1 + s) * quarter_turn).cos() ** 2 / math.cos(s / (1 + s) * quarter_turn) ** 2
    # A schedule must descend, also where it is clamped.
    alphas_cumprod = alphas_cumprod.clamp(1e-4, 0.9999) * (1 - 1e-6 * times)
    return 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])


def split_config(scheduler_class: type, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config without other classes' settings, and these. `from_config` of Diffusers keeps them, too, but warns of them."""
    own, unset = inspect.signature(scheduler_class).parameters, config.get(DEFAULT_VALUES, ())
    kept = {name: config[name] for name in config if name not in own and name not in unset and name[:1] != "_"}
    return {name: value for name, value in config.items() if name not in kept}, kept


def check_spelling(scheduler_class: type[SchedulerMixin], names: Iterable[str], likeness: float = 0.8) -> None:
    """Refuses names that look like misspelled settings of a scheduler or arguments of its `from_pretrained`.

    Others are ignored, as by Diffusers' schedulers: pipelines pass on what only their networks read, and a config may be changed
    by settings of another class.
    """
    functions = (scheduler_class, scheduler_class.from_pretrained)
    own = {name for function in functions for name in inspect.signature(function).parameters} - {"kwargs"}
    for name in set(names) - own - SIMILAR_SETTINGS:
        if similar := get_close_matches(name, own, n=1, cutoff=likeness):
            raise ValueError(f"{scheduler_class.__name__} has no setting `{name}`. Is `{similar[0]}` meant?")


# Files of learned parameters


def remove_other_solver_files(folder: Path, step_counts: Collection[int]) -> None:
    """Deletes solver files of step counts that the scheduler saved here does not have, and those with older names."""
    older, found = folder / OLD_FOLDER, _numbered_files(folder, FILE_NAME)
    others = [path for num_inference_steps, path in found.items() if num_inference_steps not in step_counts]
    for path in [*others, *_numbered_files(older, OLD_FILE_NAME).values()]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it may not be empty
        older.rmdir()


def find_solver_files(folder: Path, config: Mapping[str, Any], **hub_kwargs: Any) -> dict[int, Path]:
    """The solver files that belong to the config of a local scheduler folder, by step count.

    What is missing in a snapshot of a Hub repository is downloaded, from the same commit.

    Args:
        hub_kwargs: `token`, `force_download` and `local_files_only`, as for `from_pretrained`.

    Raises:
        OSError: If there are not all files that the config lists.
    """
    if hasattr(diffusers, str(config.get("_class_name"))):
        return {}  # files of an earlier scheduler, and maybe a list that came with its config
    if STEP_COUNTS not in config:
        _download(folder, [f"{OLD_FOLDER}/*.safetensors"], **hub_kwargs)
        return _numbered_files(folder / OLD_FOLDER, OLD_FILE_NAME) | _numbered_files(folder, FILE_NAME)
    files = {n: _solver_file(folder, n) for n in config[STEP_COUNTS]}
    missing = [path.name for path in files.values() if not path.exists()]
    if missing:
        _download(folder, missing, **hub_kwargs)
        missing = [name for name in missing if not (folder / name).exists()]
    if missing:
        raise OSError(
            f"{folder} has no {', '.join(missing)}, which its {SCHEDULER_CONFIG_NAME} lists: fetch the whole folder again."
        )
    return files


def _solver_file(folder: Path, num_inference_steps: int) -> Path:
    return folder / f"{num_inference_steps}_steps.solver"


def _numbered_files(folder: Path, name: re.Pattern) -> dict[int, Path]:
    """Files by the number in their name. Raises an `OSError` if they cannot be listed."""
    # A broken link counts as a folder, so that listing it fails: the scheduler must not load as an untrained one.
    entries = sorted(folder.iterdir()) if os.path.lexists(folder) else []
    matches = [(name.fullmatch(path.name), path) for path in entries]
    return {int(match[1]): path for match, path in matches if match}


def _download(folder: Path, names: list[str], **hub_kwargs: Any) -> None:
    """Downloads files into a folder of the Hub's cache, `models--user--name/snapshots/commit/...`; does nothing elsewhere."""
    folder = folder.absolute()
    snapshot = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
    if snapshot is None:
        return
    storage = snapshot.parent.parent
    repo_type, *repo_id = storage.name.split(REPO_ID_SEPARATOR)
    if repo_type != "models":
        return
    patterns = [Path(escape(str(folder.relative_to(snapshot))), name).as_posix() for name in names]
    settings = hub_kwargs | {"revision": snapshot.name, "cache_dir": storage.parent}
    try:
        snapshot_download("/".join(repo_id), allow_patterns=patterns, **settings)
    except OSError as error:
        raise OSError(
            f"{', '.join(names)} in {folder}: not all in the cache, and {'/'.join(repo_id)} cannot be reached: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_solver_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a solver file.

    Raises:
        ValueError: If it is damaged or far too large, or holds NaN or infinity. The message names the file.
    """
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} is no solver file: it has more than {LARGEST_FILE >> 20} MB.")
    tensors, metadata = load_safetensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor '{name}' has NaN or infinite entries.")
    return tensors, metadata


def scheduler_folder(path: str | os.PathLike, subfolder: str | None = None) -> Path:
    """The folder from which Diffusers reads the config of a local scheduler."""
    folder = Path(path)
    if folder.is_file():
        return folder.parent
    inner = folder / (subfolder or "")
    return inner if (inner / SCHEDULER_CONFIG_NAME).is_file() else folder


def download_config(repo_id: str, subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """Downloads a scheduler's config from the Hub and returns its folder in the cache.

    Args:
        repo_id (`str`): The repository.
        subfolder (`str`, *optional*): Of the repository.
        hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as for `from_pretrained`.

    Raises:
        OSError: If there is no such repository, revision or scheduler, or the Hub cannot be reached and the cache does not
            have it.
    """
    try:
        return Path(hf_hub_download(repo_id, SCHEDULER_CONFIG_NAME, subfolder=subfolder, **hub_kwargs)).parent
    except (OSError, HFValidationError) as error:
        reason = _one_line(error)
        if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            wanted = f"{subfolder}/{SCHEDULER_CONFIG_NAME}" if subfolder else SCHEDULER_CONFIG_NAME
            reason = f"it has no {wanted} (the scheduler of a pipeline needs `subfolder='scheduler'`)."
        raise OSError(
            f"{repo_id} is no folder here, and cannot be loaded from the Hub: {reason} Check the name and the connection; a "
            "private repository needs a `token`."
        ) from error


class SolverSavingMixin(HookedSchedulerMixin):
    """Saves and loads a scheduler's config together with what the scheduler has learned.

    Attributes:
        learned: The solvers or plans by their numbers of network evaluations. Each has `num_inference_steps`, tensors in a
            `state_dict()`, a `config()` of JSON's types, and a `provenance`.
        learned_kind: What files call one of them.
    """

    uploaded_files = SOLVER_FILE_PATTERNS
    learned: dict[int, Any]
    learned_kind: str

    def _add_learned(self, tensors: dict[str, Any], record: dict[str, Any]) -> int:
        """Takes the content of one file, and returns its number of evaluations. A `KeyError`, `TypeError` or `ValueError` refuses it."""
        raise NotImplementedError

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As `ConfigMixin.load_config`, which checks nothing; a `ValueError` refuses what is no config of a scheduler."""
        file = f"The {cls.config_name} of {pretrained_model_name_or_path}"
        try:
            loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a valid JSON file ({error}).") from error
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(config, dict):
            raise ValueError(f"{file} must hold a scheduler's settings, got {config!r:.100}.")
        # Diffusers makes attributes of a dictionary of them, and keeps a record of its own among them.
        impossible = config.keys() & {*dir(dict), "self", DEFAULT_VALUES}
        if impossible:
            raise ValueError(f"{file} has entries that no scheduler has: {sorted(impossible)}.")
        counts = config.get(STEP_COUNTS, [])
        if not isinstance(counts, list) or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(f"{file}: `{STEP_COUNTS}` must be a list of numbers of steps, got {counts!r:.100}.")
        return loaded

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Loads config and learned solvers from a folder or a Hub repository.

        Arguments are those of `SchedulerMixin.from_pretrained` (`revision`, `token`, `cache_dir`, ...), and settings of the
        config.

        Raises:
            ValueError: If a file is damaged or contradicts the config, with the file's name in the message, or if a keyword
                argument is no setting.
            OSError: If the repository cannot be loaded, or files are missing that the config lists.
        """
        path = pretrained_model_name_or_path
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        from_hub = not os.path.exists(path)
        folder = download_config(str(path), subfolder, **hub_kwargs) if from_hub else scheduler_folder(path, subfolder)
        with locked(lock_file_of(folder)):
            config, settings = cls.load_config(
                path if os.path.isfile(path) else folder, return_unused_kwargs=True, **kwargs
            )
            files = find_solver_files(folder, config, **hub_kwargs)
            if not files and config.get(STEP_COUNTS) != []:
                logger.warning(f"{path} has no solvers for this {cls.__name__}, which is an untrained one.")
            config.pop(STEP_COUNTS, None)
            loaded = cls.from_config(config, return_unused_kwargs, **settings)
            scheduler = loaded[0] if return_unused_kwargs else loaded
            for num_inference_steps, file in files.items():
                tensors, metadata = read_solver_file(file)
                try:
                    record = json.loads(metadata[METADATA_KEY])
                    scheduler._check_trained_for(dict(record["scheduler"]))
                    found = scheduler._add_learned(tensors, record)
                    if found != num_inference_steps:
                        raise ValueError(f"it is of {found} evaluations: rename or remove it.")
                except (KeyError, TypeError, ValueError, RecursionError) as error:
                    reason = f"{error}"
                    if isinstance(error, KeyError):
                        reason = f"its record has no {error}"
                    elif isinstance(error, TypeError | json.JSONDecodeError):
                        reason = f"its record is damaged ({error})"
                    raise ValueError(f"{file} does not hold a solver for this {cls.__name__}: {reason}") from error
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves config and learned solvers. The folder then holds the solvers of this scheduler and no others.

        Processes that save to one folder take turns, so that a reader finds the files of one scheduler. What goes to the Hub
        gets a model card (see [`write_model_card`]).
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a directory, but {save_directory} is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        self.register_to_config()  # with what was set as attributes
        with locked(lock_file_of(folder)):
            with replacing_files(folder) as written:
                for num_inference_steps, one in self.learned.items():
                    record = {self.learned_kind: one.config(), "provenance": one.provenance}
                    metadata = {METADATA_KEY: json.dumps(to_python({**record, "scheduler": self._solver_config()}))}
                    save_safetensors(one.state_dict(), _solver_file(written, num_inference_steps), metadata)
                super().save_pretrained(str(written))
            remove_other_solver_files(folder, self.learned)
        if push_to_hub:
            super().save_pretrained(str(folder), push_to_hub=True, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, with the step counts that the scheduler has learned, so that loading knows what must be there.

        Defaults that nobody set are left out, where classes of Diffusers have defaults of their own.
        """
        # A copy's config gets what was set as attributes: printing a scheduler leaves it as it is.
        written = copy.copy(self)
        written.register_to_config()
        config = json.loads(super(SolverSavingMixin, written).to_json_string())
        config[STEP_COUNTS] = sorted(map(int, self.learned))
        unset = written.config.get(DEFAULT_VALUES, ())
        config = {name: value for name, value in config.items() if name not in unset}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes the config; unlike `ConfigMixin`'s the file appears complete or not at all, and an error names it."""
        with replacing(Path(json_file_path)) as partial:
            super().to_json_file(partial)

    def prepare_upload(self, folder: Path, repo_id: str, token: str | bool | None) -> list[str]:
        from ..presentation.model_card import prepare_card  # above this module, for uploads only

        return prepare_card(self, folder, repo_id, token)

    def _solver_config(self) -> dict[str, Any]:
        """The settings that learned numbers depend on, kept in their files."""
        return current_settings(self.config, SOLVER_SETTINGS)

    def _check_trained_for(self, theirs: dict[str, Any]) -> None:
        """Refuses learned numbers whose record of these settings differs from this config."""
        ours, theirs = self._solver_config(), LATER_SETTINGS | theirs
        differing = [name for name in ours if theirs.get(name) != ours[name]]
        if differing:
            raise ValueError(
                f"it was trained for a config with {reprlib.repr({name: theirs.get(name) for name in differing})}, but this "
                f"scheduler's has {reprlib.repr({name: ours[name] for name in differing})}."
            )
