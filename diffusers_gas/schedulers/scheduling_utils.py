"""What the package's schedulers share: position in the schedule, the frame of a step, noising, loading, saving."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from torch import Tensor
from typing_extensions import Self

from ..noise_schedules import NoiseSchedule, noise_schedule_from_config
from ..utils.files import locked, replacing, replacing_files
from .configs import LATER_SETTINGS, MOST_TRAIN_TIMESTEPS, SOLVER_CONFIG_NAMES, fits, translate_config
from .solver_files import download_scheduler, list_solver_files, remove_other_solver_files, scheduler_folder


HUB_KWARGS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


class ODEScheduler(SchedulerMixin, ConfigMixin):
    """Base of schedulers that integrate the probability-flow ODE on times of their own.

    A subclass registers the config names that `noise_schedule_from_config` reads and calls `_reset` from `set_timesteps`.
    States are variance preserving or of flow matching, which networks take as they are; `scale_model_input` scales those of
    networks with EDM preconditioning.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1

    def _initialize(self) -> None:
        """Second half of a subclass's `__init__`, after the config is registered."""
        self._check_settings()
        self.num_inference_steps: int | None = None
        noise_schedule = self.noise_schedule(mu=1.0)  # refuses settings that describe none
        if self.config.use_flow_sigmas:
            self.register_to_config(shift=self.config.flow_shift)  # the name of Diffusers' flow-matching schedulers
        if not self.config.use_flow_sigmas and self.config.sigma_data is None:
            self.alphas_cumprod = (2 * noise_schedule.log_alphas).exp().float()
        last = self.config.num_train_timesteps - 1
        self.timesteps = torch.arange(last, -1, -1, dtype=torch.float32)
        self.sigmas = torch.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _check_settings(self) -> None:
        """Raises a `ValueError` for a setting that is not what its annotation says, or out of range."""
        for name, parameter in inspect.signature(type(self).__init__, eval_str=True).parameters.items():
            if name in self.config and not fits(self.config[name], parameter.annotation):
                kind = inspect.formatannotation(parameter.annotation)
                raise ValueError(f"`{name}` must be {kind}, got {self.config[name]!r:.100}.")
        n, t_end, terminal = (self.config[name] for name in ("num_train_timesteps", "t_end", "shift_terminal"))
        if not 2 <= n <= MOST_TRAIN_TIMESTEPS:
            raise ValueError(f"`num_train_timesteps` must be from 2 to {MOST_TRAIN_TIMESTEPS}, got {n}.")
        if not 0 <= t_end < 1:
            raise ValueError(f"`t_end` must be at least 0 and less than 1, got {t_end}.")
        if terminal is not None and not 0 <= terminal < 1:
            raise ValueError(f"`shift_terminal` must be at least 0 and less than 1, got {terminal}.")

    def noise_schedule(self, mu: float | None = None) -> NoiseSchedule:
        """The forward process of the config; `mu` as in `set_timesteps`."""
        return noise_schedule_from_config(self.config, mu)

    def _t_end(self, noise_schedule: NoiseSchedule) -> float:
        return max(self.config.t_end, noise_schedule.t_min)

    def _stretch(self, times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        """Evaluation times whose noise levels are stretched away from 1 so that the last one is `shift_terminal`.

        For times that nobody has learned or measured; a lone time, or one at which all is noise, stays.
        """
        terminal = self.config.shift_terminal
        distances = 1 - noise_schedule.sigma(times)
        if not terminal or not self.config.use_flow_sigmas or distances[-1] == 0:
            return times
        return noise_schedule.inverse_diffusers_sigma(1 - distances * (1 - terminal) / distances[-1])

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """Diffusers' schedulers for the same network: a config that went through one of another kind would describe another."""
        edm = self.config.sigma_data is not None
        return [other for other in super().compatibles if other.__name__.startswith("EDM") == edm]

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply unit noise by."""
        return 1.0

    @property
    def step_index(self) -> int | None:
        """Index of the next step, or `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, set by image-to-image pipelines with `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index of the first step; to be called after `set_timesteps`."""
        self._begin_index = begin_index

    def _reset(
        self, noise_schedule: NoiseSchedule, times: Tensor, evaluation_times: Tensor, device: str | torch.device | None
    ) -> None:
        """Takes a new schedule: `times` `(n + 1,)` of the states and `evaluation_times` `(n,)` for the network."""
        self._noise_schedule = noise_schedule
        self.num_inference_steps = len(evaluation_times)
        # Built on the CPU in float64; devices get float32, which every one of them has.
        self.timesteps = noise_schedule.timestep(evaluation_times).float().to(device)
        self.sigmas = noise_schedule.diffusers_sigma(times).float()
        self._alphas, self._sigmas = noise_schedule.alpha(times).tolist(), noise_schedule.sigma(times).tolist()
        self._host_timesteps = noise_schedule.timestep(evaluation_times).float().tolist()
        self._input_scales = noise_schedule.input_scale(evaluation_times).tolist()
        self._step_index = None
        self._begin_index = None

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Position of an entry of `timesteps`, read off its address; of any other number, its value is looked up."""
        if isinstance(timestep, Tensor):
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return timestep.storage_offset() - self.timesteps.storage_offset()
            timestep = timestep.item()
        if timestep not in self._host_timesteps:
            raise ValueError(f"`timestep` {timestep} is not one of `scheduler.timesteps` {self._host_timesteps}.")
        return self._host_timesteps.index(timestep)

    def _current_index(self, timestep: float | Tensor) -> int:
        if self._step_index is not None:
            return self._step_index
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _start_step(self, timestep: float | Tensor) -> int:
        """The index of the step that begins now."""
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        self._step_index = self._current_index(timestep)
        if not 0 <= self._step_index < self.num_inference_steps:
            raise ValueError(
                f"Step {self._step_index} does not exist: the schedule has {self.num_inference_steps} steps, counted "
                "from 0. Call `set_timesteps` before sampling again."
            )
        return self._step_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is given for a sample: the sample itself, or for EDM networks c_in times it."""
        if self.config.sigma_data is None:
            return sample
        return sample * self._input_scales[self._current_index(timestep)]

    def drop_variance(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The network's output without the channels in which it predicts a variance."""
        if self.config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            return model_output[:, : sample.shape[1]]
        return model_output

    def convert_model_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """Data (x0) prediction of the current step from the network's output and the sample of `step`, in its shape."""
        p, q = self._prediction_weights[self._step_index]
        return weighted_sum([(p, sample), (q, self.drop_variance(model_output, sample))])

    @torch.compiler.disable  # would be compiled anew for every step, and a sum has nothing to gain from it
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at which the network is to be evaluated next: a weighted sum of the sample and of data predictions.

        Args:
            model_output (`torch.Tensor`): The network's output, shaped like `sample` (with `variance_type` set it may
                have twice the channels).
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that the network was given; used to find the
                position at the first step only.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): The current state.
            generator (`torch.Generator`, *optional*): Not used; the solver is deterministic.
            return_dict (`bool`, defaults to `True`): Whether to return a [`SchedulerOutput`] or a tuple.
            eta (`float`), use_clipped_model_output (`bool`): Not used; `DDIMPipeline` passes them to every scheduler.

        Returns:
            [`SchedulerOutput`] or `tuple`: The next state, in the dtype of `sample`. Arithmetic is done in float32, or in
            the sample's precision if that is higher.
        """
        first = self._step_index is None
        self._start_step(timestep)
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if first:
            self._start_history(state)
        data = self.convert_model_output(model_output, state)
        prev_sample = weighted_sum(self._update(state, data)).to(sample.dtype)
        self._step_index += 1
        if self._step_index == self.num_inference_steps:
            self._forget_history()
        return self.output(prev_sample, return_dict)

    def _start_history(self, state: Tensor) -> None:
        """Called at the first step, which may be any, with its state."""
        raise NotImplementedError

    def _update(self, state: Tensor, data: Tensor) -> list[tuple[float, Tensor]]:
        """The next state as weights and tensors, for the current step's state and data prediction."""
        raise NotImplementedError

    def _forget_history(self) -> None:
        """Called after the last step."""
        raise NotImplementedError

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Diffuses samples to the times of `timesteps`, shape `(batch_size,)`.

        In a pipeline (with `begin_index` set) that is the first step's time, or the next step's once sampling has begun.
        Elsewhere entries of `scheduler.timesteps` mean their step's time and other values are network times.
        """
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            alphas, sigmas = [self._alphas[index]], [self._sigmas[index]]
        else:
            known = self._noise_schedule if self.num_inference_steps is not None else self.noise_schedule()
            alphas, sigmas = zip(*(self._noise_level(timestep, known) for timestep in timesteps.flatten().tolist()))
        shape = (-1,) + (1,) * (original_samples.ndim - 1)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=original_samples.dtype, device=original_samples.device).view(shape)

        return column(alphas) * original_samples + column(sigmas) * noise

    def _noise_level(self, timestep: float, noise_schedule: NoiseSchedule) -> tuple[float, float]:
        if self.num_inference_steps is not None and timestep in self._host_timesteps:
            index = self._host_timesteps.index(timestep)
            return self._alphas[index], self._sigmas[index]
        t = noise_schedule.inverse_timestep(torch.tensor(timestep, dtype=torch.float64))
        return noise_schedule.alpha(t).item(), noise_schedule.sigma(t).item()

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and the argument order of Diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @staticmethod
    def output(prev_sample: Tensor, return_dict: bool) -> SchedulerOutput | tuple[Tensor]:
        """What `step` returns."""
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """A scheduler for the pipeline whose scheduler (of any Diffusers class) has this config; see `ConfigMixin`."""
        if isinstance(config, Mapping):
            config = translate_config(config)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Reads a config file as `ConfigMixin` does, but is sure of the result, which Diffusers takes for a repository
        if it is a string."""
        try:
            config = super()._dict_from_json_file(json_file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{json_file} is not a valid JSON file ({error}).") from error
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold a scheduler's settings, got {config!r:.100}.")
        # Diffusers makes attributes of a dictionary of them, and its own bookkeeping is none of the file's.
        impossible = config.keys() & {*dir(dict), "self", "_use_default_values"}
        if impossible:
            raise ValueError(f"{json_file} has entries that no scheduler has: {sorted(impossible)}.")
        return config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Loads config and learned solvers from a folder or a Hub repository.

        Arguments are those of `SchedulerMixin.from_pretrained` (`revision`, `token`, `cache_dir`, ...). Raises a
        `ValueError` that names the file if a solver file is damaged or contradicts the config, and an `OSError` if the
        repository cannot be loaded.
        """
        path = pretrained_model_name_or_path
        if path is None:
            raise ValueError("`pretrained_model_name_or_path` must be a folder or a Hub repository.")
        if not os.path.exists(path):
            # With the config alone, if no more can be had, the scheduler would pass for an untrained one.
            hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
            path, subfolder = download_scheduler(str(path), subfolder, **hub_kwargs), None
        folder = scheduler_folder(path, subfolder)
        with locked(folder, shared=True):
            loaded = super().from_pretrained(
                path, subfolder=subfolder, return_unused_kwargs=return_unused_kwargs, **kwargs
            )
            scheduler = loaded[0] if return_unused_kwargs else loaded
            for num_inference_steps, file in list_solver_files(folder).items():
                scheduler._load_solver(num_inference_steps, file)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves config and learned solvers; the folder then holds this scheduler's solvers and no others.

        Processes that save to one folder take turns, so that one that loads finds all of one scheduler. What goes to the
        Hub gets a model card (see [`diffusers_gas.hub.write_model_card`]).
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a directory, but {save_directory} is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            with replacing_files(folder) as written:
                step_counts = self._save_solvers(written)
                super().save_pretrained(str(written))
            remove_other_solver_files(folder, step_counts)
        if push_to_hub:
            super().save_pretrained(str(folder), push_to_hub=True, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, **kwargs: Any) -> Any:
        """Diffusers' own, which both `save_pretrained` and `push_to_hub` come to, with a model card for the folder."""
        from .model_card import adopt_model_card, write_model_card

        # Below the top level of a repository it is a part of something else.
        if not kwargs.get("subfolder"):
            adopt_model_card(working_dir, repo_id, kwargs.get("token"))
            write_model_card(self, working_dir, repo_id)
        return super()._upload_folder(working_dir, repo_id, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes the config; unlike `ConfigMixin`'s the file appears complete or not at all."""
        with replacing(Path(json_file_path)) as partial:
            super().to_json_file(partial)

    def _record(self) -> dict[str, Any]:
        """What solvers of this scheduler belong to, kept in their files."""
        values = {name: self.config[name] for name in SOLVER_CONFIG_NAMES if name in self.config}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    def _check_trained_for(self, theirs: dict[str, Any]) -> None:
        """Refuses a solver whose record of the scheduler config differs from this config."""
        ours, theirs = self._record(), LATER_SETTINGS | theirs
        differing = [name for name in ours if theirs.get(name) != ours[name]]
        if differing:
            raise ValueError(
                f"it was trained for a config with { ({name: theirs.get(name) for name in differing}) }, but this "
                f"scheduler's has { ({name: ours[name] for name in differing}) }."
            )

    def _save_solvers(self, folder: str | os.PathLike) -> set[int]:
        """Writes the solver files and returns their step counts."""
        raise NotImplementedError

    def _load_solver(self, num_inference_steps: int, path: Path) -> None:
        """Takes one solver file."""
        raise NotImplementedError


def weighted_sum(terms: list[tuple[float, Tensor]]) -> Tensor:
    """`sum(weight * tensor)` in the precision of the first term, in one new tensor; terms of weight 0 are not read."""
    (weight, tensor), *others = terms
    total = weight * tensor
    for weight, tensor in others:
        if weight != 0:
            total.add_(tensor, alpha=weight)
    return total


def evenly_spaced(sigmas: list[float] | None) -> bool:
    """Whether a pipeline's `sigmas` only say how many steps are meant."""
    return sigmas is None or len(sigmas) < 3 or np.allclose(np.diff(sigmas, n=2), 0, atol=1e-3 / len(sigmas))
