"""The mathematics of SDM (arXiv 2602.12624): curvature, noise levels of bounded error, and solvers of mixed order.

Nothing here knows a network or a pipeline. A method that needs network evaluations is a generator: it yields `(x, sigma)`, a
state x = x0 + sigma * noise and its noise level at unit signal, and is sent the data prediction. [`run`] drives it with a
function, [`diffusers_gas.calibration.run_on_pipeline`] with a pipeline. `examples/sdm_methods.py` shows all methods.
"""

from ..noise_schedules import resample_sigmas as resample_sigmas
from ..noise_schedules import sigma_grid as sigma_grid
from .curvature import second_derivative as second_derivative
from .schedules import ErrorMeasure as ErrorMeasure
from .schedules import StepSearch as StepSearch
from .schedules import Tolerance as Tolerance
from .schedules import adaptive_schedule as adaptive_schedule
from .schedules import eta_profile as eta_profile
from .solvers import SIGMA_TIME as SIGMA_TIME
from .solvers import VE_TIME as VE_TIME
from .solvers import Churn as Churn
from .solvers import CurvatureSwitch as CurvatureSwitch
from .solvers import DenoiserRequests as DenoiserRequests
from .solvers import ProbabilityFlow as ProbabilityFlow
from .solvers import Trajectory as Trajectory
from .solvers import adaptive_dpmsolver as adaptive_dpmsolver
from .solvers import adaptive_heun as adaptive_heun
from .solvers import adaptive_unipc as adaptive_unipc
from .solvers import cosine_weights as cosine_weights
from .solvers import euler as euler
from .solvers import heun as heun
from .solvers import linear_weights as linear_weights
from .solvers import relative_curvature as relative_curvature
from .solvers import run as run
from .solvers import step_weights as step_weights
