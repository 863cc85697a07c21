"""Diffusion pipelines in few network evaluations: learned and adaptive ODE solvers as Diffusers schedulers.

The public interface is the names in `__all__` and the modules `adaptive`, `calibration`, `comparison`, `pipelines`,
`presentation.description` and `presentation.figures`.
"""

from importlib.metadata import version

# Diffusers looks up these base classes in the module that it imports a third-party component from.
from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from .calibration import calibrate
from .distillation.distill import distill
from .generalized_solver import GeneralizedSolver
from .hub import list_solvers
from .papers.edm.pipeline import EDMPipeline
from .papers.edm.unet import EDMUNet
from .pipelines.inputs import SampleInputs
from .schedulers.scheduling_gas import GASScheduler
from .schedulers.scheduling_sdm import SDMScheduler
from .schedulers.sdm_plan import SDMPlan
from .utils.diffusers_hooks import register_package


__version__ = version("diffusers-gas")

register_package(__name__)

__all__ = [
    "EDMPipeline",
    "EDMUNet",
    "GASScheduler",
    "GeneralizedSolver",
    "SDMPlan",
    "SDMScheduler",
    "SampleInputs",
    "calibrate",
    "distill",
    "list_solvers",
]
