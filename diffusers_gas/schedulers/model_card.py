"""Solvers on the Hub: a model card for what is pushed, and a list of what others have."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from diffusers.utils import is_matplotlib_available, logging
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ..utils.files import remove_leftovers, replacing, write_text
from .guidance import GUIDANCE_ARGUMENTS
from .solver_files import list_solver_files, read_solver_file


logger = logging.get_logger(__name__)

TAG = "diffusers-gas"
STEPS_TAG, BASE_MODEL_TAG = re.compile(r"(\d+)-steps"), re.compile(r"base_model:([^:]+)")
CARD_NAME = "README.md"
# Longer lists are counted, not shown.
MOST_LISTED = 8
# Beside the card: what it shows.
RESULTS, SAMPLES, TIME_GRIDS = "card/results.md", "card/samples.png", "card/time_grids.png"

# Cards without one of these were written by somebody. The second is in those that Diffusers puts where there is none.
GENERATED = "<!-- Written by diffusers_gas, and again with every upload. Without this line it stays as it is. -->"
PLACEHOLDER = "This model card has been automatically generated."


@dataclass(frozen=True)
class _Method:
    """What a card says about the method of a scheduler class."""

    description: str
    citation: str


METHODS = {
    "GASScheduler": _Method(
        "a Generalized Solver, a linear multistep ODE solver whose time grid, coefficients and evaluation times are "
        "learned from a many-step teacher ([arXiv 2510.17699](https://arxiv.org/abs/2510.17699))",
        """\
@misc{oganov2025gas,
  title = {GAS: Improving Discretization of Diffusion ODEs via Generalized Adversarial Solver},
  author = {Oganov, Aleksandr and Bykov, Ilya and Neudachina, Eva and Aliev, Mishan and Tolmachev, Alexander and
            Sidorov, Alexander and Zuev, Aleksandr and Okhotin, Andrey and Rakitin, Denis and Alanov, Aibek},
  year = {2025},
  eprint = {2510.17699},
  archivePrefix = {arXiv}
}""",
    ),
    "SDMScheduler": _Method(
        "SDM, with second-order steps only where the trajectory bends and time steps by a bound on the local error ([arXiv "
        "2602.12624](https://arxiv.org/abs/2602.12624))",
        """\
@misc{jo2026sdm,
  title = {Formalizing the Sampling Design Space of Diffusion-Based Generative Models via Adaptive Solvers and
           Wasserstein-Bounded Timesteps},
  author = {Jo, Sangwoo and Choi, Sungjoon},
  year = {2026},
  eprint = {2602.12624},
  archivePrefix = {arXiv}
}""",
    ),
}


def write_model_card(
    scheduler: SchedulerMixin,
    folder: str | Path,
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    results: str | None = None,
    samples: str | Path | None = None,
) -> Path:
    """Writes `README.md` into the folder of a saved scheduler, as every upload to the Hub does.

    Results, samples and metadata of an earlier card stay unless they are given again. A card that somebody wrote is left
    alone. Without matplotlib there is no figure.

    Args:
        scheduler: What was saved.
        folder (`str` or `Path`): Where.
        repo_id (`str`, *optional*): The Hub repository that it is meant for, `"user/name"`.
        base_model (`str`, *optional*): Hub repository of the pipeline; by default the solvers' teacher if it is one.
        license (`str`, *optional*): Identifier of the solvers' licence as the Hub has them; `"apache-2.0"` by default.
        results (`str`, *optional*): Markdown with what was measured, kept in `card/results.md`.
        samples (`str` or `Path`, *optional*): A PNG picture, copied to `card/samples.png`.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: If something cannot be read or written.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    if base_model is not None:
        validate_repo_id(base_model)
    try:
        for written in (folder, (folder / SAMPLES).parent):
            remove_leftovers(written)
        earlier = path.read_text(encoding="utf-8") if path.exists() else GENERATED
        if not _is_generated(earlier):
            logger.warning(f"{path} was written by somebody: it stays as it is.")
            return path
        if results is not None:
            write_text(folder / RESULTS, results.strip() + "\n")
        if samples is not None:
            with replacing(folder / SAMPLES) as partial:
                shutil.copyfile(samples, partial)
        files = sorted(list_solver_files(folder).items())
        provenances = {n: read_solver_file(file)[1]["provenance"] for n, file in files}
        (folder / TIME_GRIDS).unlink(missing_ok=True)  # of other solvers
        if provenances and is_matplotlib_available():
            from .time_grid_figure import draw_time_grids

            draw_time_grids(scheduler, list(provenances), folder / TIME_GRIDS)
        data = ModelCardData() if earlier == GENERATED else ModelCard(earlier).data
        data.base_model = base_model or data.base_model or _teacher(provenances)
        data.license = license or data.license or "apache-2.0"
        _complete(data, type(scheduler).__name__, list(provenances))
        body = _Body(scheduler, folder, repo_id, data, provenances).text()
        write_text(path, f"---\n{data.to_yaml()}\n---\n\n{GENERATED}\n\n{body}\n")
    except (OSError, YAMLError) as error:
        raise ValueError(
            f"The model card {path} cannot be made ({error}). Mend what is named, or write a card of your own there."
        ) from error
    return path


