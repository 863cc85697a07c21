"""Images in folders: written and read, found, refused."""

import pytest
import torch
from PIL import Image

from diffusers_gas.papers.evaluation.image_files import image_paths, read_images, save_image


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_saved_is_read(tmp_path, channels):
    images = (torch.rand(3, channels, 5, 7) * 255).round() / 255
    for i, image in enumerate(images):
        save_image(image, tmp_path / "below" / f"{i}.png")
    assert {path.name for path in (tmp_path / "below").iterdir()} == {"0.png", "1.png", "2.png"}
    torch.testing.assert_close(read_images(image_paths(tmp_path)), images.expand(-1, 3, -1, -1), rtol=0, atol=1e-7)


def test_other_files_are_left_alone(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "b.JPG")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "labels.txt").write_text("fox")
    assert [path.name for path in image_paths(tmp_path)] == ["a.png", "b.JPG"]


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        image_paths(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"PNG?")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        read_images(image_paths(tmp_path))
    for size in (2, 3):
        Image.new("RGB", (size, 2)).save(tmp_path / f"{size}.jpg")
    with pytest.raises(ValueError, match=r"sizes \[\(2, 2\), \(2, 3\)\]: resize"):
        read_images(image_paths(tmp_path)[:2])
