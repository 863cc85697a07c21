"""From training checkpoints of the GS / GAS paper's code (arXiv 2510.17699) to a `GeneralizedSolver`."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..generalized_solver import GeneralizedSolver
from ..utils.files import check_tensors
from .pickles import finite_tensor


def convert_checkpoint(
    checkpoint: Any, parameterization: Literal["theory", "linear_multistep"] = "theory", t_end: float = 1e-3
) -> GeneralizedSolver:
    """The solver whose parameters are the averaged weights of a checkpoint, as in the paper.

    Args:
        checkpoint: The content of the file, from [`load_pickle`]. It does not say what the two further arguments are.
        parameterization: Whether the coefficients are corrections of theory (`"theory"`), or are used as they are
            (`"linear_multistep"`, the paper's `use_theory_coef` false).
        t_end: Time at which sampling ends, the paper's t_eps.

    Raises:
        ValueError: If it is not such a checkpoint, or if a tensor has a wrong shape or is not finite. The message names it.
    """
    weights = _averaged_weights(checkpoint)
    n, order = weights["t_couple"].numel(), len(weights) // 2 - 1
    check_tensors(weights, dict.fromkeys(weights, (n,)) | {"mu_logit": (n - 1,)})
    solver = GeneralizedSolver(
        n, order, theory_order=3, lower_order_final=False, t_end=t_end, parameterization=parameterization
    )
    parameters = {"timestep_logits": weights["mu_logit"], "timestep_offsets": weights["t_couple"]}
    for name, kind in (("state_coefficients", "a"), ("data_coefficients", "c")):
        parameters[name] = torch.stack([weights[f"{kind}{i}_diff"] for i in range(1, order + 1)], dim=1)
    solver.load_state_dict(solver.state_dict() | parameters)
    step = checkpoint.get("step")
    solver.provenance = {"training_step": step if isinstance(step, int) else None}
    return solver


def _averaged_weights(checkpoint: Any) -> dict[str, Tensor]:
    """The averaged weights by their names in the paper's code. The file has them without names, in a fixed order."""
    ema = checkpoint.get("ema") if isinstance(checkpoint, dict) else None
    weights = ema.get("shadow_params") if isinstance(ema, dict) else None
    if weights is None:
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"it has no averaged weights ('ema', 'shadow_params'), only {found}.")
    if not isinstance(weights, list) or len(weights) < 4 or len(weights) % 2:
        raise ValueError("its averaged weights are not a list of two tensors and two more for each order.")
    coefficients = [f"{kind}{i}_diff" for i in range(1, len(weights) // 2) for kind in "ca"]
    names = ["mu_logit", "t_couple", *coefficients]
    return {name: finite_tensor(name, weight) for name, weight in zip(names, weights)}
