"""From a network's output to a data prediction, as two numbers a step."""

import torch
from torch import Tensor

from ..noise_schedules import EDMSchedule, NoiseSchedule


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def data_prediction_weights(
    prediction_type: str, noise_schedule: NoiseSchedule, t: Tensor, evaluation_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights (p, q) of `D = p * sample + q * model_output`, D the data (x0) prediction.

    The sample lies at time `t`, while the network was told `evaluation_t` (GS section 3.2: learned offsets). As published,
    an epsilon prediction is taken at `t`, and a sample prediction is turned into noise at `evaluation_t`, then back at
    `t`. v and flow predictions, which the paper does not treat, are taken at `t`: finite where alpha = 0. EDM's output F
    gives `D = c_skip x + c_out F` (arXiv 2206.00364, table 1), c_out negative for Diffusers' `"v_prediction"`.

    Args:
        prediction_type (`str`): One of `PREDICTION_TYPES`, as in Diffusers; flow means `noise - data`.
        t, evaluation_t (`Tensor`): Times, float64 of one shape.

    Returns:
        `tuple[Tensor, Tensor]`: p and q, shaped like `t`.
    """
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    if isinstance(noise_schedule, EDMSchedule):
        data_variance, scale = noise_schedule.sigma_data**2, noise_schedule.input_scale(t)
        sign = -1 if prediction_type == "v_prediction" else 1
        return data_variance * scale**2, sign * sigma * noise_schedule.sigma_data * scale
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
    ratio = sigma / noise_schedule.sigma(evaluation_t)
    # alpha = 0 carries no data to convert: the prediction is taken as it is.
    safe_alpha = torch.where(alpha > 0, alpha, 1)
    p = torch.where(alpha > 0, (1 - ratio) / safe_alpha, 0)
    q = torch.where(alpha > 0, ratio * noise_schedule.alpha(evaluation_t) / safe_alpha, 1)
    return p, q
