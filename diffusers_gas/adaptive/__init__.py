"""The mathematics of SDM (arXiv 2602.12624): curvature, noise levels of bounded error, and solvers of mixed order.

Nothing here knows a network or a pipeline. A method that needs network evaluations is a generator: it yields `(x, sigma)`, a
state x = x0 + sigma * noise and its noise level at unit signal, and is sent the data prediction. [`run`] drives it with a
function, [`diffusers_gas.calibration.run_on_pipeline`] with a pipeline. `examples/sdm_methods.py` shows all methods.
"""

from ..time_grids import clean_sigmas, sigma_grid, vp_schedule
from .curvature import curvature_terms, relative_curvature
from .error_bound import ErrorMeasure, Tolerance, eta_profile
from .probability_flow import SIGMA_TIME, VE_TIME, DenoiserRequests, ProbabilityFlow, run
from .resampling import resample_sigmas
from .solvers import Trajectory, adaptive_dpmsolver, adaptive_heun, adaptive_unipc, euler, heun
from .step_search import StepSearch, adaptive_schedule
from .stepping import Churn, CurvatureSwitch, cosine_weights, linear_weights, step_weights


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
    "clean_sigmas",
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
