"""Diffusion pipelines in few network evaluations: learned and adaptive ODE solvers as Diffusers schedulers.

The public interface is the names in `__all__` and the modules `adaptive`, `calibration`, `comparison`, `pipelines`,
`presentation.description` and `presentation.figures`. Each is imported when it is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# Diffusers looks up these base classes in the module that it imports a third-party component from.
from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from .utils.diffusers_hooks import register_package


if TYPE_CHECKING:
    from .calibration import calibrate as calibrate
    from .distillation.distill import distill as distill
    from .generalized_solver import GeneralizedSolver as GeneralizedSolver
    from .guided_solver import GuidedSolver as GuidedSolver
    from .hub import list_solvers as list_solvers
    from .papers.edm.pipeline import EDMPipeline as EDMPipeline
    from .papers.edm.unet import EDMUNet as EDMUNet
    from .pipelines.inputs import SampleInputs as SampleInputs
    from .schedulers.scheduling_gas import GASScheduler as GASScheduler
    from .schedulers.scheduling_sdm import SDMScheduler as SDMScheduler
    from .schedulers.sdm_plan import SDMPlan as SDMPlan

__version__ = version("diffusers-gas")

register_package(__name__)

_MODULES = {
    "EDMPipeline": "papers.edm.pipeline",
    "EDMUNet": "papers.edm.unet",
    "GASScheduler": "schedulers.scheduling_gas",
    "GeneralizedSolver": "generalized_solver",
    "GuidedSolver": "guided_solver",
    "SDMPlan": "schedulers.sdm_plan",
    "SDMScheduler": "schedulers.scheduling_sdm",
    "SampleInputs": "pipelines.inputs",
    "calibrate": "calibration",
    "distill": "distillation.distill",
    "list_solvers": "hub",
}
_PUBLIC_MODULES = ("adaptive", "calibration", "comparison", "pipelines", "presentation")

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    if name in _PUBLIC_MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
