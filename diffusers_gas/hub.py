"""Search for solvers on the Hub."""

import re
from dataclasses import dataclass
from datetime import datetime

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.utils import validate_repo_id


# Tags of the model cards.
TAG = "diffusers-gas"
STEPS_TAG, BASE_MODEL_TAG = re.compile(r"(\d+)-steps"), re.compile(r"base_model:([^:]+)")


@dataclass(frozen=True)
class SolverRepository:
    """A repository of solvers on the Hub, as its model card describes it.

    Attributes:
        repo_id (`str`): The repository, to be passed to `from_pretrained`.
        scheduler (`str`, *optional*): Class of the scheduler, `"GASScheduler"` or `"SDMScheduler"`.
        base_model (`str`, *optional*): The Hub repository of the pipeline that the solvers are for.
        num_inference_steps (`tuple[int, ...]`): Numbers of steps that it has solvers for, ascending.
        downloads (`int`): Downloads in the last 30 days.
        last_modified (`datetime`, *optional*): Time of the last commit.
    """

    repo_id: str
    scheduler: str | None
    base_model: str | None
    num_inference_steps: tuple[int, ...]
    downloads: int
    last_modified: datetime | None


def list_solvers(
    base_model: str | None = None,
    num_inference_steps: int | None = None,
    *,
    author: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> list[SolverRepository]:
    """Lists repositories of solvers on the Hub, the most downloaded first.

    Args:
        base_model (`str`, *optional*): Only repositories for this pipeline, a Hub repository.
        num_inference_steps (`int`, *optional*): Only repositories with a solver for this number of steps.
        author (`str`, *optional*): Only repositories of this user or organization.
        limit (`int`, *optional*): The most repositories to list.
        token (`str` or `bool`, *optional*): A Hub token, to list private repositories too.

    Raises:
        ValueError: If `base_model` is not a valid name of a repository.
    """
    wanted = [TAG]
    if base_model is not None:
        validate_repo_id(base_model)
        wanted.append(f"base_model:{base_model}")
    if num_inference_steps is not None:
        wanted.append(f"{num_inference_steps}-steps")
    models = HfApi(token=token).list_models(
        filter=wanted, author=author, limit=limit, sort="downloads", expand=["tags", "downloads", "lastModified"]
    )
    return [_solver_repository(model) for model in models]


def _solver_repository(model: ModelInfo) -> SolverRepository:
    tags = model.tags or []
    # The pattern does not match the Hub's own tags of the form base_model:adapter:user/name.
    base_models = [match[1] for tag in tags if (match := BASE_MODEL_TAG.fullmatch(tag))]
    return SolverRepository(
        repo_id=model.id,
        scheduler=next((tag for tag in tags if tag in ("GASScheduler", "SDMScheduler")), None),
        base_model=next(iter(base_models), None),
        num_inference_steps=tuple(sorted({int(match[1]) for tag in tags if (match := STEPS_TAG.fullmatch(tag))})),
        downloads=model.downloads or 0,
        last_modified=model.last_modified,
    )
