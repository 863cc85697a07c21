"""Writers that are killed, that meet in one folder, or whose disk is full: what is there is whole, old or new."""

import os
import random
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import RLock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from PIL import Image
from saved_schedulers import same_tensors, trained_scheduler
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.commands.convert import Conversion
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.papers.evaluation import measurement
from diffusers_gas.papers.evaluation.measurement import Measurement, Sampler
from diffusers_gas.pipelines import teacher
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache
from diffusers_gas.presentation.model_card import write_model_card
from diffusers_gas.utils.files import load_state, lock_file_of, locked, save_state


pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of forks beside PyTorch's threads
]

# Longer than anything takes.
TIMEOUT = 600


class Writes:
    """Something that is written again and again in two versions.

    `save` writes one; `check` asserts that all that is found is of one or the other, and whole.
    """

    def __init__(self, folder: Path, digits: DDPMPipeline):
        self.folder, self.pipe = folder, digits

    def save(self, version: int) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


class Solvers(Writes):
    """Of two step counts each, one of which both have."""

    def __init__(self, *args):
        super().__init__(*args)
        self.versions = [trained_scheduler(4, 6 + 2 * seed, seed=seed) for seed in range(2)]

    def save(self, version: int) -> None:
        self.versions[version].save_pretrained(self.folder)

    def check(self) -> None:
        loaded = GASScheduler.from_pretrained(self.folder)
        # One that is killed while it puts its files in place may leave a step count of the other.
        assert {4} < loaded.solvers.keys() <= {4, 6, 8}
        for n, solver in loaded.solvers.items():
            assert any(same_tensors(solver, other.solvers[n]) for other in self.versions if n in other.solvers)


class Plans(Writes):
    def __init__(self, *args):
        super().__init__(*args)
        plan = SDMScheduler().plan_for(7)
        self.plans = [plan, replace(plan, sigmas=plan.sigmas * 0.9)]

    def save(self, version: int) -> None:
        scheduler = SDMScheduler()
        scheduler.add_plan(self.plans[version])
        scheduler.save_pretrained(self.folder)

    def check(self) -> None:
        found = SDMScheduler.from_pretrained(self.folder).plans[7].sigmas
        assert any(torch.equal(found, plan.sigmas) for plan in self.plans)


class SolversOfTwoNetworks(Writes):
    """The config changes with the solvers, and neither goes with the other's."""

    def __init__(self, *args):
        super().__init__(*args)
        self.versions = [trained_scheduler(4, 6, beta_end=beta_end) for beta_end in (0.012, 0.02)]

    def save(self, version: int) -> None:
        self.versions[version].save_pretrained(self.folder)

    def check(self) -> None:
        try:
            assert sorted(GASScheduler.from_pretrained(self.folder).solvers) == [4, 6]
        except ValueError as error:  # killed while it put the files in place, one after the other
            assert "was trained for a config with {'beta_end'" in str(error)


class ModelCards(Writes):
    def save(self, version: int) -> None:
        write_model_card(trained_scheduler(4), self.folder, "user/some-gas", base_model=f"user/model-{version}")

    def check(self) -> None:
        text = (self.folder / "README.md").read_text(encoding="utf-8")
        assert text.startswith("---\n") and text.endswith("\n```\n") and ("model-0" in text) != ("model-1" in text)


class TrainingStates(Writes):
    def save(self, version: int) -> None:
        save_state({"x": torch.full((20_000,), float(version))}, self.folder / "state.pt")

    def check(self) -> None:
        assert load_state(self.folder / "state.pt")["x"].unique().tolist() in ([0], [1])


class TeacherSamples(Writes):
    """The cache of train_gas.py."""

    def save(self, version: int) -> None:
        for path in self.folder.glob("samples*.safetensors"):
            path.unlink()
        self.collect(version)

    def collect(self, version: int) -> None:
        cache = TeacherCache(self.folder, "digits", DDIMScheduler.from_config(self.pipe.scheduler.config), 2)
        samples = cache.collect(self.pipe, SampleInputs.create(version, 70), 70, "")
        assert samples.final[:, 0, 0, 0].tolist() == list(range(version, version + 70))

    def check(self) -> None:
        self.collect(0)
        self.collect(1)


