"""Diffusion pipelines in 4 to 8 network evaluations: learned and adaptive ODE solvers as Diffusers schedulers."""

from importlib.metadata import version

import diffusers

# Diffusers looks for these base classes in the module that it imports a third-party component from.
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .generalized_solver import GeneralizedSolver
from .hub import list_solvers
from .papers.edm.pipeline import EDMPipeline
from .papers.edm.unet import EDMUNet
from .schedulers.scheduling_gas import GASScheduler
from .schedulers.scheduling_sdm import SDMScheduler
from .schedulers.sdm_plan import SDMPlan


__version__ = version("diffusers-gas")

# Diffusers records a component's module in `model_index.json`: the public name must not depend on the file layout.
GASScheduler.__module__ = SDMScheduler.__module__ = EDMUNet.__module__ = __name__
# Diffusers downloads a pipeline only if it knows the libraries of all of its components.
LOADABLE_CLASSES[__name__] = {
    name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin")
}
# `DiffusionPipeline.from_pretrained` looks for a pipeline's class among Diffusers' own.
diffusers.EDMPipeline = EDMPipeline

__all__ = [
    "EDMPipeline",
    "EDMUNet",
    "GASScheduler",
    "GeneralizedSolver",
    "ModelMixin",
    "SDMPlan",
    "SDMScheduler",
    "SchedulerMixin",
    "list_solvers",
]
