"""Loading from and pushing to the Hub, over HTTP, with a local server in its place."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import saved_schedulers
from hub_server import TOKEN, Hub, run_code, running_hub
from saved_schedulers import save_pipeline

from diffusers_gas import GASScheduler


PRELUDE = """
import diffusers_gas
from diffusers import DiffusionPipeline
from diffusers_gas import GASScheduler


def seen(scheduler):
    coefficients = {n: solver.data_coefficients.tolist() for n, solver in scheduler.solvers.items()}
    return [type(scheduler).__name__, scheduler.config.beta_schedule, coefficients]


def attempt(name, function):
    try:
        answers[name] = seen(function())
    except Exception as error:
        answers[name] = [type(error).__name__, str(error)]
"""


def run_client(hub: Hub, home: Path, code: str, **environment: str) -> dict[str, Any]:
    """Runs code with the Hub's cache in `home`, and returns what it puts into `answers`."""
    answers = run_code(hub, home, f"{PRELUDE}\n{code}", **environment)
    del answers["stderr"]
    return answers


trained_scheduler = functools.partial(saved_schedulers.trained_scheduler, beta_schedule="squaredcos_cap_v2")


def as_seen(scheduler: GASScheduler) -> list[Any]:
    coefficients = {str(n): solver.data_coefficients.tolist() for n, solver in scheduler.solvers.items()}
    return ["GASScheduler", "squaredcos_cap_v2", coefficients]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def test_from_pretrained_over_http_and_from_the_cache(hub, tmp_path):
    newer, older = trained_scheduler(4, 6), trained_scheduler(4, seed=1)
    older.save_pretrained(tmp_path / "older" / "scheduler")
    newer.save_pretrained(tmp_path / "newer" / "scheduler")
    newer.save_pretrained(tmp_path / "root")
    GASScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "untrained")
    commit = hub.add_folder("user/repo", tmp_path / "older", ref="v1")
    hub.add_folder("user/repo", tmp_path / "newer")
    hub.add_folder("user/root", tmp_path / "root")
    hub.add_folder("user/untrained", tmp_path / "untrained")
    hub.add_folder("user/private", tmp_path / "newer", private=True)

    loads = f"""
attempt("subfolder", lambda: GASScheduler.from_pretrained("user/repo", subfolder="scheduler"))
attempt("tag", lambda: GASScheduler.from_pretrained("user/repo", subfolder="scheduler", revision="v1"))
attempt("commit", lambda: GASScheduler.from_pretrained("user/repo", subfolder="scheduler", revision="{commit}"))
attempt("root", lambda: GASScheduler.from_pretrained("user/root"))
attempt("untrained", lambda: GASScheduler.from_pretrained("user/untrained"))
attempt("private", lambda: GASScheduler.from_pretrained("user/private", subfolder="scheduler", token="{TOKEN}"))
"""
    expected = {
        "subfolder": as_seen(newer),
        "tag": as_seen(older),
        "commit": as_seen(older),
        "root": as_seen(newer),
        "untrained": as_seen(GASScheduler()),
        "private": as_seen(newer),
    }
    home = tmp_path / "home"
    assert run_client(hub, home, loads) == expected

    count = len(hub.requests)
    assert run_client(hub, home, loads.replace("))\n", ", local_files_only=True))\n")) == expected
    assert len(hub.requests) == count, "nothing is asked when everything is in the cache"


def test_only_what_is_needed_is_downloaded(hub, tmp_path):
    save_pipeline(tmp_path / "pipeline", trained_scheduler(4))
    hub.add_folder("user/pipeline", tmp_path / "pipeline")
    code = 'attempt("gas", lambda: GASScheduler.from_pretrained("user/pipeline", subfolder="scheduler"))'
    assert run_client(hub, tmp_path / "home", code)["gas"] == as_seen(trained_scheduler(4))
    fetched = {path.split("/", 5)[5] for method, path in hub.requests if "/resolve/" in path and method == "GET"}
    assert fetched == {"scheduler/scheduler_config.json", "scheduler/4_steps.solver"}


def test_what_cannot_be_loaded_is_named(hub, tmp_path):
    trained_scheduler(4).save_pretrained(tmp_path / "repo")
    hub.add_folder("user/private", tmp_path / "repo", private=True)
    hub.add_folder("user/repo", tmp_path / "repo")
    damaged = tmp_path / "repo/4_steps.solver"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    hub.add_folder("user/damaged", tmp_path / "repo")
    answers = run_client(
        hub,
        tmp_path / "home",
        """
attempt("missing", lambda: GASScheduler.from_pretrained("user/missing"))
attempt("private", lambda: GASScheduler.from_pretrained("user/private"))
attempt("wrong_token", lambda: GASScheduler.from_pretrained("user/private", token="hf_wrong"))
attempt("revision", lambda: GASScheduler.from_pretrained("user/repo", revision="v9"))
attempt("subfolder", lambda: GASScheduler.from_pretrained("user/repo", subfolder="scheduler"))
attempt("damaged", lambda: GASScheduler.from_pretrained("user/damaged"))
attempt("uncached", lambda: GASScheduler.from_pretrained("user/root", local_files_only=True))
""",
    )
    for name, words in {
        "missing": "user/missing",
        "private": "user/private",
        "wrong_token": "user/private",
        "revision": "v9",
        "subfolder": "scheduler_config.json",
        "damaged": "4_steps.solver",
        "uncached": "user/root",
    }.items():
        kind, message = answers[name]
        assert kind == ("ValueError" if name == "damaged" else "OSError"), answers[name]
        assert words in message
    assert "token" in answers["private"][1]


