"""The mathematics of SDM (arXiv 2602.12624): low order while a trajectory is straight, time steps of bounded error.

Nothing here knows a network or a pipeline. What needs evaluations is a generator that yields `(x, sigma)`, x = x0 +
sigma * noise, and is sent the data prediction; `run` drives it with a function. Noise levels sigma are those at unit
signal.
"""

from .curvature import (
    CurvatureTerms,
    absolute_curvature,
    curvature_terms,
    normalized_time,
    relative_curvature,
    sample_norm,
    sample_rms,
    second_derivative_estimate,
)
from .error_bound import ErrorMeasure, Tolerance
from .eta_profile import EtaProfile, eta_profile
from .evaluation import Algorithm, Denoiser, run
from .grids import check_sigmas, clean_sigmas, sigma_grid
from .interpolation import pchip
from .multistep import adaptive_dpmsolver, adaptive_unipc
from .order_rules import CurvatureSwitch, OrderRule, Trajectory, cosine_weights, linear_weights, step_weights
from .probability_flow import SIGMA_TIME, VE_TIME, ProbabilityFlow, vp_schedule
from .resampling import resample_sigmas
from .score_difference import score_difference_costs, score_difference_schedule
from .single_step import Churn, adaptive_heun, euler, heun
from .step_search import AdaptiveSchedule, StepRecord, StepSearch, Trial, adaptive_schedule


__all__ = [
    "SIGMA_TIME",
    "VE_TIME",
    "AdaptiveSchedule",
    "Algorithm",
    "Churn",
    "CurvatureSwitch",
    "CurvatureTerms",
    "Denoiser",
    "ErrorMeasure",
    "EtaProfile",
    "OrderRule",
    "ProbabilityFlow",
    "StepRecord",
    "StepSearch",
    "Tolerance",
    "Trajectory",
    "Trial",
    "absolute_curvature",
    "adaptive_dpmsolver",
    "adaptive_heun",
    "adaptive_schedule",
    "adaptive_unipc",
    "check_sigmas",
    "clean_sigmas",
    "cosine_weights",
    "curvature_terms",
    "eta_profile",
    "euler",
    "heun",
    "linear_weights",
    "normalized_time",
    "pchip",
    "relative_curvature",
    "resample_sigmas",
    "run",
    "sample_norm",
    "sample_rms",
    "score_difference_costs",
    "score_difference_schedule",
    "second_derivative_estimate",
    "sigma_grid",
    "step_weights",
    "vp_schedule",
]
