"""Loading from and pushing to the Hub, over HTTP, with a local server in its place."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import saved_schedulers
from diffusers import DDIMScheduler
from hub_server import TOKEN, Hub, run_code, running_hub
from saved_schedulers import save_pipeline, small_pipeline

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
    load = f"import time\ntime.sleep = lambda seconds: None  # between attempts\n{load}"
    whole, part, nothing = (run_client(hub, tmp_path / home, load)["gas"] for home in ("whole", "part", "nothing"))
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
from pathlib import Path
trained = GASScheduler.from_pretrained({str(tmp_path / "trained")!r})
trained.push_to_hub("user/pushed", token="{TOKEN}", private=True)
attempt("hidden", lambda: GASScheduler.from_pretrained("user/pushed"))
attempt("pushed", lambda: GASScheduler.from_pretrained("user/pushed", token="{TOKEN}"))
leftover = Path("saved/new.partial-" + 32 * "0")
leftover.mkdir(parents=True)
leftover.joinpath("4_steps.solver").write_bytes(b"of a killed writer")
trained.save_pretrained("saved", push_to_hub=True, repo_id="user/saved", token="{TOKEN}")
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
    files = hub.repositories["user/pushed"].files
    assert {"scheduler_config.json", "4_steps.solver", "6_steps.solver"} <= files.keys()
    assert not any("partial" in path for repository in hub.repositories.values() for path in repository.files)
    assert answers["replaced"] == as_seen(other)
    assert answers["refused"][0] == "HfHubHTTPError" and "user/third" not in hub.repositories


def test_a_repository_holds_what_was_pushed_last(hub, tmp_path):
    """Pushes in every way, over a scheduler of other step counts and settings and beside files of somebody else."""
    save_pipeline(tmp_path / "earlier", trained_scheduler(4, 6))
    as_older(tmp_path / "earlier" / "scheduler", tmp_path / "earlier" / "older")
    trained_scheduler(4, 6).save_pretrained(tmp_path / "earlier")
    (tmp_path / "earlier" / "README.md").write_text("by hand")
    trained_scheduler(4, seed=1).save_pretrained(tmp_path / "later")
    for way in ("push", "save", "part", "older", "pipeline", "saved_pipeline"):
        hub.add_folder(f"user/{way}", tmp_path / "earlier")
    answers = run_client(
        hub,
        tmp_path / "home",
        f"""
from saved_schedulers import small_pipeline
later = GASScheduler.from_pretrained("later")
to = {{"push_to_hub": True, "token": "{TOKEN}"}}
pipe = small_pipeline(later)
later.push_to_hub("user/push", token="{TOKEN}")
later.save_pretrained("save", repo_id="user/save", **to)
later.push_to_hub("user/part", subfolder="scheduler", token="{TOKEN}")
later.save_pretrained("older", repo_id="user/older", subfolder="older", **to)
pipe.push_to_hub("user/pipeline", token="{TOKEN}")
pipe.save_pretrained("saved_pipeline", repo_id="user/saved_pipeline", **to)
for way, subfolder in {{"push": "", "save": "", "part": "scheduler", "older": "older"}}.items():
    attempt(way, lambda: GASScheduler.from_pretrained(f"user/{{way}}", subfolder=subfolder))
for way in ("pipeline", "saved_pipeline"):
    attempt(way, lambda: DiffusionPipeline.from_pretrained(f"user/{{way}}").scheduler)
""",
    )
    assert answers == dict.fromkeys(answers, as_seen(trained_scheduler(4, seed=1))) and len(answers) == 6
    earlier = {
        "4_steps.solver",
        "6_steps.solver",
        "older/solver/4_steps.safetensors",
        "older/solver/6_steps.safetensors",
    }
    earlier |= {"scheduler/4_steps.solver", "scheduler/6_steps.solver"}
    gone = {"push": {"6_steps.solver"}, "save": {"6_steps.solver"}, "part": {"scheduler/6_steps.solver"}}
    gone["older"] = {"older/solver/4_steps.safetensors", "older/solver/6_steps.safetensors"}
    for way, names in gone.items():
        files = hub.repositories[f"user/{way}"].files
        assert earlier - files.keys() == names and b"by hand" in files["README.md"], way


# How weights are saved and asked for. Diffusers itself refuses the combinations that are left out.
WEIGHTS = {"safetensors": [{}], "bin": [{"safe_serialization": False}], "both": [{}, {"safe_serialization": False}]}
ASKED = {"default": {}, "no safetensors": {"use_safetensors": False}, "fp16": {"variant": "fp16"}}
MATRIX = [(kind, asked) for kind in WEIGHTS for asked in ASKED if (kind, asked) != ("safetensors", "no safetensors")]


def as_older(source: Path, target: Path) -> None:
    """Copies a scheduler's folder as earlier versions of this package have written it."""
    (target / "solver").mkdir(parents=True)
    config = json.loads((source / "scheduler_config.json").read_text())
    del config["_solver_steps"]
    (target / "scheduler_config.json").write_text(json.dumps(config))
    for path in source.glob("*.solver"):
        (target / "solver" / path.with_suffix(".safetensors").name).write_bytes(path.read_bytes())