def test_without_a_network_a_part_of_the_files_is_not_taken_for_all(hub, tmp_path):
    trained_scheduler(4, 6).save_pretrained(tmp_path / "repo")
    hub.add_folder("user/repo", tmp_path / "repo")
    load = 'attempt("gas", lambda: GASScheduler.from_pretrained("user/repo"))'
    for home in ("whole", "part"):
        assert run_client(hub, tmp_path / home, load)["gas"] == as_seen(trained_scheduler(4, 6))
    next((tmp_path / "part").rglob("6_steps.solver")).unlink()
    hub.shutdown()
    hub.server_close()
    with ThreadPoolExecutor() as pool:  # they try several times
        homes = [tmp_path / home for home in ("whole", "part", "nothing")]
        whole, part, nothing = (
            answers["gas"] for answers in pool.map(lambda home: run_client(hub, home, load), homes)
        )
    assert whole == as_seen(trained_scheduler(4, 6))
    kind, message = part
    assert kind == "OSError" and "6_steps.solver" in message
    kind, message = nothing
    assert kind == "OSError" and "user/repo" in message and "connection" in message


def test_pipeline_over_http_restores_the_solver(hub, tmp_path):
    """Diffusers would not download the scheduler's config if a weight file were in the same folder."""
    scheduler = trained_scheduler(4, 5)
    save_pipeline(tmp_path / "pipeline", scheduler)
    hub.add_folder("user/pipeline", tmp_path / "pipeline")
    load = """
attempt("alone", lambda: GASScheduler.from_pretrained("user/pipeline", subfolder="scheduler"))
pipe = DiffusionPipeline.from_pretrained("user/pipeline")
answers["scheduler"] = seen(pipe.scheduler)
pipe.set_progress_bar_config(disable=True)
answers["image"] = pipe(num_inference_steps=4, output_type="np").images.shape
"""
    expected = {"alone": as_seen(scheduler), "scheduler": as_seen(scheduler), "image": [1, 8, 8, 1]}
    assert run_client(hub, tmp_path / "home", load) == expected
    count = len(hub.requests)
    assert run_client(hub, tmp_path / "home", load, HF_HUB_OFFLINE="1") == expected
    assert len(hub.requests) == count


def test_solvers_of_one_repository_for_the_model_of_another(hub, tmp_path):
    """The model's revision is not the solver's."""
    save_pipeline(tmp_path / "model", GASScheduler(beta_schedule="squaredcos_cap_v2"))
    trained_scheduler(4).save_pretrained(tmp_path / "solver")
    hub.add_folder("user/model", tmp_path / "model", ref="v1")
    hub.add_folder("user/solver", tmp_path / "solver")
    load = """
settings = {"subfolder": "scheduler", "solver": "user/solver"}
attempt("hub", lambda: GASScheduler.from_pretrained("user/model", revision="v1", **settings))
attempt("cached", lambda: GASScheduler.from_pretrained("user/model", revision="v1", local_files_only=True, **settings))
attempt("local", lambda: GASScheduler.from_pretrained("model", local_files_only=True, **settings))
"""
    expected = dict.fromkeys(("hub", "cached", "local"), as_seen(trained_scheduler(4)))
    assert run_client(hub, tmp_path / "home", load) == expected
    assert run_client(hub, tmp_path / "other_home", load.splitlines()[1] + "\n" + load.splitlines()[4]) == {
        "local": expected["local"]
    }


def test_push_to_hub_round_trip(hub, tmp_path):
    trained, other = trained_scheduler(4, 6), trained_scheduler(5, seed=1)
    trained.save_pretrained(tmp_path / "trained")
    other.save_pretrained(tmp_path / "other")
    answers = run_client(
        hub,
        tmp_path / "home",
        f"""
trained = GASScheduler.from_pretrained({str(tmp_path / "trained")!r})
trained.push_to_hub("user/pushed", token="{TOKEN}", private=True)
attempt("hidden", lambda: GASScheduler.from_pretrained("user/pushed"))
attempt("pushed", lambda: GASScheduler.from_pretrained("user/pushed", token="{TOKEN}"))
trained.save_pretrained({str(tmp_path / "saved")!r}, push_to_hub=True, repo_id="user/saved", token="{TOKEN}")
attempt("saved", lambda: GASScheduler.from_pretrained("user/saved"))
other = GASScheduler.from_pretrained({str(tmp_path / "other")!r})
other.push_to_hub("user/saved", token="{TOKEN}")
attempt("replaced", lambda: GASScheduler.from_pretrained("user/saved"))
attempt("refused", lambda: trained.push_to_hub("user/third", token="hf_wrong"))
""",
    )
    assert answers["pushed"] == as_seen(trained) and answers["saved"] == as_seen(trained)
    assert answers["hidden"][0] == "OSError" and "user/pushed" in answers["hidden"][1]
    assert hub.repositories["user/pushed"].private
    files = hub.repositories["user/pushed"].commits[hub.repositories["user/pushed"].refs["main"]]
    assert {"scheduler_config.json", "4_steps.solver", "6_steps.solver"} <= files.keys()
    assert not any("partial" in path for path in files)
    # Pushing adds and replaces files, and deletes none.
    assert answers["replaced"][2].keys() == {"4", "5", "6"}
    assert answers["refused"][0] == "HfHubHTTPError" and "user/third" not in hub.repositories
