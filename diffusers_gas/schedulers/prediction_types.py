"""From a network's output to a data prediction, as two numbers a step."""

import torch
from torch import Tensor

from ..noise_schedules import EDMPreconditioned, NoiseSchedule


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def data_prediction_weights(
    prediction_type: str, noise_schedule: NoiseSchedule, t: Tensor, evaluation_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights (p, q) of `D = p * sample + q * model_output`, D the data (x0) prediction.

    The sample lies at time `t`, while the network was told `evaluation_t` (GS section 3.2: learned offsets). As published,
    an epsilon prediction is taken at `t`, and a sample prediction is turned into noise at `evaluation_t`, then back at
    `t`. v and flow predictions, which the paper does not treat, are taken at `t`: finite where alpha = 0. EDM's output F
    is a sample prediction `c_skip x / alpha + c_out F` (arXiv 2206.00364, table 1), c_out negative for Diffusers'
    `"v_prediction"`.

    Args:
        prediction_type (`str`): One of `PREDICTION_TYPES`, as in Diffusers; flow means `noise - data`.
        t, evaluation_t (`Tensor`): Times, float64 of one shape.

    Returns:
        `tuple[Tensor, Tensor]`: p and q, shaped like `t`.
    """
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    if isinstance(noise_schedule, EDMPreconditioned):
        scale, sigma_data = noise_schedule.input_scale(evaluation_t), noise_schedule.sigma_data
        sign = -1 if prediction_type == "v_prediction" else 1
        c_skip = noise_schedule.alpha(evaluation_t) * (sigma_data * scale) ** 2
        c_out = sign * noise_schedule.sigma(evaluation_t) * sigma_data * scale
        return _by_way_of_noise(noise_schedule, t, evaluation_t, c_skip, c_out)
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        # v = alpha eps - sigma x0, and the denominator is 1 for variance-preserving schedules.
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power
    if prediction_type == "flow_prediction":
        # eps - x0, and the denominator is 1 for flow matching.
        total = alpha + sigma
        return 1 / total, -sigma / total
    return _by_way_of_noise(noise_schedule, t, evaluation_t, torch.zeros_like(t), torch.ones_like(t))


def _by_way_of_noise(
    noise_schedule: NoiseSchedule, t: Tensor, evaluation_t: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of the data prediction at `t` whose noise the data prediction (p, q) at `evaluation_t` has."""
    alpha = noise_schedule.alpha(t)
    ratio = noise_schedule.sigma(t) / noise_schedule.sigma(evaluation_t)
    # alpha = 0 carries no data to convert: the prediction is taken as it is.
    safe_alpha = torch.where(alpha > 0, alpha, 1)
    alpha_ratio = torch.where(alpha > 0, ratio * noise_schedule.alpha(evaluation_t) / safe_alpha, 1)
    return torch.where(alpha > 0, (1 - ratio) / safe_alpha, 0) + alpha_ratio * p, alpha_ratio * q
