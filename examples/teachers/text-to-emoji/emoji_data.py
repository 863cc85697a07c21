"""The data of the emoji teacher and of its LoRA: pictures of 64x64 pixels, with the names that serve as prompts.

They come from the npm packages emoji-datasource-google and emoji-datasource-twitter, version 16.0.0. Google's pictures are those of
Noto Emoji, license Apache-2.0. Twitter's are those of Twemoji, license CC-BY 4.0.
"""

import json
import math
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


GOOGLE, TWITTER = "google", "twitter"
VERSION = "16.0.0"
IMAGE_SIZE = 64
MAX_TOKENS = 16
HELD_OUT = Path(__file__).resolve().parent / "held_out.txt"
SUBCATEGORIES = (
    *(f"face-{kind}" for kind in ("smiling", "affection", "tongue", "hand", "neutral-skeptical", "sleepy", "unwell")),
    *(f"face-{kind}" for kind in ("hat", "glasses", "concerned", "negative", "costume")),
    *("cat-face", "monkey-face", "heart"),
    *(f"animal-{kind}" for kind in ("mammal", "bird", "amphibian", "reptile", "marine", "bug")),
    *("plant-flower", "plant-other"),
    *(f"food-{kind}" for kind in ("fruit", "vegetable", "prepared", "sweet")),
    *("drink", "transport-ground", "transport-air", "transport-water", "musical-instrument"),
)
# Names of Unicode that do not say what the picture shows.
RENAMED = {
    "heavy black heart": "red heart",
    "white smiling face": "smiling face",
    "ear of maize": "ear of corn",
    "aubergine": "eggplant",
    "automobile": "red car",
    "recreational vehicle": "blue car",
    "extraterrestrial alien": "alien",
    "cooking": "fried egg in a pan",
}


@dataclass(frozen=True)
class Emoji:
    """A picture and what it is called.

    Attributes:
        name: Its prompt.
        prompts: The name, and its short name where no other emoji is called so.
        picture: The file.
        trained: Whether the teacher is trained on it.
    """

    name: str
    prompts: tuple[str, ...]
    picture: Path
    trained: bool


def pictures_of(vendor: str) -> Path:
    """The folder of a vendor's pictures in its package."""
    return Path("img", vendor, "64")


def fetch(folder: Path, vendor: str = GOOGLE) -> None:
    """Fetches a vendor's pictures and their names with npm, unless the folder is there already.

    Raises:
        ValueError: If npm is missing or fails, or if the folder is not that of the package.
    """
    package, pictures = f"emoji-datasource-{vendor}@{VERSION}", pictures_of(vendor)
    if folder.exists():
        if missing := [path for path in ("emoji.json", pictures) if not (folder / path).exists()]:
            raise ValueError(
                f"{folder} has no {missing[0]}: give the unpacked npm package {package} as --data_dir, or a folder that does "
                "not exist, to which it will be fetched."
            )
        return
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"There is no folder {folder}, and no program npm to fetch it: install Node.js, or unpack the npm package "
            f"{package} elsewhere and give its folder as --data_dir."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".emoji-") as temporary:
        fetched = subprocess.run([npm, "pack", package], cwd=temporary, capture_output=True, text=True)
        archives = list(Path(temporary).glob("*.tgz"))
        if fetched.returncode or len(archives) != 1:
            raise ValueError(f"`npm pack {package}` failed: {fetched.stderr.strip()}\nIs there a connection?")
        with tarfile.open(archives[0]) as archive:
            wanted = (f"package/{pictures.as_posix()}/", "package/emoji.json", "package/LICENSE")
            members = [member for member in archive.getmembers() if member.name.startswith(wanted)]
            archive.extractall(temporary, members, filter="data")
        Path(temporary, "package").rename(folder)


def list_emoji(folder: Path, vendor: str = GOOGLE) -> list[Emoji]:
    """The emoji of the chosen subcategories that have a vendor's picture, in the order of their code points."""
    fetch(folder, vendor)
    entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    entries = [entry for entry in entries if entry["subcategory"] in SUBCATEGORIES and entry[f"has_img_{vendor}"]]
    entries.sort(key=lambda entry: entry["unified"])
    names = [RENAMED.get(entry["name"].lower(), entry["name"].lower()) for entry in entries]
    short = [entry["short_names"][0].replace("_", " ") for entry in entries]
    held_out = HELD_OUT.read_text(encoding="utf-8").splitlines()
    found = []
    for entry, name, other in zip(entries, names, short):
        ambiguous = other in names or short.count(other) > 1 or any(letter.isdigit() for letter in other)
        prompts = (name,) if ambiguous else (name, other)
        found.append(Emoji(name, prompts, folder / pictures_of(vendor) / entry["image"], name not in held_out))
    return found


def words_of(emoji: list[Emoji]) -> list[str]:
    """All words of the prompts, as CLIP's tokenizer splits them: a hyphen is a word."""
    return sorted({word for one in emoji for prompt in one.prompts for word in re.findall(r"[a-z]+|[^a-z ]", prompt)})


def load_pictures(emoji: list[Emoji]) -> Tensor:
    """Pictures on white, of shape `(len(emoji), 3, 64, 64)` in [0, 1]."""
    pictures = []
    for one in emoji:
        with Image.open(one.picture) as file:
            colours = file.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        picture = Image.alpha_composite(white, colours).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE))
        pictures.append(torch.from_numpy(np.array(picture)))
    return torch.stack(pictures).permute(0, 3, 1, 2) / 255


def move(
    pictures: Tensor, generator: torch.Generator, degrees: float, shift: float, zoom: tuple[float, float]
) -> Tensor:
    """Pictures on white that are turned, shifted and scaled at random.

    Args:
        pictures: Of shape `(batch_size, 3, 64, 64)` in [0, 1].
        generator: Source of the random numbers.
        degrees: Largest angle.
        shift: Largest shift in pixels.
        zoom: Smallest and largest scale.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(pictures), generator=generator) * (high - low) + low

    angle, scale, reach = uniform(-degrees, degrees) * math.pi / 180, 1 / uniform(*zoom), 2 * shift / IMAGE_SIZE
    rows = [scale * angle.cos(), -scale * angle.sin(), uniform(-reach, reach)]
    rows += [scale * angle.sin(), scale * angle.cos(), uniform(-reach, reach)]
    grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pictures.shape), align_corners=False)
    ink = functional.grid_sample(1 - pictures, grid, mode="bicubic", align_corners=False)  # zero outside is white
    return (1 - ink).clamp(0, 1)
