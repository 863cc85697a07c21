"""The mathematics of SDM (arXiv 2602.12624): curvature, noise levels of bounded error, and solvers of mixed order.

Nothing here knows a network or a pipeline. A method that needs network evaluations is a generator: it yields `(x, sigma)`, a
state x = x0 + sigma * noise and its noise level at unit signal, and is sent the data prediction. [`run`] drives it with a
function, [`diffusers_gas.calibration.run_on_pipeline`] with a pipeline. `examples/sdm_methods.py` shows all methods.
"""

from ..noise_schedules import resample_sigmas, sigma_grid, vp_schedule
from .curvature import curvature_terms
from .schedules import ErrorMeasure, StepSearch, Tolerance, adaptive_schedule, eta_profile
from .solvers import (
    SIGMA_TIME,
    VE_TIME,
    Churn,
    CurvatureSwitch,
    DenoiserRequests,
    ProbabilityFlow,
    Trajectory,
    adaptive_dpmsolver,
    adaptive_heun,
    adaptive_unipc,
    cosine_weights,
    euler,
    heun,
    linear_weights,
    relative_curvature,
    run,
    step_weights,
)


__all__ = [
    "SIGMA_TIME",
    "VE_TIME",
    "Churn",
    "CurvatureSwitch",
    "DenoiserRequests",
    "ErrorMeasure",
    "ProbabilityFlow",
    "StepSearch",
    "Tolerance",
    "Trajectory",
    "adaptive_dpmsolver",
    "adaptive_heun",
    "adaptive_schedule",
    "adaptive_unipc",
    "cosine_weights",
    "curvature_terms",
    "eta_profile",
    "euler",
    "heun",
    "linear_weights",
    "relative_curvature",
    "resample_sigmas",
    "run",
    "sigma_grid",
    "step_weights",
    "vp_schedule",
]
