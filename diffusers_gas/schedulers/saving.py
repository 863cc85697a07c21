"""How schedulers of this package are saved and loaded: a config, and one file of learned numbers for every step count."""

import json
import os
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import logging
from typing_extensions import Self

from ..utils.diffusers_hooks import DEFAULT_VALUES, HookedSchedulerMixin
from ..utils.files import lock_file_of, locked, replacing, replacing_files
from .configs import LATER_SETTINGS, SOLVER_CONFIG_NAMES
from .solver_files import (
    SOLVER_FILE_PATTERNS,
    STEP_COUNTS,
    download_config,
    find_solver_files,
    read_solver_file,
    remove_other_solver_files,
    save_solver_file,
    scheduler_folder,
)


logger = logging.get_logger(__name__)

HUB_KWARGS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


class SolverSavingMixin(HookedSchedulerMixin):
    """Saves and loads a scheduler's config together with what it has learned.

    A subclass says what it has learned (`learned_files`) and takes it back (`_take`).
    """

    uploaded_files = SOLVER_FILE_PATTERNS

    def learned_files(self) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
        """Tensors and record (anything that JSON can hold) for the file of every step count."""
        raise NotImplementedError

    def _take(self, num_inference_steps: int, tensors: dict[str, Any], record: dict[str, Any]) -> None:
        """Takes the content of one file. A `KeyError`, `TypeError` or `ValueError` refuses it."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
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
        if path is None:
            raise ValueError("`pretrained_model_name_or_path` must be a folder or a Hub repository.")
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
                tensors, record = read_solver_file(file)
                try:
                    scheduler._check_trained_for(dict(record["scheduler"]))
                    scheduler._take(num_inference_steps, tensors, record)
                except (KeyError, TypeError, ValueError) as error:
                    reason = f"its record has no {error}" if isinstance(error, KeyError) else error
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
        learned = self.learned_files()
        with locked(lock_file_of(folder)):
            with replacing_files(folder) as written:
                for num_inference_steps, (tensors, record) in learned.items():
                    record = {**record, "scheduler": self._solver_config()}
                    save_solver_file(written, num_inference_steps, tensors, record)
                super().save_pretrained(str(written))
            remove_other_solver_files(folder, set(learned))
        if push_to_hub:
            super().save_pretrained(str(folder), push_to_hub=True, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, with the step counts that the scheduler has learned, so that loading knows what must be there."""
        config = json.loads(super().to_json_string()) | {STEP_COUNTS: sorted(self.learned_files())}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes the config; unlike `ConfigMixin`'s the file appears complete or not at all."""
        with replacing(Path(json_file_path)) as partial:
            super().to_json_file(partial)

    def prepare_upload(self, folder: Path, repo_id: str, token: str | bool | None) -> None:
        from ..presentation.model_card import adopt_model_card, write_model_card  # above this module, for uploads only

        adopt_model_card(folder, repo_id, token)
        write_model_card(self, folder, repo_id)

    @classmethod
    def checked_config(cls, json_file: Path, config: Any) -> dict[str, Any]:
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold a scheduler's settings, got {config!r:.100}.")
        # Diffusers makes attributes of a dictionary of them, and keeps a record of its own among them.
        impossible = config.keys() & {*dir(dict), "self", DEFAULT_VALUES}
        if impossible:
            raise ValueError(f"{json_file} has entries that no scheduler has: {sorted(impossible)}.")
        counts = config.get(STEP_COUNTS, [])
        if not isinstance(counts, list) or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(f"{json_file}: `{STEP_COUNTS}` must be a list of numbers of steps, got {counts!r:.100}.")
        return config

    def _solver_config(self) -> dict[str, Any]:
        """The settings that learned numbers depend on, kept in their files."""
        values = {name: self.config[name] for name in SOLVER_CONFIG_NAMES if name in self.config}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    def _check_trained_for(self, theirs: dict[str, Any]) -> None:
        """Refuses learned numbers whose record of these settings differs from this config."""
        ours, theirs = self._solver_config(), LATER_SETTINGS | theirs
        differing = [name for name in ours if theirs.get(name) != ours[name]]
        if differing:
            raise ValueError(
                f"it was trained for a config with {reprlib.repr({name: theirs.get(name) for name in differing})}, but this "
                f"scheduler's has {reprlib.repr({name: ours[name] for name in differing})}."
            )
