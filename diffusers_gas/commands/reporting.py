"""What commands show of their results: figures, pictures of samples, and uploads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from diffusers import DiffusionPipeline
from diffusers.utils import is_matplotlib_available

from ..comparison import count_parameters
from ..pipelines.named_schedulers import EXAMPLE_MU
from ..presentation.model_card import write_model_card
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from .arguments import HubSettings


@contextmanager
def errors_as_warnings(missing: str) -> Iterator[None]:
    """Inside, an error is printed with what is missing for it: a report must not cost the result that it reports."""
    try:
        yield
    except Exception as error:
        print(f"Warning: no {missing} ({type(error).__name__}: {error})", flush=True)


def describe_model(pipe: DiffusionPipeline) -> str:
    """The pipeline, where it comes from, and its size."""
    return f"{type(pipe).__name__} from {pipe.name_or_path}, {count_parameters(pipe) / 1e6:.2f} M weights"


def figures() -> ModuleType:
    """The module that draws; a `ValueError` without matplotlib, which is an extra."""
    if not is_matplotlib_available():
        raise ValueError("No picture without matplotlib: pip install 'diffusers-gas[train]'")
    from ..presentation import figures

    return figures


def draw_scheduler(scheduler: GASScheduler | SDMScheduler, step_counts: Sequence[int], path: Path) -> None:
    """Draws a scheduler's solvers or plans."""
    if isinstance(scheduler, GASScheduler):
        figures().draw_solvers(scheduler, step_counts, path)
    else:
        figures().draw_plans([scheduler.plan_for(n, EXAMPLE_MU) for n in step_counts], path)


def push_to_hub(
    settings: HubSettings, output_dir: Path, scheduler: GASScheduler | SDMScheduler, results: str, samples: Path | None
) -> None:
    """Pushes `{output_dir}/scheduler` with a model card of results, in Markdown, and of a picture of samples.

    Raises:
        OSError: If it cannot be uploaded. The folder stays as it is.
    """
    repo_id, folder = settings.hub_model_id, output_dir / "scheduler"
    try:
        write_model_card(scheduler, folder, results=results, samples=samples)
        scheduler.save_pretrained(folder, push_to_hub=True, repo_id=repo_id)
    except Exception as error:  # of the connection, too
        raise OSError(f"{folder} is not uploaded to {repo_id}; the same command tries it again ({error}).") from error
    print(f"Pushed to: {repo_id}", flush=True)