class Measurements(Writes):
    """The cache of evaluate.py, with images."""

    def save(self, version: int) -> None:
        for path in (*self.folder.rglob("*.safetensors"), *self.folder.rglob("*.png")):
            path.unlink()
        self.measure(version)

    def measure(self, version: int) -> None:
        folders, inputs = (self.folder / "shards", self.folder / "images"), SampleInputs.create(version, 3)
        options = {"images_folder": folders[1], "features": lambda images: images[:, 0, 0]}
        measuring = Measurement(folders[0], self.pipe, "digits", inputs, 3, **options)
        features = measuring.measure(Sampler("ddim", self.pipe.scheduler, 2), *measuring.shards)["features"]
        assert (features[:, 0] * 10).round().tolist() == [version, version + 1, version + 2]

    def check(self) -> None:
        assert all(np.asarray(Image.open(path)).shape == (8, 8) for path in self.folder.rglob("*.png"))
        self.measure(0)
        self.measure(1)


class Conversions(Writes):
    """The folders that converters write."""

    def __init__(self, *args):
        super().__init__(*args)
        self.network = R3GANDiscriminator.for_samples((1, 8, 8), width=16)

    def save(self, version: int) -> None:
        if (self.folder / "converted").exists():
            (self.folder / "converted").rename(self.folder / f"converted-{time.monotonic_ns()}")
        Conversion(output_dir=str(self.folder / "converted")).write(self.network)

    def check(self) -> None:
        for converted in self.folder.iterdir():
            if "partial" not in converted.name:
                R3GANDiscriminator.from_pretrained(converted)
                shutil.rmtree(converted)


KINDS = [
    *(Solvers, SolversOfTwoNetworks, Plans, ModelCards, TrainingStates, TeacherSamples, Measurements, Conversions),
]


@pytest.fixture
def quick_sampling(monkeypatch):
    """Samples that are their seeds, without a network: tests of writers write."""

    def numbers(generators: list[torch.Generator]) -> torch.Tensor:
        return torch.tensor([float(generator.initial_seed()) for generator in generators])[:, None, None, None]

    def sample_latents(*_, generator, **__):
        states = numbers(generator).expand(-1, 1, 8, 8)
        return states, states

    def sample_with_states(pipe, scheduler, num_inference_steps, inputs, *, batch_size):
        states = torch.tensor([float(seed) for seed in inputs.seeds])[:, None, None, None].expand(-1, 1, 8, 8)
        return states / 10, states

    monkeypatch.setattr(teacher, "sample_latents", sample_latents)
    monkeypatch.setattr(measurement, "sample_with_states", sample_with_states)


@contextmanager
def writer(writes: Writes, versions: tuple[int, ...]) -> Iterator[Callable[[], None]]:
    """A child process that writes again and again, and a function that waits for the end of a write; killed in the end."""
    parent, (reading, writing) = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        tqdm.set_lock(RLock())  # of its own: one that processes share would be held for good by one that was killed
        torch.set_num_threads(1)  # the parent's OpenMP threads are not in the child, which would wait for them
        with suppress(BaseException):
            while os.getppid() == parent:
                for version in versions:
                    writes.save(version)
                    os.write(writing, b".")
        os._exit(1)
    os.close(writing)

    def wait() -> None:
        assert select.select([reading], [], [], TIMEOUT)[0] and os.read(reading, 1), "the writer has ended by itself"

    try:
        yield wait
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_writers_leave_what_can_be_loaded(kind, tmp_path, digits, quick_sampling):
    folder = tmp_path / "folder"
    folder.mkdir()
    writes, rng = kind(folder, digits), random.Random(0)
    writes.save(0)
    started = time.monotonic()
    writes.save(1)
    duration = time.monotonic() - started
    for _ in range(6):
        with writer(writes, (0, 1)) as wait:
            wait()
            time.sleep(rng.uniform(0, 2 * duration))
        writes.check()
    # Leftovers go when nobody can be at work on them.
    for path in folder.rglob("*.partial-*"):
        os.utime(path, (0, 0))
    writes.save(0)
    writes.check()
    assert not list(folder.rglob("*.partial-*"))


