"""Solver repositories are found by the tags of their model cards."""

from hub_server import TOKEN, run_code, running_hub
from saved_schedulers import planned_scheduler, trained_scheduler

from diffusers_gas.presentation.model_card import write_model_card


def test_solvers_are_found_by_tag_base_model_and_step_count(tmp_path):
    gas, sdm = trained_scheduler(12, 4), planned_scheduler(12)
    with running_hub() as hub:
        for name, scheduler, base_model in (
            ("me/gas", gas, "user/base"),
            ("me/sdm", sdm, "user/base"),
            ("me/other", gas, "user/other"),
            ("you/local", gas, None),
            ("you/private", gas, "user/base"),
        ):
            scheduler.save_pretrained(tmp_path / name)
            write_model_card(scheduler, tmp_path / name, name, base_model=base_model)
            hub.add_folder(name, tmp_path / name, private=name == "you/private")
        (tmp_path / "model").mkdir()
        (tmp_path / "model/README.md").write_text(
            "---\nlibrary_name: diffusers\nbase_model: user/base\n---\nNo solver.\n"
        )
        hub.add_folder("me/model", tmp_path / "model")
        hub.repositories["me/sdm"].downloads = 7
        answers = run_code(
            hub,
            tmp_path / "home",
            f"""
from dataclasses import asdict
from diffusers_gas import list_solvers

def names(*arguments, **keywords):
    return [solver.repo_id for solver in list_solvers(*arguments, **keywords)]

answers["all"] = names()
answers["base"] = names("user/base")
answers["steps"] = names("user/base", 4)
answers["all steps"] = names(num_inference_steps=12, author="you")
answers["private"] = names("user/base", 4, token={TOKEN!r})
answers["limit"] = names(limit=1)
answers["none"] = names("user/unknown")
answers["records"] = [{{**asdict(s), "last_modified": s.last_modified.isoformat()}} for s in list_solvers("user/base")]
answers["unset"] = [s.base_model for s in list_solvers(author="you")]
try:
    list_solvers("not/a/repository")
except ValueError as error:
    answers["error"] = str(error)
""",
        )
        modified = {name: repository.last_modified for name, repository in hub.repositories.items()}
    assert answers["all"][0] == "me/sdm" and set(answers["all"]) == {"me/gas", "me/sdm", "me/other", "you/local"}
    assert answers["base"] == ["me/sdm", "me/gas"]
    assert answers["steps"] == ["me/gas"] and answers["all steps"] == ["you/local"]
    assert set(answers["private"]) == {"me/gas", "you/private"}
    assert answers["limit"] == ["me/sdm"] and answers["none"] == [] and answers["unset"] == [None]
    assert answers["records"] == [
        {
            "repo_id": name,
            "scheduler": scheduler,
            "base_model": "user/base",
            "num_inference_steps": step_counts,
            "downloads": downloads,
            "last_modified": modified[name].isoformat(),
        }
        for name, scheduler, step_counts, downloads in (
            ("me/sdm", "SDMScheduler", [12], 7),
            ("me/gas", "GASScheduler", [4, 12], 0),
        )
    ]
    assert "not/a/repository" in answers["error"]
