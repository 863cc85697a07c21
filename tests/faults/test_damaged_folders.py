"""Scheduler folders with something wrong in them: refused with a name, or as good as before. Never a silent wrong solver."""

import json
import math
import os
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_schedulers import planned_scheduler, trained_scheduler
from torch import Tensor

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.schedulers.configs import METADATA_KEY, STEP_COUNTS
from diffusers_gas.schedulers.scheduling_utils import ODEScheduler
from diffusers_gas.utils.files import save_safetensors


CONFIG = "scheduler_config.json"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EDM = {"sigma_data": 0.5, "sigma_max": 14.0}


# Learned ones, and such that only have their config.
SCHEDULERS: dict[str, tuple[Callable[[], ODEScheduler], tuple[int, ...]]] = {
    "gas": (lambda: trained_scheduler(3, 4), (3, 4)),
    "gas-flow": (lambda: trained_scheduler(4, **FLOW), (4,)),
    "sdm": (lambda: planned_scheduler(6, 7), (6, 7)),
    "sdm-edm": (lambda: planned_scheduler(7, solver="dpmsolver++", **EDM), (7,)),
    "untrained-gas": (lambda: GASScheduler(shift_terminal=0.1), (5,)),
    "untrained-gas-flow": (lambda: GASScheduler(shift_terminal=0.1, **FLOW), (5,)),
    "untrained-sdm": (SDMScheduler, (7,)),
    "untrained-sdm-edm": (lambda: SDMScheduler(**EDM), (7,)),
}

Damage = Callable[[Path], Any]


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without Diffusers' warning for every setting that it does not know."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


class Mutation(NamedTuple):
    """A way to damage a folder.

    `names`: of which a refusal names at least one. `may_differ`: whether the folder may hold another solver now, or none, as
    good as the one before for all that anybody can tell.
    """

    label: str
    damage: Damage
    names: tuple[str, ...]
    may_differ: bool = False
    of_config: bool = False


def sample(scheduler: ODEScheduler, num_inference_steps: int) -> Tensor:
    """Sampled with a bounded network."""
    scheduler.set_timesteps(num_inference_steps)
    x = torch.linspace(-2, 2, 6).reshape(2, 3) * scheduler.init_noise_sigma
    for k, t in enumerate(scheduler.timesteps):
        output = torch.sin(scheduler.scale_model_input(x, t) + k + 1e-3 * t)
        x = scheduler.step(output, t, x).prev_sample
    return x


# Bytes


def damaged_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Some bytes with a random fault."""
    position = rng.randrange(len(content))
    before, byte, after = content[:position], content[position], content[position + 1 :]
    some = rng.randbytes(rng.randint(1, 40))
    kind = rng.choice(["bit"] * 6 + ["byte"] * 4 + ["cut", "append", "insert", "delete", "zeros", "repeat"])
    match kind:
        case "bit":
            changed = before + bytes([byte ^ 1 << rng.randrange(8)]) + after
        case "byte":
            changed = before + bytes([rng.randrange(256)]) + after
        case "cut":
            changed = before
        case "append":
            changed = content + some
        case "insert":
            changed = content[:position] + some + content[position:]
        case "delete":
            changed = before + content[position + len(some) :]
        case "zeros":
            changed = (before + bytes(len(some)) + content[position + len(some) :])[: len(content)]
        case "repeat":
            changed = content + content
    return f"{kind} at {position}", changed


def byte_mutations(folder: Path, rng: random.Random, count: int) -> Iterator[Mutation]:
    """Half of them in headers and configs, which are the smaller part."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(folder)
        header = len(content)
        if path.suffix == ".solver":
            header = 8 + int.from_bytes(content[:8], "little")
        for i in range(count):
            part = content[:header] if i % 2 else content
            label, changed = damaged_bytes(part, rng)
            changed += content[len(part) :]
            yield Mutation(
                f"{name}: {label} #{i}",
                lambda folder, name=name, changed=changed: (folder / name).write_bytes(changed),
                ANYTHING if path.name == CONFIG else (path.name,),
                of_config=path.name == CONFIG,
            )


# Files


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    remove(path)
    path.symlink_to(path.name)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    remove(path)
    path.symlink_to("nowhere")


