"""Diffusion pipelines in 4 to 8 network evaluations: learned and adaptive ODE solvers as Diffusers schedulers."""

# Diffusers looks for `SchedulerMixin` in the module that it imports a third-party scheduler from.
from diffusers import SchedulerMixin

from .generalized_solver import GeneralizedSolver
from .schedulers.scheduling_gas import GASScheduler


# Diffusers records a component's module in `model_index.json`: the public name must not depend on the file layout.
GASScheduler.__module__ = __name__

__all__ = ["GASScheduler", "GeneralizedSolver", "SchedulerMixin"]
