"""The main job on photographs. They lie beside the repository or where L2S_IMAGES says, in
train/<class>/ and val/<class>/; without them these tests are skipped."""
import json
import os
from pathlib import Path

import pytest
from PIL import Image

import eval as evaluation
import train_kd

IMAGES = Path(os.environ.get("L2S_IMAGES", Path(__file__).parents[2]
                               / "shared" / "data" / "imagenette224"))

pytestmark = pytest.mark.skipif(
    not (IMAGES / "train").is_dir(),
    reason=f"no photographs in {IMAGES}: set L2S_IMAGES to a folder with train/ and val/")


@pytest.fixture(scope="module")
def few_images(tmp_path_factory) -> Path:
    """Three classes with two training images and one to validate, greyscale ones if any."""
    folder = tmp_path_factory.mktemp("images")
    for split, number in (("train", 2), ("val", 1)):
        for source in sorted((IMAGES / split).iterdir())[:3]:
            files = sorted(source.iterdir(), key=is_in_colour)
            (folder / split / source.name).mkdir(parents=True)
            for file in files[:number]:
                (folder / split / source.name / file.name).symlink_to(file)
    return folder


def is_in_colour(file: Path) -> bool:
    with Image.open(file) as image:
        return image.mode == "RGB"


def test_slak_t_teaches_resnet50_at_full_size(few_images, tmp_path):
    words = ["--teacher", "slak_t", "--teacher-weights", "random", "--student", "resnet50",
             "--loss", "nkd", "--loss", "fd", "weight=0.1", "whiten=true", "--data-path",
             str(few_images), "--batch-size", "2", "--effective-batch", "2", "--epochs", "1",
             "--warmup-steps", "1", "--num-workers", "0", "--save-freq", "0", "--output-dir",
             str(tmp_path / "run")]
    assert train_kd.main(words) == 0
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "log.txt").read_text())
    assert record["n_parameters"] == 25_557_032 - 997 * 2049  # three classes instead of 1000
    assert record["train_nkd"] > 0 and record["train_fd"] > 0
    assert evaluation.main(["--checkpoint", str(folder / "checkpoint-last.pth"), "--data-path",
                            str(few_images), "--batch-size", "1", "--num-workers", "0"]) == 0