@pytest.mark.parametrize("kind", [Solvers, SolversOfTwoNetworks, Plans])
def test_two_writers_and_a_reader_share_a_folder(kind, tmp_path, digits):
    """One that loads finds all that one of them saved, and nothing else."""
    writes = kind(tmp_path, digits)
    writes.save(0)
    with writer(writes, (0,)) as first, writer(writes, (1,)) as second:
        for _ in range(8):
            scheduler_class = SDMScheduler if kind is Plans else GASScheduler
            loaded = scheduler_class.from_pretrained(tmp_path)
            if kind is Solvers:
                assert sorted(loaded.solvers) in ([4, 6], [4, 8])
            first()
            second()
            writes.check()


def test_files_are_on_the_disk_before_they_replace_others(tmp_path, monkeypatch):
    """After a power failure a name must not stand for an empty file."""
    synced, replace_file = set(), os.replace

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)

    def check_and_replace(source: Path, target: Path) -> None:
        assert Path(source).stat().st_ino in synced
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", check_and_replace)
    trained_scheduler(4).save_pretrained(tmp_path)
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.iterdir())} <= synced
    assert list(GASScheduler.from_pretrained(tmp_path).solvers) == [4]


def test_a_lock_ends_with_its_process(tmp_path):
    """Killed or not; a file of its own that says who has it would stay."""
    lock_file = tmp_path / "some" / "lock"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(lock_file):
            os.write(writing, b".")
            time.sleep(TIMEOUT)
        os._exit(1)
    assert select.select([reading], [], [], TIMEOUT)[0]
    with pytest.raises(BlockingIOError), locked(lock_file, wait=False):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(lock_file, wait=False):
        pass


def test_an_error_inside_a_lock_is_passed_on_as_it_is(tmp_path):
    """Also if there can be no lock: the error must not appear as a consequence of that."""
    (tmp_path / "file").touch()
    for lock_file in (tmp_path / "lock", tmp_path / "file" / "lock"):
        with pytest.raises(OSError, match="own error") as caught, locked(lock_file):
            raise OSError("own error")
        assert caught.value.__context__ is None
        with locked(lock_file, wait=False):  # it was released
            pass


def test_reading_and_writing_lock_a_folder_without_a_file_in_it(tmp_path):
    """By whatever path it is reached, so that a reader finds the files of one writer."""
    folder, link = tmp_path / "folder", tmp_path / "link"
    trained_scheduler(4).save_pretrained(folder)
    link.symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    with ThreadPoolExecutor() as pool, locked(lock_file_of(folder)):
        jobs = [
            pool.submit(GASScheduler.from_pretrained, link),
            pool.submit(trained_scheduler(6).save_pretrained, link),
        ]
        assert not wait(jobs, timeout=0.2).done
    # The writer may come first.
    assert jobs[0].result().solvers.keys() <= {4, 6} and jobs[1].result() is None
    assert list(GASScheduler.from_pretrained(folder).solvers) == [6]
    assert sorted(path for path in tmp_path.rglob("*") if path not in before) == [folder / "6_steps.solver"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a disk is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "kind, pages_left",
    [
        (Solvers, 0),
        (SolversOfTwoNetworks, 1),
        (SolversOfTwoNetworks, 2),
        (Plans, 1),
        (ModelCards, 0),
        (TrainingStates, 3),
    ],
)
def test_a_full_disk_keeps_what_there_was(kind, pages_left, small_disk, digits):
    """Full at the first file, or at another, when those before are written."""
    folder, filler = small_disk / "folder", small_disk / "filler"
    folder.mkdir()
    writes = kind(folder, digits)
    writes.save(0)
    before = contents(folder)
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(file.tell() - 4096 * pages_left)
    with pytest.raises((OSError, ValueError), match=r"/folder/.* could not be written \(.*(space|pos)"):
        writes.save(1)
    assert contents(folder) == before
    writes.check()
    filler.unlink()
    writes.save(1)
    assert contents(folder) != before
    writes.check()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
