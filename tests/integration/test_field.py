"""The matrix of all pipeline classes: its records are complete, its pages up to date, and its checks can fail."""

import json

import diffusers
import pytest
import transformers
from conftest import ROOT
from field import pipelines_page

from diffusers_gas import GASScheduler, SDMScheduler


RESULTS = json.loads((ROOT / "tests" / "field" / "field_matrix.json").read_text(encoding="utf-8"))
INSTALLED = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
# The components are those of the recorded versions.
of_recorded_versions = pytest.mark.skipif(
    any(RESULTS["versions"][name] != version for name, version in INSTALLED.items()),
    reason=f"the matrix was recorded with {RESULTS['versions']}",
)
# One for each way in which a class is built: from prompts or embeddings, with images, videos or sounds, of parts, refused.
SAMPLED = (
    "AuraFlowPipeline",
    "CogView4Pipeline",
    "Cosmos3OmniPipeline",
    "Flux2KleinInpaintPipeline",
    "KandinskyV22CombinedPipeline",
    "OvisImagePipeline",
    "StableAudioPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "WanImageToVideoPipeline",
)
REFUSED = ("ConsistencyModelPipeline", "FluxPriorReduxPipeline", "KandinskyPriorPipeline")


def test_pages_are_up_to_date():
    text = pipelines_page.PAGE.read_text(encoding="utf-8")
    assert pipelines_page.page(text) == text
    for name in RESULTS["classes"]:
        assert f"`{name}`" in text


def test_another_result_changes_the_page():
    name = SAMPLED[0]
    found = RESULTS["classes"][name]
    other = found | {"SDMScheduler": {"failure": {"error": "TypeError", "message": "a message", "where": ""}}}
    before, changed = RESULTS, {**RESULTS, "classes": RESULTS["classes"] | {name: other}}
    assert "`TypeError`: a message" in pipelines_page.table(changed)
    assert pipelines_page.numbers(changed)["works"] == pipelines_page.numbers(before)["works"] - 1
    slightly_off = found | {"SDMScheduler": found["SDMScheduler"] | {"first_order": 0.01}}
    assert pipelines_page.outcome(found) == "works" and pipelines_page.outcome(slightly_off) == "failing"


def test_a_page_without_a_place_is_an_error():
    with pytest.raises(ValueError, match="no lines"):
        pipelines_page.page("# Which pipelines work\n")


def test_refused_classes_were_not_evaluated():
    refused = [
        found[name]
        for found in RESULTS["classes"].values()
        for name in pipelines_page.SCHEDULERS
        if "refused" in found.get(name, {})
    ]
    assert refused and all(result["refused"] and result["evaluations"] == 0 for result in refused)


@of_recorded_versions
def test_every_exported_class_is_recorded():
    from field.field_matrix import exported

    scope = exported()
    # Packages that are installed here may bring classes that were not in scope.
    assert set(scope["classes"]) - RESULTS["missing_packages"].keys() == RESULTS["classes"].keys()
    assert set(scope["deprecated"]) - RESULTS["missing_packages"].keys() == set(RESULTS["deprecated"])
    assert scope["missing_packages"].keys() <= RESULTS["missing_packages"].keys()


@of_recorded_versions
@pytest.mark.parametrize("name", SAMPLED)
def test_a_class_samples_as_recorded(name):
    from field.examine import examine

    found = examine(getattr(diffusers, name))
    assert pipelines_page.outcome(found) == "works"
    recorded = RESULTS["classes"][name]
    for scheduler in pipelines_page.SCHEDULERS:
        assert found[scheduler]["steps_and_evaluations"] == recorded[scheduler]["steps_and_evaluations"]
        assert found[scheduler]["first_order"] < pipelines_page.EQUAL
    assert pipelines_page.row(name, found) == pipelines_page.row(name, recorded)


@of_recorded_versions
@pytest.mark.parametrize("name", REFUSED)
def test_a_class_is_refused_as_recorded(name):
    from field.examine import examine

    found, recorded = examine(getattr(diffusers, name)), RESULTS["classes"][name]
    assert pipelines_page.outcome(found) == "refused"
    for scheduler in pipelines_page.SCHEDULERS:
        assert found[scheduler] == recorded[scheduler]


@of_recorded_versions
@pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])
def test_an_evaluation_more_is_found(scheduler_class, monkeypatch):
    from field.examine import examine

    own = scheduler_class.set_timesteps

    def one_more(self, num_inference_steps=None, *args, **kwargs):
        own(self, None if num_inference_steps is None else num_inference_steps + 1, *args, **kwargs)

    monkeypatch.setattr(scheduler_class, "set_timesteps", one_more)
    found = examine(diffusers.DDPMPipeline)[scheduler_class.__name__]
    assert "Not as many evaluations as Diffusers" in found["failure"]["message"]


@of_recorded_versions
@pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])
def test_another_step_than_diffusers_is_found(scheduler_class, monkeypatch):
    from field.examine import examine

    own = scheduler_class._next_state
    monkeypatch.setattr(scheduler_class, "_next_state", lambda self, *args: 1.01 * own(self, *args))
    found = examine(diffusers.AuraFlowPipeline)
    assert found[scheduler_class.__name__]["sampled"]
    assert pipelines_page.first_order(found) == "no" and pipelines_page.outcome(found) == "failing"
