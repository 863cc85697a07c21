"""`--push_to_hub` of the commands."""

from hub_server import TOKEN, run_code, running_hub
from saved_schedulers import save_pipeline

from diffusers_gas import GASScheduler


COMMANDS = {
    "train": "--num_inference_steps 2 --max_train_iterations 1 --teacher_num_inference_steps 3 --num_teacher_samples 2 "
    "--num_validation_samples 2 --num_compared_samples 0",
    "calibrate": "--num_inference_steps 4 --num_samples 2 --most_evaluations 120 --solver unipc",
}
INTERRUPT = """
from diffusers_gas.distillation.gauss_newton import Problem

def interrupt(*_):
    raise KeyboardInterrupt

Problem.descend = interrupt
"""
RUN = """
from diffusers_gas.commands import calibrate, train
for name in COMMANDS:
    command = {"train": train, "calibrate": calibrate}[name]
    words = ["--pretrained_model_name_or_path", "pipeline", "--output_dir", name, "--push_to_hub", *COMMANDS[name].split()]
    try:
        command.main(words)
    except OSError as error:
        answers[name] = str(error)
"""


def test_a_push_that_fails_costs_no_work_and_is_made_up_for_by_the_same_command(tmp_path):
    save_pipeline(tmp_path / "pipeline", GASScheduler())
    with running_hub() as hub:

        def run(token: str, code: str = RUN) -> dict:
            return run_code(hub, tmp_path / "home", f"COMMANDS = {COMMANDS}\n{code}", HF_TOKEN=token)

        no_model = run(TOKEN, RUN.replace('"pipeline"', '"nowhere"'))
        assert COMMANDS.keys() <= no_model.keys() and not hub.repositories  # a misspelled name leaves none
        for token, hub.failing in (("hf_wrong", {}), (TOKEN, {".*/auth-check/write": 403})):
            refused = run(token)  # before the work, also where the repository exists
            assert all("--hub_model_id" in refused[name] for name in COMMANDS)
            assert not any((tmp_path / name / "scheduler").exists() for name in COMMANDS)
        hub.failing = {}
        interrupted = run(TOKEN, f"del COMMANDS['calibrate']\n{INTERRUPT}{RUN}")
        assert "the same command goes on and pushes" in interrupted["stderr"]
        assert (tmp_path / "train" / "scheduler").exists()
        assert hub.repositories["user/train"].files.keys() == {".gitattributes"}  # not replaced by a part
        hub.failing = {".*/commit/main": 0}
        failed = run(TOKEN)
        for name in COMMANDS:  # an error, so that whoever starts the command hears of it
            message = f"{name}/scheduler is not uploaded to user/{name}; the same command tries it again ("
            assert message in failed[name]
            assert any((tmp_path / name / "scheduler").glob("*_steps.solver"))
        hub.failing = {}
        made_up_for = run(TOKEN)
        assert "2 steps: finished by an earlier run" in made_up_for["stderr"]
        for name in COMMANDS:
            assert {"README.md", "scheduler_config.json"} <= hub.repositories[f"user/{name}"].files.keys()
