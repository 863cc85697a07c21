"""From DyWeight's tables for FLUX (arXiv 2603.11607) to a `GeneralizedSolver`.

Step k goes from the noise level s[k], which is not that of the list of sigmas after the first steps, to

    x[k+1] = x[k] + (sigmas[k+1] - s[k]) sum_j w[k, j] v[j],    s[k+1] = s[k] + (sigmas[k+1] - s[k]) sum_j w[k, j],

where v[j] is what the network returns for x[j] and the time r[j] s[j]. A `GeneralizedSolver` can do this exactly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..generalized_solver import GeneralizedSolver, weights_of_velocities
from ..noise_schedules import FlowMatchSchedule
from ..solver_table import SolverTable
from ..utils.tensors import FLOAT64
from .pickles import finite_tensor


def convert_checkpoint(checkpoint: Any, noise_schedule: FlowMatchSchedule, t_end: float = 1e-3) -> GeneralizedSolver:
    """The solver that samples as the tables of a checkpoint do, at the shift of a noise schedule.

    Args:
        checkpoint: The content of the file, from [`load_pickle`].
        noise_schedule: That of the network, with the shift for which the tables were trained. At another shift the solver
            is adapted as a `GeneralizedSolver` is. DyWeight's own code keeps the weights, and changes the times otherwise.
        t_end: Time at which the solver ends by its name. The last state is that of the tables in any case.

    Raises:
        ValueError: If it is not such a checkpoint, or its times do not descend. The message says what is wrong.
    """
    weights, scales = _tables(checkpoint)
    n = len(weights)
    sigmas = noise_schedule.sigma(torch.linspace(1, 0, n + 1, **FLOAT64))
    levels, lengths = [sigmas[0]], []
    for k in range(n):
        lengths.append(sigmas[k + 1] - levels[k])
        levels.append(levels[k] + lengths[k] * weights[k].sum())
    evaluated = torch.stack(levels[:n])
    times, evaluation_times = (noise_schedule.inverse_diffusers_sigma(s) for s in (evaluated, scales * evaluated))
    times = torch.cat([times, times.new_full((1,), t_end)])
    table = SolverTable(times, evaluation_times, weights_of_velocities(torch.stack(lengths), weights, evaluated))
    try:
        return GeneralizedSolver.from_table(table, noise_schedule)
    except ValueError as error:
        raise ValueError(f"its noise levels {[round(level.item(), 4) for level in levels]} do not descend.") from error


def _tables(checkpoint: Any) -> tuple[Tensor, Tensor]:
    """The weights `(n, n)` and the scales of the times `(n,)`, in float64."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"it holds a {type(checkpoint).__name__}.")
    names = ("dyweight_weights_raw", "dyweight_t_scales")
    weights, scales = (finite_tensor(name, checkpoint.get(name)) for name in names)
    n = weights.shape[0] if weights.ndim else 0
    for name, tensor, shape in zip(names, (weights, scales), ((n, n), (n,))):
        if n == 0 or tensor.shape != shape:
            numbers = "n x n" if tensor is weights else "n"
            raise ValueError(f"'{name}' should be {numbers} numbers for n steps, got {tuple(tensor.shape)}.")
    return weights.double().tril(), scales.double()
