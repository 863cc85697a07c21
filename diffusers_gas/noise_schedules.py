"""Forward processes `x_t = alpha(t) x_0 + sigma(t) eps` in continuous time, the time that a network is fed, and the usual grids
of noise levels and times.

Solvers of this package integrate from t = 1 (noise) down to a small `t_end` (data). A noise schedule gives alpha, sigma and
lambda = log(alpha / sigma), the half log signal-to-noise ratio, as differentiable functions of t. It also gives the inverse
of lambda and the map between t and the network's own time. All tensors are float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .utils.tensors import FLOAT64


Spacing: TypeAlias = Literal["edm", "loglinear"]


class NoiseSchedule(ABC):
    """Base class. `t` is a float64 tensor of any shape in [`t_min`, 1]; results have its shape."""

    t_min: float = 0.0
    """Smallest t at which the schedule is defined by what the network was trained on."""
    final_sigma: float = 0.0
    """`diffusers_sigma` of data without noise."""
    largest_whole_timestep: int | None = None
    """Set for networks that are told whole times only, from 0 to this one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "NoiseSchedule":
        return self  # nothing changes a noise schedule, and servers copy schedulers for every request

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient alpha(t)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient sigma(t)."""

    @abstractmethod
    def inverse_lambda(self, lambda_: Tensor) -> Tensor:
        """The t at which `lambda_(t)` has the given value."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Network time (a Diffusers `timestep`, not rounded) of t."""

    @abstractmethod
    def inverse_timestep(self, timestep: Tensor) -> Tensor:
        """The t of a network time."""

    def evaluation_time(self, t: Tensor) -> Tensor:
        """The t nearest to `t` of which the network can be told. Its gradient is that of `t`."""
        if self.largest_whole_timestep is None:
            return t
        timestep = self.timestep(t.detach()).round().clamp(0, self.largest_whole_timestep)
        return self.inverse_timestep(timestep) + (t - t.detach())

    def levels_at(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at network times. They have the dtype and the device of `timestep`, which need not be float64."""
        t = self.inverse_timestep(timestep)
        return self.alpha(t), self.sigma(t)

    def input_scale(self, t: Tensor) -> Tensor:
        """What the state is multiplied by before the network sees it."""
        return torch.ones_like(t)

    def lambda_(self, t: Tensor) -> Tensor:
        """Half log-SNR log(alpha(t) / sigma(t)); -inf where alpha = 0, +inf where sigma = 0."""
        return self.alpha(t).log() - self.sigma(t).log()

    def stretched(self, t: Tensor, terminal: float | None) -> Tensor:
        """Times whose noise levels Diffusers' `shift_terminal` stretches; see [`FlowMatchSchedule`]."""
        return t

    def diffusers_sigma(self, t: Tensor) -> Tensor:
        """The number that Diffusers' schedulers keep in `sigmas`: sigma / alpha, or for flow matching sigma."""
        return self.sigma(t) / self.alpha(t)

    def inverse_diffusers_sigma(self, sigma: Tensor) -> Tensor:
        """The t at which `diffusers_sigma(t)` has the given value."""
        return self.inverse_lambda(-sigma.log())


class VPSchedule(NoiseSchedule):
    """Base of the variance-preserving schedules, alpha^2 + sigma^2 = 1. A subclass defines log alpha(t)."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t)."""

    @abstractmethod
    def inverse_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The t at which `log_alpha(t)` has the given value."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lambda_(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * (-torch.expm1(2 * log_alpha)).log()

    def inverse_lambda(self, lambda_: Tensor) -> Tensor:
        return self.inverse_log_alpha(0.5 * torch.nn.functional.logsigmoid(2 * lambda_))


class VPDiscreteSchedule(VPSchedule):
    """Variance-preserving schedule of a network trained on N discrete timesteps (DDPM, Stable Diffusion).

    log alpha is piecewise linear through the knots t_i = (i + 1) / N, where timestep i has its trained value, and t = 0, where
    there is no noise. Beyond them the first and last segments continue. (DPM-Solver, arXiv 2206.00927, appendix D, and the GS
    paper, arXiv 2510.17699, have no knot at 0. No step of theirs goes below 1 / N.)

    Args:
        alphas_cumprod (`Tensor` of shape `(N,)`): alpha^2 of timestep 0 .. N-1, decreasing, in (0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor):
        self.log_alphas = 0.5 * alphas_cumprod.cpu().double().log()
        self.num_train_timesteps = len(alphas_cumprod)
        self.t_min = 1 / self.num_train_timesteps
        self.knots = torch.arange(self.num_train_timesteps + 1, **FLOAT64) / self.num_train_timesteps
        self._at_knots = torch.cat([self.log_alphas.new_zeros(1), self.log_alphas])

    def log_alpha(self, t: Tensor) -> Tensor:
        return _interpolate(t, self.knots, self._at_knots)

    def inverse_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return _interpolate(log_alpha, self._at_knots.flip(0), self.knots.flip(0))

    def timestep(self, t: Tensor) -> Tensor:
        return (t - self.t_min) * self.num_train_timesteps

    def inverse_timestep(self, timestep: Tensor) -> Tensor:
        return (timestep + 1) / self.num_train_timesteps

    def levels_at(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        # By way of t the times of the knots would be rounded. Pageable memory is copied before `to` returns.
        log_alphas = self.log_alphas.to(timestep.dtype).to(timestep.device, non_blocking=True)
        left = timestep.long().clamp(0, self.num_train_timesteps - 2)
        log_alpha = torch.lerp(log_alphas[left], log_alphas[left + 1], timestep - left)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


class VPLinearSchedule(VPSchedule):
    """Variance-preserving schedule with beta linear in continuous t: log alpha = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2.

    The network time is t itself (Song et al., arXiv 2011.13456).
    """

    def __init__(self, beta_0: float = 0.1, beta_1: float = 20.0):
        self.beta_0, self.beta_1 = beta_0, beta_1

    def log_alpha(self, t: Tensor) -> Tensor:
        return -(self.beta_1 - self.beta_0) / 4 * t**2 - self.beta_0 / 2 * t

    def inverse_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # The root of the quadratic in the form that does not cancel for small t.
        discriminant = self.beta_0**2 - 4 * (self.beta_1 - self.beta_0) * log_alpha
        return -4 * log_alpha / (self.beta_0 + discriminant.sqrt())

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def inverse_timestep(self, timestep: Tensor) -> Tensor:
        return timestep


class EDMPreconditioned(NoiseSchedule):
    """Base of the schedules of networks with EDM's preconditioning (Karras et al., arXiv 2206.00364, table 1).

    EDM's sigma is sigma / alpha here. The network time is c_noise = log(sigma / alpha) / 4, or for Stable Audio (`"atan"`)
    the angle atan(sigma / alpha) in quarter turns. The network's input is c_in times EDM's state, and EDM's state is
    1 / alpha times the state of the schedule.
    """

    sigma_data: float
    edm_timestep: str

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.sigma(t) ** 2 + self.alpha(t) ** 2 * self.sigma_data**2).rsqrt()

    def timestep(self, t: Tensor) -> Tensor:
        if self.edm_timestep == "atan":
            return (-self.lambda_(t)).exp().atan() / (math.pi / 2)
        return -0.25 * self.lambda_(t)

    def inverse_timestep(self, timestep: Tensor) -> Tensor:
        if self.edm_timestep == "atan":
            return self.inverse_lambda(-(timestep * (math.pi / 2)).tan().log())
        return self.inverse_lambda(-4 * timestep)


@dataclass(eq=False)
class VESchedule(NoiseSchedule):
    """Variance-exploding schedule: alpha = 1, and t in [0, 1] is the ramp of Karras et al. (arXiv 2206.00364, equation 5),
    sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, so that uniform t is their schedule.

    The network time is sigma * num_train_timesteps. Cosmos' pipelines (Predict 2) read sigma instead.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    num_train_timesteps: int = field(default=1000, kw_only=True)

    def __post_init__(self) -> None:
        _check_range(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"`sigma_min` must be less than `sigma_max`, got {self.sigma_min} and {self.sigma_max}.")
        self._low, self._high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return (self._low + t * (self._high - self._low)) ** self.rho

    def inverse_lambda(self, lambda_: Tensor) -> Tensor:
        return ((-lambda_ / self.rho).exp() - self._low) / (self._high - self._low)

    def timestep(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.num_train_timesteps

    def inverse_timestep(self, timestep: Tensor) -> Tensor:
        return self.inverse_diffusers_sigma(timestep / self.num_train_timesteps)


@dataclass(eq=False)
class EDMSchedule(EDMPreconditioned, VESchedule):
    """EDM's own schedule: variance exploding, with EDM's preconditioning."""

    sigma_data: float = 0.5
    edm_timestep: str = "log"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(sigma_data=self.sigma_data)


class EDMVPSchedule(EDMPreconditioned, VPLinearSchedule):
    """An EDM network seen as variance preserving, as the GS paper does: beta linear in t from 0.1 to 20.

    sigma / alpha reaches 152.2 at t = 1, whatever `sigma_max` an EDM scheduler has. The networks themselves have no limits.
    """

    sigma_max: ClassVar[float] = math.sqrt(math.expm1(0.5 * 19.9 + 0.1))
    """sigma / alpha at t = 1, where a `GASScheduler` takes the initial noise of an EDM network to be."""

    def __init__(self, sigma_data: float = 0.5, edm_timestep: str = "log"):
        super().__init__()
        _check_range(sigma_data=sigma_data)
        self.sigma_data, self.edm_timestep = sigma_data, edm_timestep


@dataclass(eq=False)
class FlowMatchSchedule(NoiseSchedule):
    """Rectified flow: alpha = 1 - sigma and sigma = shift t / (1 + (shift - 1) t), as Diffusers shifts its sigmas.

    t is the noise level before the shift. A solver's times therefore keep their meaning when a pipeline shifts by
    resolution. The network time is sigma * num_train_timesteps, or t * num_train_timesteps for networks that are told the
    noise level before the shift (CogView4). Inverted networks (Mochi) are told 1 - sigma instead of sigma, and predict
    data - noise.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    unshifted_timesteps: bool = False
    inverted: bool = False

    def __post_init__(self) -> None:
        _check_range(flow_shift=self.shift)
        self.final_sigma = float(self.inverted)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _inverse_sigma(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def inverse_lambda(self, lambda_: Tensor) -> Tensor:
        return self._inverse_sigma(torch.sigmoid(-lambda_))

    def timestep(self, t: Tensor) -> Tensor:
        level = t if self.unshifted_timesteps else self.sigma(t)
        return (1 - level if self.inverted else level) * self.num_train_timesteps

    def inverse_timestep(self, timestep: Tensor) -> Tensor:
        level = timestep / self.num_train_timesteps
        level = 1 - level if self.inverted else level
        return level if self.unshifted_timesteps else self._inverse_sigma(level)

    def stretched(self, t: Tensor, terminal: float | None) -> Tensor:
        """Times whose distances from noise level 1 are stretched so that the last noise level is `terminal`.

        As in `FlowMatchEulerDiscreteScheduler`. A single time at pure noise cannot be stretched, and is returned as it is.
        """
        distances = 1 - self.sigma(t)
        if not terminal or distances[-1] == 0:
            return t
        return self._inverse_sigma(1 - distances * (1 - terminal) / distances[-1])

    def diffusers_sigma(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t) if self.inverted else self.sigma(t)

    def inverse_diffusers_sigma(self, sigma: Tensor) -> Tensor:
        return self._inverse_sigma(1 - sigma if self.inverted else sigma)


def _check_range(**settings: float | None) -> None:
    """Raises a `ValueError` for a setting that puts the states out of the range of float32."""
    for name, value in settings.items():
        if value is None or not 1e-6 <= value <= 1e6:
            raise ValueError(f"`{name}` must be a number from 1e-6 to 1e6, got {value}.")


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through the points (xs, ys), xs ascending, with both end segments extended."""
    right = torch.searchsorted(xs, x.detach().contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
    return ys[left] + slope * (x - xs[left])


def data_prediction_weights(
    prediction_type: str, noise_schedule: NoiseSchedule, t: Tensor, evaluation_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights (p, q) of `D = p * sample + q * model_output`, D the data (x0) prediction.

    The sample lies at time `t`, but the network was told `evaluation_t` (GS section 3.2: learned offsets). As published, an
    epsilon prediction is taken at `t`, and a sample prediction is turned into noise at `evaluation_t` and back into data at
    `t`. The paper has no v and flow predictions. They are taken at `t`, where they are finite even with alpha = 0. EDM's
    output F is a sample prediction `c_skip x / alpha + c_out F` (arXiv 2206.00364, table 1). Diffusers' EDM schedulers use
    `prediction_type` for the sign of c_out, which is negative for `"v_prediction"`.

    Args:
        prediction_type (`"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`): As in Diffusers; flow means
            `noise - data`, or `data - noise` for inverted networks.
        t, evaluation_t (`Tensor`): Times, float64 of one shape.

    Returns:
        `tuple[Tensor, Tensor]`: p and q, shaped like `t`.

    Raises:
        ValueError: For another `prediction_type`.
    """
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    if isinstance(noise_schedule, EDMPreconditioned):
        scale, sigma_data = noise_schedule.input_scale(evaluation_t), noise_schedule.sigma_data
        sign = -1 if prediction_type == "v_prediction" else 1
        c_skip = noise_schedule.alpha(evaluation_t) * (sigma_data * scale) ** 2
        c_out = sign * noise_schedule.sigma(evaluation_t) * sigma_data * scale
        return _by_way_of_noise(noise_schedule, t, evaluation_t, c_skip, c_out)
    if prediction_type == "sample":
        return _by_way_of_noise(noise_schedule, t, evaluation_t, torch.zeros_like(t), torch.ones_like(t))
    # The output is u x0 + v eps, and the sample alpha x0 + sigma eps.
    sign = -1 if isinstance(noise_schedule, FlowMatchSchedule) and noise_schedule.inverted else 1
    outputs: dict[str, Any] = {"epsilon": (0, 1), "v_prediction": (-sigma, alpha), "flow_prediction": (-sign, sign)}
    if prediction_type not in outputs:
        raise ValueError(f"`prediction_type` must be one of {['sample', *outputs]}, got {prediction_type!r}.")
    u, v = outputs[prediction_type]
    determinant = alpha * v - sigma * u
    return v / determinant, -sigma / determinant


def _by_way_of_noise(
    noise_schedule: NoiseSchedule, t: Tensor, evaluation_t: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of the data prediction at `t` that has the same noise as the data prediction (p, q) at `evaluation_t`."""
    alpha = noise_schedule.alpha(t)
    ratio = noise_schedule.sigma(t) / noise_schedule.sigma(evaluation_t)
    # alpha = 0 carries no data to convert: the prediction is taken as it is.
    safe_alpha = torch.where(alpha > 0, alpha, 1)
    alpha_ratio = torch.where(alpha > 0, ratio * noise_schedule.alpha(evaluation_t) / safe_alpha, 1)
    return torch.where(alpha > 0, (1 - ratio) / safe_alpha, 0) + alpha_ratio * p, alpha_ratio * q


def sigma_grid(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, kind: Spacing = "edm", rho: float = 7.0
) -> Tensor:
    """Noise levels from `sigma_max` down to `sigma_min`, without the final 0.

    Args:
        num_steps (`int`): Number of values, at least 2; the number of steps once 0 is appended.
        sigma_min (`float`): Lowest value.
        sigma_max (`float`): Highest value.
        kind (`str`): `"edm"`: equal steps of sigma^(1/rho) (EDM, arXiv 2206.00364, eq. 5), also known as Karras' noise
            levels; `"loglinear"`: equal steps of log sigma, the grid of VE models.
        rho (`float`): Exponent of `"edm"`.

    Returns:
        `Tensor` of shape `(num_steps,)`: float64, descending.
    """
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2, got {num_steps}.")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max must hold, got sigma_min = {sigma_min}, sigma_max = {sigma_max}.")
    check_choice("kind", kind, Spacing)
    ends = torch.tensor([sigma_max, sigma_min], **FLOAT64)
    u = torch.linspace(0, 1, num_steps, **FLOAT64)
    high, low = ends ** (1 / rho) if kind == "edm" else ends.log()
    grid = high + u * (low - high)
    grid = grid**rho if kind == "edm" else grid.exp()
    grid[[0, -1]] = ends
    return grid


def initial_times(
    kind: Literal["uniform"] | Spacing,
    num_inference_steps: int,
    noise_schedule: NoiseSchedule,
    t_start: float = 1.0,
    t_end: float = 1e-3,
) -> Tensor:
    """Usual time grids, float64 `(num_inference_steps + 1,)` descending from `t_start` to `t_end`.

    `"uniform"` in t, or those of noise levels sigma / alpha on a [`sigma_grid`], which needs alpha(t_start) > 0: `"loglinear"`,
    uniform in lambda (DPM-Solver), or `"edm"`.
    """
    ends = torch.tensor([t_start, t_end], **FLOAT64)
    if kind == "uniform":
        return torch.lerp(ends[0], ends[1], torch.linspace(0, 1, num_inference_steps + 1, **FLOAT64))
    high, low = (-noise_schedule.lambda_(ends)).exp().tolist()
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"'{kind}' times (`use_karras_sigmas`, `use_lu_lambdas`) need a finite log-SNR at t = {t_start} and t = {t_end}; use "
            "'uniform'."
        )
    levels = sigma_grid(num_inference_steps + 1, low, high, kind)
    times = noise_schedule.inverse_lambda(-levels.log())
    times[[0, -1]] = ends
    return times


def resample_sigmas(
    sigmas: Tensor,
    eta: Tensor,
    num_steps: int,
    *,
    power: float = 0.5,
    q: float = 0.25,
    spacing: Spacing = "edm",
    append_zero: bool = True,
) -> Tensor:
    """Places `num_steps` noise levels at equal increments of the weighted error length eta^power (sigma_max / sigma)^q.

    Source: SDM, arXiv 2602.12624, N-step resampling; published power 0.5, q 0.1 or 0.25. The errors of resampled
    steps have no bound.

    Args:
        sigmas (`Tensor` of shape `(K + 1,)`): The measured list, descending, the last may be 0.
        eta (`Tensor` of shape `(K,)`): Error of each of its steps, not negative. That of a step to 0 is not used.
        num_steps (`int`): Number of non-zero noise levels, at least 2; of steps, once 0 is appended.
        power (`float`): Exponent of the error.
        q (`float`): A positive exponent moves noise levels towards low noise.
        spacing (`str`): Interpolate sigma^(1/7) (`"edm"`, for any rho of the measured list) or log sigma (`"loglinear"`).
        append_zero (`bool`): End the list with 0.

    Returns:
        `Tensor` of shape `(num_steps + 1,)`, or `(num_steps,)` without the 0: float64, descending, with the ends of
        the measured list exactly.
    """
    path, eta = check_sigmas(sigmas), torch.as_tensor(eta, **FLOAT64)
    check_choice("spacing", spacing, Spacing)
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2, got {num_steps}.")
    if eta.shape != (len(path) - 1,) or not (eta.isfinite() & (eta >= 0)).all():
        raise ValueError(f"`eta` must be {len(path) - 1} finite errors that are not negative, got {eta.tolist()}.")
    if path[-1] == 0:
        path, eta = path[:-1], eta[:-1]
    if len(path) < 2 or not eta.any():
        raise ValueError("There is nothing to redistribute: no step between positive noise levels has an error.")
    lengths = eta**power * (path[0] / path[1:]) ** q
    # A step without any error still needs some length, or two noise levels would have the same position.
    lengths = lengths.clamp(min=1e-12 * lengths.sum())
    positions = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    at = torch.linspace(0, 1, num_steps, **FLOAT64) * positions[-1]
    levels = pchip(positions, path ** (1 / 7), at) ** 7 if spacing == "edm" else pchip(positions, path.log(), at).exp()
    levels[[0, -1]] = path[[0, -1]]
    return torch.cat([levels, levels.new_zeros(1)]) if append_zero else levels


def pchip(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Monotone piecewise cubic Hermite interpolation; outside the knots the end cubics continue.

    Source: Fritsch & Carlson 1980, with the harmonic-mean slopes of Fritsch & Butland 1984, as SciPy's
    `PchipInterpolator`.

    Args:
        x (`Tensor` of shape `(K,)`): Knots, strictly ascending, K >= 2.
        y (`Tensor` of shape `(K,)`): Values at the knots.
        at (`Tensor` of any shape): Where to evaluate.

    Returns:
        `Tensor` of the shape of `at`.
    """
    x, y, at = x.double(), y.double(), at.double()
    h, m = x.diff(), y.diff() / x.diff()
    slopes = m.repeat(2)
    if len(m) > 1:
        left, right = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
        inner = torch.where(m[:-1] * m[1:] > 0, (left + right) / (left / m[:-1] + right / m[1:]), 0.0)
        # Three-point estimates at the ends, limited so that the end intervals stay monotone.
        (h_0, h_1), (m_0, m_1) = (torch.stack([v[[0, -1]], v[[1, -2]]]) for v in (h, m))
        ends = ((2 * h_0 + h_1) * m_0 - h_0 * m_1) / (h_0 + h_1)
        ends = torch.where((m_0 * m_1 < 0) & (ends.abs() > 3 * m_0.abs()), 3 * m_0, ends)
        ends = ends.where(ends.sign() == m_0.sign(), 0.0)
        slopes = torch.cat([ends[:1], inner, ends[1:]])
    k = (torch.searchsorted(x, at.contiguous(), right=True) - 1).clamp(0, len(x) - 2)
    s = at - x[k]
    quadratic = (3 * m[k] - 2 * slopes[k] - slopes[k + 1]) / h[k]
    cubic = (slopes[k] + slopes[k + 1] - 2 * m[k]) / h[k] ** 2
    return y[k] + s * (slopes[k] + s * (quadratic + s * cubic))


def check_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    """`sigmas` as a float64 CPU tensor of shape `(N + 1,)`, N >= 1; strictly descending, the last value may be 0.

    Raises:
        ValueError: If it is anything else.
    """
    levels = torch.as_tensor(sigmas, **FLOAT64)
    in_order = levels.ndim == 1 and len(levels) >= 2 and bool((levels.diff() < 0).all())
    if not in_order or not levels.isfinite().all() or levels[-1] < 0:
        raise ValueError(
            f"Noise levels must be at least two, finite and descending; the last may be 0: {levels.tolist()}."
        )
    return levels


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raises a `ValueError` if the argument `name` is none of the values of a `Literal`."""
    if value not in get_args(literal):
        raise ValueError(f"`{name}` = {value!r} is unknown; choose one of {', '.join(get_args(literal))}.")