FILE_FAULTS: dict[str, Damage] = {
    "missing": remove,
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes("größer".encode("latin-1")),
    "UTF-16": lambda path: path.write_bytes("{}".encode("utf-16")),
    "git-lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "directory": directory,
    "symlink loop": loop,
    "dangling symlink": dangling,
    "fifo": fifo,
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


def file_mutations(folder: Path) -> Iterator[Mutation]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    solvers = [path for path in paths if path.suffix == ".solver"]
    for path in paths:
        name = path.relative_to(folder)
        for label, damage in FILE_FAULTS.items():
            yield Mutation(
                f"{name}: {label}",
                lambda folder, name=name, damage=damage: damage(folder / name),
                (path.name, "No solver for", "No plan for"),
            )
    if not solvers:
        return
    first = solvers[0].relative_to(folder)
    n = int(first.name.split("_")[0])
    for other in (8, n + 1, 1, 0, 10**30):
        named = first.with_name(f"{other}_steps.solver")
        yield Mutation(
            f"{first.name} as {named.name}",
            lambda folder, named=named: (folder / first).replace(folder / named),
            (first.name, named.name),
        )
        yield Mutation(
            f"{first.name} also as {named.name}",
            lambda folder, named=named: shutil.copy(folder / first, folder / named),
            (named.name,),
        )
    for named in (f"0{n}_steps.solver", "٣_steps.solver", f"{n}_steps.SOLVER", f"{n}_steps.partial-1"):
        yield Mutation(f"a bad {named}", lambda folder, named=named: (folder / named).write_bytes(b"x"), (named,))
    if len(solvers) > 1:
        second = solvers[1].relative_to(folder)

        def swap(folder: Path) -> None:
            (folder / first).rename(folder / "third")
            (folder / second).rename(folder / first)
            (folder / "third").rename(folder / second)

        yield Mutation("swapped", swap, (first.name, second.name))


# Contents of solver files, as another program would write them: without a checksum


def rewritten(
    name: Path,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    metadata: Callable[[dict[str, Any]], dict[str, str]] | None = None,
) -> Damage:
    """Writes a solver file anew with changed tensors, or with metadata made from its record."""

    def damage(folder: Path) -> None:
        path = folder / name
        content = load_file(path)
        with safe_open(path, framework="pt") as file:
            record = file.metadata()[METADATA_KEY]
        if tensors is not None:
            tensors(content)
        written = {METADATA_KEY: record} if metadata is None else metadata(json.loads(record))
        save_file(content, path, written)

    return damage


NUMBERS = (math.nan, math.inf, -math.inf, 1e308, -1e308, 1e30, -1e30, 1e9, 1e3, -1e3, 1e-300, -1.0, 0.0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64)
DEEP = 10_000


def tensor_mutations(folder: Path, rng: random.Random) -> Iterator[Mutation]:
    for path in sorted(folder.rglob("*.safetensors")):
        file = path.relative_to(folder)
        for name, value in load_file(path).items():
            changes: dict[str, Tensor | None] = {f"dtype {dtype}": value.to(dtype) for dtype in DTYPES}
            changes |= {
                "missing": None,
                "empty": value.new_zeros(0),
                "scalar": value.sum(),
                "one more dimension": value[None].clone(),
                "longer": torch.cat([value.flatten(), value.flatten()]),
                "shorter": value.flatten()[:-1].clone(),
                "reversed": value.flatten().flip(0).reshape(value.shape),
                "float64 of another shape": torch.zeros(3, 3, dtype=torch.float64),
            }
            numbers = NUMBERS if value.is_floating_point() else (-(2**63), -1, 0, 1, 2, 3, 5, 10**6, 2**63 - 1)
            for number in numbers:
                changes[f"all {number}"] = torch.full_like(value, number)
                if value.numel():
                    one = value.clone()
                    one.view(-1)[rng.randrange(one.numel())] = number
                    changes[f"one {number}"] = one
            for label, changed in changes.items():

                def change(tensors: dict[str, Tensor], name=name, changed=changed) -> None:
                    tensors.pop(name) if changed is None else tensors.update({name: changed})

                yield Mutation(f"{file.name}, {name}: {label}", rewritten(file, change), (file.name,), may_differ=True)
        extra = rewritten(file, lambda tensors: tensors.update(surprise=torch.zeros(2)))
        yield Mutation(f"{file.name}: an extra tensor", extra, (file.name,))


JUNK = (
    None,
    True,
    False,
    -1,
    0,
    0.5,
    7,
    10**25,
    -1e308,
    1e308,
    math.nan,
    math.inf,
    "",
    "text",
    "7",
    [],
    [1],
    ["x"],
    {},
)
JUNK = (*JUNK, {"x": {}}, [[[]]])


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where there is something in a nested record."""
    yield at
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*at, name))


def replaced(value: Any, at: tuple, junk: Any) -> Any:
    return junk if not at else value | {at[0]: replaced(value[at[0]], at[1:], junk)}


def record_mutations(folder: Path, rng: random.Random) -> Iterator[Mutation]:
    for path in sorted(folder.rglob("*.safetensors"))[:1]:
        file = path.relative_to(folder)
        with safe_open(path, framework="pt") as opened:
            record = json.loads(opened.metadata()[METADATA_KEY])
        record["provenance"]["pipeline_arguments"] = {"guidance_scale": 3.0}
        for at in places(record):
            for junk in rng.sample(JUNK, 8):
                text = json.dumps(replaced(record, at, junk))
                yield Mutation(
                    f"{file.name}, record{list(at)} = {junk!r}",
                    rewritten(file, metadata=lambda _, text=text: {METADATA_KEY: text}),
                    (file.name,),
                    may_differ=True,
                )
        texts = {
            "deep": "[" * DEEP + "]" * DEEP,
            "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
            "a huge number": '{"solver": 1' + "0" * 5000 + "}",
            "cut": json.dumps(record)[:-5],
            "with NaN": json.dumps(record).replace("0.001", "NaN"),
            "twice": json.dumps(record) * 2,
            "empty": "",
            "null": "null",
            "doubled keys": json.dumps(record)[:-1] + ', "solver": {}, "plan": {}}',
        }
        for label, text in texts.items():
            damage = rewritten(file, metadata=lambda _, text=text: {METADATA_KEY: text})
            yield Mutation(f"{file.name}, record: {label}", damage, (file.name,))
        yield Mutation(f"{file.name}: no record", rewritten(file, metadata=lambda _: {"a": "b"}), (file.name,))
        for length in (0, 1, 7, 2**20, 2**31, 2**32 + 1, 2**40, 2**63, 2**64 - 1):

            def damage(folder: Path, file=file, length=length) -> None:
                content = (folder / file).read_bytes()
                (folder / file).write_bytes(struct.pack("<Q", length) + content[8:])

            yield Mutation(f"{file.name}: header of {length} bytes", damage, (file.name,))


# Values of the config

# A solver file that a config contradicts is named, too.
ANYTHING = (
    CONFIG,
    "_steps.solver",
    *sorted({f"`{name}`" for make, _ in SCHEDULERS.values() for name in make().config}),
)
VALUES = (
    *JUNK,
    -0.5,
    2,
    3.0,
    1e-300,
    1e30,
    10**12,
    "epsilon",
    {"a": [None]},
    [0.1, 0.2],
    [0.2, 0.1] * 500,
    [math.nan] * 9,
)


def config_mutations(folder: Path, rng: random.Random, count: int) -> Iterator[Mutation]:
    config = json.loads((folder / CONFIG).read_text())

    def written(text: str) -> Damage:
        return lambda folder: (folder / CONFIG).write_text(text)

    for name in config:
        for value in rng.sample(VALUES, count):
            text = json.dumps(config | {name: value})
            names = (f"`{name}`", f"'{name}'", *ANYTHING)
            untrained = (name, value) == (STEP_COUNTS, [])
            yield Mutation(f"{name} = {value!r:.60}", written(text), names, untrained, of_config=True)
        without = {other: value for other, value in config.items() if other != name}
        yield Mutation(f"no {name}", written(json.dumps(without)), ANYTHING, of_config=True)
    texts = {
        "a list": "[]",
        "null": "null",
        "a number": "7",
        "a string": '"text"',
        "deep": "[" * 100_000 + "]" * 100_000,
        "deep object": json.dumps(config)[:-1] + ', "tau": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}",
        "a huge number": json.dumps(config)[:-1] + ', "t_end": 1' + "0" * 5000 + "}",
        "a number past floats": json.dumps(config)[:-1] + ', "t_end": 1' + "0" * 400 + "}",
        "trailing comma": json.dumps(config)[:-1] + ",}",
        "with a BOM": "\ufeff" + json.dumps(config),
    }
    for label, text in texts.items():
        yield Mutation(f"{CONFIG}: {label}", written(text), ANYTHING)
    doubled = json.dumps(config)[:-1] + f', "t_end": {config["t_end"]}}}'
    yield Mutation(f"{CONFIG}: doubled keys", written(doubled), (CONFIG,))
    for name in ("_class_name", "_use_default_values", "_diffusers_version", "unknown"):
        for value in (
            *JUNK,
            "EDMEulerScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "CosineDPMSolverMultistepScheduler",
        ):
            text = json.dumps(config | {name: value})
            of_another = name == "_class_name" and str(value).endswith("Scheduler")
            yield Mutation(f"{name} = {value!r}", written(text), (f"`{name}`", *ANYTHING), of_another, of_config=True)


def mutations(name: str, folder: Path) -> list[Mutation]:
    """All faults of files, and some of the others."""
    rng = random.Random(name)
    learned = not name.startswith("untrained")
    many = [*byte_mutations(folder, rng, 60), *config_mutations(folder, rng, 6)]
    many += [*tensor_mutations(folder, rng), *record_mutations(folder, rng)]
    return [*file_mutations(folder), *rng.sample(many, 200 if learned else 80)]


def outcome(mutation: Mutation, folder: Path, scheduler: ODEScheduler, expected: dict[int, Tensor]) -> str:
    """What became of a damaged folder, or what is wrong with that."""
    try:
        loaded = type(scheduler).from_pretrained(folder)
        found = {n: sample(loaded, n) for n in expected}
    except (ValueError, OSError) as error:
        named = any(name in str(error) for name in mutation.names)
        return "refused" if named and len(str(error)) < 2000 else f"refused with {str(error)[:300]!r}"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    if not all(x.isfinite().all() for x in found.values()):
        return "samples that are not finite"
    if all(torch.equal(found[n], expected[n]) for n in expected):
        return "loaded as it was"
    legitimate = mutation.may_differ or (mutation.of_config and loaded.config != scheduler.config)
    return "loaded as another" if legitimate else "a silent wrong solver"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_damaged_folders_are_refused_by_name_or_load_as_they_were(name, tmp_path, quiet):
    make, step_counts = SCHEDULERS[name]
    scheduler, whole = make(), tmp_path / "whole"
    scheduler.save_pretrained(whole)
    expected = {n: sample(scheduler, n) for n in step_counts}
    outcomes: Counter[str] = Counter()
    wrong = []
    for i, mutation in enumerate(mutations(name, whole)):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        mutation.damage(folder)
        found = outcome(mutation, folder, scheduler, expected)
        outcomes[found] += 1
        if found not in ("refused", "loaded as it was", "loaded as another"):
            wrong.append(f"{mutation.label}: {found}")
    assert not wrong, "\n".join(wrong)
    total, learned = outcomes.total(), not name.startswith("untrained")
    assert total >= (210 if learned else 85)
    assert outcomes["refused"] > total / 2 and outcomes["loaded as it was"] > total / 20, outcomes


def test_a_loaded_solver_does_not_change_with_its_file(tmp_path):
    """A copy over the file, or half of one, while it is in use."""
    for scheduler in (trained_scheduler(4), planned_scheduler(6)):
        folder = tmp_path / type(scheduler).__name__
        scheduler.save_pretrained(folder)
        loaded = type(scheduler).from_pretrained(folder)
        (file,) = folder.glob("*.solver")
        n = int(file.name.split("_")[0])
        with file.open("r+b") as opened:
            opened.write(b"\xff" * file.stat().st_size)
        assert torch.equal(sample(loaded, n), sample(scheduler, n))
        os.truncate(file, 1)
        assert torch.equal(sample(loaded, n), sample(scheduler, n))


CLAIMS = {
    "order": (GASScheduler, {"timestep_offsets": torch.zeros(9000, dtype=torch.float64)}),
    "steps": (GASScheduler, {"timestep_offsets": torch.zeros(10**6, dtype=torch.float64)}),
    "levels": (
        SDMScheduler,
        {"sigmas": torch.linspace(80, 0, 20_001, dtype=torch.float64), "switch_index": torch.tensor(1)},
    ),
    "bytes": (GASScheduler, {"timestep_offsets": torch.zeros(2**22 + 1, dtype=torch.float64)}),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_small_file_cannot_ask_for_much_memory(claim, tmp_path, monkeypatch):
    """A solver's table has the square of its steps, which need not be in the file."""
    kind, tensors = CLAIMS[claim]
    n = max(tensor.numel() for tensor in tensors.values())
    kind().save_pretrained(tmp_path)
    solver = {"num_inference_steps": n, "order": n if claim == "order" else 1, "t_start": 1.0, "t_end": 1e-3}
    record = {
        "solver": solver,
        "plan": {"solver": "dpmsolver++"},
        "provenance": {},
        "scheduler": kind()._solver_config(),
    }
    save_safetensors(tensors, tmp_path / f"{n}_steps.solver", {METADATA_KEY: json.dumps(record)})
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {STEP_COUNTS: [n]}))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, hard))
    try:
        with pytest.raises(ValueError, match=rf"{n}_steps\.solver"):
            kind.from_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_what_a_folder_cannot_tell_is_written_into_its_files(tmp_path):
    """One bit of one number: all that says so is the checksum, which files of other programs need not have."""
    trained_scheduler(4).save_pretrained(tmp_path)
    file = tmp_path / "4_steps.solver"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match=r"4_steps\.solver is damaged: its content does not match its checksum"):
        GASScheduler.from_pretrained(tmp_path)
    file.write_bytes(whole)
    rewritten(file.relative_to(tmp_path))(tmp_path)
    with safe_open(file, framework="pt") as opened:
        assert list(opened.metadata()) == [METADATA_KEY]
    assert torch.equal(sample(GASScheduler.from_pretrained(tmp_path), 4), sample(trained_scheduler(4), 4))