def test_pipelines_load_their_solvers_however_weights_are_saved_and_asked_for(hub, tmp_path):
    scheduler = trained_scheduler(4, 5)
    pipe = small_pipeline(scheduler)
    for kind, asked in MATRIX:
        folder = tmp_path / f"{kind}-{asked}"
        variant = ASKED[asked].get("variant")
        for settings in WEIGHTS[kind]:
            pipe.save_pretrained(folder, variant=variant, **settings)
        hub.add_folder(f"user/{folder.name.replace(' ', '-')}", folder, private=True)
    for kind in ("safetensors", "bin"):
        folder = tmp_path / f"{kind}-older"
        pipe.save_pretrained(folder, **WEIGHTS[kind][0])
        as_older(folder / "scheduler", tmp_path / "older")
        shutil.rmtree(folder / "scheduler")
        (tmp_path / "older").rename(folder / "scheduler")
        hub.add_folder(f"user/{kind}-older", folder)
    answers = run_client(
        hub,
        tmp_path / "home",
        f"""
from pathlib import Path
import shutil

def pipeline(repo, cache, **settings):
    return DiffusionPipeline.from_pretrained(repo, cache_dir=cache, **settings).scheduler

for kind, asked in {MATRIX!r}:
    name, settings = f"{{kind}}-{{asked}}", {ASKED!r}[asked]
    attempt(f"{{name}}, folder", lambda: pipeline(name, None, **settings))
    repo, settings = "user/" + name.replace(" ", "-"), settings | {{"token": "{TOKEN}"}}
    attempt(f"{{name}}, fresh", lambda: pipeline(repo, f"fresh {{name}}", **settings))
    GASScheduler.from_pretrained(repo, subfolder="scheduler", cache_dir=f"cached {{name}}", token="{TOKEN}")
    attempt(f"{{name}}, scheduler cached", lambda: pipeline(repo, f"cached {{name}}", **settings))
    attempt(f"{{name}}, offline", lambda: pipeline(repo, f"cached {{name}}", local_files_only=True, **settings))
    attempt(f"{{name}}, revision", lambda: pipeline(repo, f"fresh {{name}}", revision="main", **settings))
    (lost,) = Path(f"fresh {{name}}").rglob("5_steps.solver")
    lost.unlink()
    attempt(f"{{name}}, part", lambda: pipeline(str(lost.parents[1]), None, local_files_only=True, **settings))
    attempt(f"{{name}}, again", lambda: pipeline(repo, f"fresh {{name}}", **settings))
    lost.unlink()
    attempt(f"{{name}}, lost", lambda: GASScheduler.from_pretrained(lost.parent, local_files_only=True))
for name in ("safetensors-older", "bin-older"):
    for where in ("fresh", "again"):
        attempt(f"{{name}}, {{where}}", lambda: pipeline(f"user/{{name}}", "older"))
    attempt(f"{{name}}, folder", lambda: pipeline(name, None))
""",
    )
    lost = {name: answer for name, answer in answers.items() if name.endswith((", part", ", lost"))}
    for name, (kind, message) in lost.items():
        assert kind == "OSError" and "5_steps.solver" in message and "\n" not in message, name
    loaded = {name: answer for name, answer in answers.items() if name not in lost}
    assert len(lost) == 2 * len(MATRIX) and len(loaded) == 6 * len(MATRIX) + 6
    assert {name for name, answer in loaded.items() if answer != as_seen(scheduler)} == set()


def test_files_of_an_earlier_scheduler_do_not_break_a_pipeline(hub, tmp_path):
    for variant in (None, "fp16"):
        pipe = small_pipeline(trained_scheduler(4))
        pipe.save_pretrained(tmp_path / "pipe", variant=variant)
        pipe.scheduler = DDIMScheduler.from_pretrained(
            tmp_path / "pipe", subfolder="scheduler"
        )  # with all that it reads
        pipe.save_pretrained(tmp_path / "pipe", variant=variant)
    assert (tmp_path / "pipe" / "scheduler" / "4_steps.solver").exists()
    hub.add_folder("user/pipe", tmp_path / "pipe")
    answers = run_client(
        hub,
        tmp_path / "home",
        """
for place in ("pipe", "user/pipe"):
    for settings in ({}, {"variant": "fp16"}):
        pipe = DiffusionPipeline.from_pretrained(place, **settings)
        answers[f"{place} {settings}"] = type(pipe.scheduler).__name__
        attempt(f"{place} {settings} from_config", lambda: GASScheduler.from_config(pipe.scheduler.config))
        attempt(f"{place} {settings} untrained", lambda: GASScheduler.from_pretrained(place, "scheduler"))
""",
    )
    untrained = ["GASScheduler", "squaredcos_cap_v2", {}]
    assert len(answers) == 12 and all(answer in ("DDIMScheduler", untrained) for answer in answers.values()), answers
