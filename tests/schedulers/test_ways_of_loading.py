"""Every way of Diffusers to load a scheduler from the folder of a pipeline. The solvers are there in all but `from_config`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    ModularPipeline,
    SchedulerMixin,
)
from diffusers.modular_pipelines import ComponentSpec, StableDiffusionXLAutoBlocks
from saved_schedulers import planned_scheduler, trained_scheduler
from tiny_pipelines import build

from diffusers_gas import GASScheduler, SDMScheduler


TRAINED = {GASScheduler: trained_scheduler(4, 5), SDMScheduler: planned_scheduler(7, 9)}


@pytest.fixture(scope="module", params=TRAINED, ids=lambda kind: kind.__name__)
def saved(request, tmp_path_factory) -> tuple[type, Path]:
    """The class of a trained scheduler, and a pipeline's folder with it."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = build("stable-diffusion-xl").pipe
    pipe.scheduler = TRAINED[request.param]
    pipe.save_pretrained(folder)
    return request.param, folder


def spec(kind: type | None, folder: str, **arguments: Any) -> SchedulerMixin:
    made = ComponentSpec("scheduler", kind, pretrained_model_name_or_path=folder, subfolder="scheduler")
    return made.load(**arguments)


def modular(folder: str, **arguments: Any) -> SchedulerMixin:
    pipe = ModularPipeline.from_pretrained(folder)
    pipe.load_components(["scheduler"], **arguments)
    return pipe.scheduler


def modular_saved(kind: type, folder: str) -> SchedulerMixin:
    """A modular pipeline with the scheduler of a folder, saved and loaded."""
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(scheduler=kind.from_pretrained(folder, subfolder="scheduler"))
    pipe.save_pretrained(f"{folder}/modular", overwrite_modular_index=True)
    return modular(f"{folder}/modular")


MODEL_ARGUMENTS = {"torch_dtype": torch.float16, "use_safetensors": True, "low_cpu_mem_usage": True}
WAYS: dict[str, Callable[[Any, str], SchedulerMixin]] = {
    "pipeline": lambda kind, folder: DiffusionPipeline.from_pretrained(folder).scheduler,
    "component": lambda kind, folder: (
        DiffusionPipeline.from_pretrained(
            folder, scheduler=kind.from_pretrained(folder, subfolder="scheduler")
        ).scheduler
    ),
    "class": lambda kind, folder: kind.from_pretrained(
        folder, subfolder="scheduler", variant="fp16", **MODEL_ARGUMENTS
    ),
    "auto pipeline": lambda kind, folder: AutoPipelineForText2Image.from_pretrained(folder).scheduler,
    "from_pipe": lambda kind, folder: (
        AutoPipelineForImage2Image.from_pipe(DiffusionPipeline.from_pretrained(folder)).scheduler
    ),
    "auto model": lambda kind, folder: AutoModel.from_pretrained(folder, subfolder="scheduler"),
    "spec": lambda kind, folder: spec(kind, folder, variant="fp16", **MODEL_ARGUMENTS),
    "spec without a class": lambda kind, folder: spec(None, folder),
    "modular": lambda kind, folder: modular(folder),
    "modular with arguments": lambda kind, folder: modular(folder, **MODEL_ARGUMENTS),
    "modular saved": modular_saved,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_has_the_solvers(saved, way):
    kind, folder = saved
    loaded = WAYS[way](kind, str(folder))
    assert type(loaded) is kind and loaded.learned.keys() == TRAINED[kind].learned.keys()


def test_a_config_alone_makes_an_untrained_scheduler_and_says_so(saved, caplog):
    kind, folder = saved
    made = kind.from_config(kind.load_config(folder, subfolder="scheduler"))
    assert made.learned == {} and "does not hold what was learned" in caplog.text
    assert "_solver_steps" not in made.config