def _is_generated(card: str) -> bool:
    """Whether nobody has written or changed it."""
    description = next((line for line in card.splitlines() if PLACEHOLDER in line), None)
    if description is None or GENERATED in card:
        return GENERATED in card
    untouched = ModelCard.from_template(ModelCardData(), model_description=description)
    return ModelCard(card).text.strip() == untouched.text.strip()


def adopt_model_card(folder: str | Path, repo_id: str, token: str | bool | None = None) -> None:
    """Fetches the card of a Hub repository into a folder without one, or if somebody wrote that one but not the folder's."""
    path = Path(folder) / CARD_NAME
    try:
        card = Path(hf_hub_download(repo_id, CARD_NAME, token=token)).read_text(encoding="utf-8")
    except (EntryNotFoundError, RepositoryNotFoundError):
        return
    if not path.exists() or (_is_generated(path.read_text(encoding="utf-8")) and not _is_generated(card)):
        write_text(path, card)


def _teacher(provenances: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The teacher of all solvers if it is a Hub repository, not a local folder."""
    teachers = {provenance.get("teacher") for provenance in provenances.values()}
    teacher = teachers.pop() if len(teachers) == 1 else None
    return teacher if isinstance(teacher, str) and teacher.count("/") == 1 else None


def _complete(data: ModelCardData, class_name: str, step_counts: list[int]) -> None:
    """What makes a solver findable, beside the user's own tags."""
    own = [TAG, class_name, *(f"{n}-steps" for n in step_counts)]
    data.tags = own + [tag for tag in data.tags or [] if tag not in own and not STEPS_TAG.fullmatch(tag)]
    data.library_name = "diffusers"
    data.inference = False  # there is no network that a widget could run
    if data.base_model is not None:
        data.base_model_relation = "adapter"  # by default the Hub takes what it does not know for a fine-tuned model


@dataclass
class _Body:
    """What follows the metadata."""

    scheduler: SchedulerMixin
    folder: Path
    repo_id: str | None
    data: ModelCardData
    provenances: Mapping[int, Mapping[str, Any]]

    def text(self) -> str:
        sections = {
            "Usage": self.usage(),
            "Results": self.results(),
            "Time grids": self.time_grids(),
            "How the solvers were made": self.settings(),
            "Licence": self.licence(),
            "Citation": self.citation(),
        }
        return "\n\n".join([self.head(), *(f"## {title}\n\n{text}" for title, text in sections.items() if text)])

    @property
    def class_name(self) -> str:
        return type(self.scheduler).__name__

    @property
    def method(self) -> _Method | None:
        known = (METHODS.get(kind.__name__) for kind in type(self.scheduler).__mro__)
        return next((method for method in known if method is not None), None)

    @property
    def repository(self) -> str:
        return self.repo_id or f"you/{self.folder.name}"

    @property
    def base_model(self) -> str | None:
        """The first one, if there are several."""
        base_model = self.data.base_model
        return base_model[0] if isinstance(base_model, list) else base_model

    @property
    def step_counts(self) -> str:
        *others, last = map(str, self.provenances)
        return f"{', '.join(others)} or {last}" if others else last

    def head(self) -> str:
        title = f"# {self.repository.split('/')[-1]}"
        link = (
            f"[{self.base_model}](https://huggingface.co/{self.base_model})"
            if self.base_model
            else "a Diffusers pipeline"
        )
        what = self.method.description if self.method else f"`{self.class_name}`"
        if not self.provenances:
            return f"{title}\n\nAn untrained scheduler for {link}; it can be trained or calibrated for {what}."
        return (
            f"{title}\n\nSamples {link} in {self.step_counts} network evaluations, with the network as it is, by {what}. A "
            "scheduler for [Diffusers](https://github.com/huggingface/diffusers) and the Python package `diffusers-gas`."
        )

    def usage(self) -> str:
        text = f"""\
```python
from diffusers import DiffusionPipeline
from diffusers_gas import {self.class_name}

pipe = DiffusionPipeline.from_pretrained("{self.base_model or "some/model"}")
pipe.scheduler = {self.class_name}.from_pretrained("{self.repository}")
samples = pipe({", ".join(self.call_arguments())})[0]
```"""
        if self.provenances and not self.scheduler.config.use_theory_for_untrained_steps:
            text += f"\n\nOther step counts than {self.step_counts} are refused."
        return text

    def call_arguments(self) -> list[str]:
        """Of the pipeline's call: those that the solvers depend on."""
        provenance = next(iter(self.provenances.values()), {})
        arguments = provenance.get("pipeline_arguments") or {}
        guidance = {name: arguments.get(name) for name in GUIDANCE_ARGUMENTS}
        return [
            '"a fox"' if provenance.get("prompts_file") else "...",
            f"num_inference_steps={next(iter(self.provenances), 6)}",
            *(f"{name}={scale}" for name, scale in guidance.items() if isinstance(scale, int | float)),
        ]

    def results(self) -> str:
        table, picture = self.folder / RESULTS, self.folder / SAMPLES
        parts = [table.read_text(encoding="utf-8").strip()] if table.is_file() else []
        parts += [f"![Samples]({SAMPLES})"] if picture.is_file() else []
        return "\n\n".join(parts)

    def time_grids(self) -> str:
        if not (self.folder / TIME_GRIDS).is_file():
            return ""
        return f"![Times of states and evaluations, from noise to data]({TIME_GRIDS})"

    def settings(self) -> str:
        """A table of the solvers' provenance, with a column for each step count."""
        settings = provenance_table(self.provenances)
        rows = [["", *(f"{n} steps" for n in self.provenances)], ["---"] * (1 + len(self.provenances))]
        rows += [[cell.replace("|", "\\|") for cell in (name, *values)] for name, values in settings.items()]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) if settings else ""

    def licence(self) -> str:
        return f"The solvers: {self.data.license}. The pipeline that they are for has terms of its own."

    def citation(self) -> str:
        return f"```bibtex\n{self.method.citation}\n```" if self.method else ""


def provenance_table(provenances: Mapping[int, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What made each of some solvers, in words: a row for every name with a cell for each solver."""
    columns = [_flat(provenance) for provenance in provenances.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name.replace("_", " "): [column.get(name, "") for column in columns] for name in names}


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested record as cells of a table; what is empty is left out."""
    cells: dict[str, str] = {}
    for name, value in record.items():
        name = f"{prefix}{name}"
        if isinstance(value, Mapping):
            cells |= _flat(value, f"{name}: ")
            continue
        if isinstance(value, list) and len(value) > MOST_LISTED:
            value = f"{len(value)} values"
        elif isinstance(value, list):
            value = ", ".join(map(_cell, value))
        if value not in (None, ""):
            cells[_cell(name)] = _cell(value)
    return cells


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())
