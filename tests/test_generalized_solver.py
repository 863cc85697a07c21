"""The Generalized Solver against the published implementation's numbers (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffusers_gas.generalized_solver import GeneralizedSolver
from diffusers_gas.noise_schedules import FlowMatchSchedule, NoiseSchedule, VPDiscreteSchedule, VPLinearSchedule
from diffusers_gas.solver_table import weighted_sum


GOLDEN = Path(__file__).parent / "golden"
CASES = [f"case{i:02d}" for i in range(27)]


@pytest.fixture(scope="module")
def reference():
    with safe_open(GOLDEN / "gas_reference.safetensors", framework="pt") as file:
        yield file


def golden_case(file, case: str) -> tuple[dict, dict[str, Tensor], NoiseSchedule]:
    meta = json.loads(file.metadata()[case])
    tensors = {name.split(".", 1)[1]: file.get_tensor(name) for name in file.keys() if name.startswith(case)}
    if meta["schedule"] == "discrete":
        return meta, tensors, VPDiscreteSchedule(file.get_tensor(meta["alphas_cumprod_tensor"]))
    return meta, tensors, VPLinearSchedule(meta["beta_0"], meta["beta_1"])


def golden_solver(meta: dict, tensors: dict[str, Tensor]) -> GeneralizedSolver:
    solver = GeneralizedSolver(
        meta["n"],
        meta["order"],
        theory_order=3,
        lower_order_final=False,
        t_end=meta["t_eps"],
        parameterization="theory" if meta["use_theory_coef"] else "linear_multistep",
    )
    columns = range(1, meta["order"] + 1)
    solver.load_state_dict(
        {
            "timestep_logits": tensors["mu_logit"],
            "timestep_offsets": tensors["t_couple"],
            "state_coefficients": torch.stack([tensors[f"a{i}_diff"] for i in columns], dim=1),
            "data_coefficients": torch.stack([tensors[f"c{i}_diff"] for i in columns], dim=1),
            "theory_orders": solver.theory_orders,
        }
    )
    return solver


def toy_data_prediction(schedule: NoiseSchedule, x: Tensor, t: Tensor, shifted: Tensor, model_type: str) -> Tensor:
    """The toy networks of tests/golden/README.md and its conversion to a data prediction."""
    tau = schedule.timestep(shifted)
    if model_type == "noise":
        tau = tau / 1000
        eps = 0.8 * torch.sin(1.3 * x + 2 * tau) + 0.3 * x * torch.cos(3 * tau)
    else:
        data = torch.tanh(0.7 * x + 0.5 * torch.cos(2 * tau))
        eps = (x - schedule.alpha(shifted) * data) / schedule.sigma(shifted)
    return (x - schedule.sigma(t) * eps) / schedule.alpha(t)


def rollout(solver: GeneralizedSolver, schedule: NoiseSchedule, x: Tensor, model_type: str):
    table, (of_states, of_data) = solver.table(schedule), solver.coefficients(schedule)
    states, data = [x], []
    for k in range(solver.num_inference_steps):
        shifted = table.evaluation_times[k]
        data.append(toy_data_prediction(schedule, states[k], table.times[k], shifted, model_type))
        weights = zip(of_states[k], of_data[k], states, data)
        states.append(sum(a * state + c * prediction for a, c, state, prediction in weights))
        by_table = weighted_sum(table.weights[k], [states[k], x, *data])
        torch.testing.assert_close(by_table, states[-1], rtol=1e-9, atol=1e-9 * states[-1].abs().max().item())
    return table, torch.stack(states), torch.stack(data)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().item()
    return (actual - expected).abs().max().item() / scale if scale else actual.abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_golden_rollout_and_gradients(reference, case):
    meta, tensors, schedule = golden_case(reference, case)
    solver = golden_solver(meta, tensors)
    x = tensors["x_T"].requires_grad_()
    table, states, data = rollout(solver, schedule, x, meta["model_type"])

    assert relative_error(table.times, tensors["t_steps"]) < 1e-9
    assert relative_error(schedule.timestep(table.evaluation_times), tensors["t_input"]) < 1e-9
    for k in range(meta["n"] + 1):
        assert relative_error(states[k], tensors["x_states"][k]) < 1e-9
    assert relative_error(data, tensors["data_preds"]) < 1e-9
    assert relative_error(states[-1], tensors["x_final"]) < 1e-9

    (0.5 * states[-1].square().sum()).backward()
    # One-sided derivative at a knot in two cases: see tests/golden/README.md, "Gradients".
    grid_tolerance = 1e-2 if meta.get("mu_logit_grad_one_sided") else 1e-7
    assert relative_error(solver.timestep_logits.grad, tensors["grad.mu_logit"]) < grid_tolerance
    assert relative_error(solver.timestep_offsets.grad, tensors["grad.t_couple"]) < 1e-7
    assert relative_error(x.grad, tensors["grad.x_T"]) < 1e-7
    for i in range(meta["order"]):
        assert relative_error(solver.state_coefficients.grad[:, i], tensors[f"grad.a{i + 1}_diff"]) < 1e-7
        assert relative_error(solver.data_coefficients.grad[:, i], tensors[f"grad.c{i + 1}_diff"]) < 1e-7


@pytest.mark.parametrize("case", ["case00", "case04"])
def test_golden_initialization(reference, case):
    meta, tensors, _ = golden_case(reference, case)
    solver = GeneralizedSolver(meta["n"], theory_order=3, lower_order_final=False)
    assert relative_error(solver.timestep_logits, tensors["mu_logit"]) < 1e-9
    for i in range(meta["order"]):
        assert relative_error(solver.data_coefficients[:, i], tensors[f"c{i + 1}_diff"]) < 1e-9
        assert relative_error(solver.state_coefficients[:, i], tensors[f"a{i + 1}_diff"]) < 1e-9


# Coefficients for given weights


def random_solver(n: int, order: int | None = None, seed: int = 0) -> GeneralizedSolver:
    solver = GeneralizedSolver(n, order)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def states_of(solver: GeneralizedSolver, schedule: NoiseSchedule) -> list[Tensor]:
    """The states in terms of x[0] and the data predictions."""
    weights = solver.table(schedule).weights.detach()
    unit = torch.eye(len(weights) + 1, dtype=torch.float64)
    states = [unit[0]]
    for newest, *past in weights:
        states.append(newest * states[-1] + torch.stack(past))
    return states


@pytest.mark.parametrize("schedule", [VPLinearSchedule(), FlowMatchSchedule(3.0)], ids=["vp", "flow"])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_coefficients_for_given_weights(schedule, n):
    """Flow matching begins with alpha = 0, where some coefficients have no effect."""
    wanted = random_solver(n)
    solver = GeneralizedSolver(n, times=wanted.times())
    solver.set_weights(schedule, wanted.table(schedule).weights)
    for found, expected in zip(states_of(solver, schedule), states_of(wanted, schedule)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_weights_of_theory_need_no_coefficients():
    schedule, solver = VPLinearSchedule(), random_solver(5)
    solver.set_weights(schedule, GeneralizedSolver(5, times=solver.times()).table(schedule).weights)
    assert max(solver.state_coefficients.abs().max(), solver.data_coefficients.abs().max()) < 1e-12


def test_weights_that_a_solver_cannot_have():
    schedule = VPLinearSchedule()
    weights = random_solver(5).table(schedule).weights
    with pytest.raises(ValueError, match="No coefficients of order 2"):
        GeneralizedSolver(5, 2).set_weights(schedule, weights)
    with pytest.raises(ValueError, match="corrections of theory only"):
        GeneralizedSolver(5, parameterization="linear_multistep").set_weights(schedule, weights)
