"""The loader's benchmark compares like with like and says what it did; no time is tested."""
import pytest
import torch
from PIL import Image

from analysis.benchmark.common import table
from analysis.benchmark.loader import COLUMNS, STAGES, TorchvisionSamples, measure, photographs
from data.batch import BatchTransform, collate
from data.datasets import create_dataset
from data.loader import Samples
from data.transforms import train_transform
from tests.test_data import big_jpeg
from utils.registry import UserError


def make_photographs(folder):
    for kind in ("ant", "bee"):
        for number in range(2):
            big_jpeg(folder / kind / f"{number}.jpg", (120 + 10 * number, 100))
    return folder


def test_one_row_per_pipeline(tmp_path):
    make_photographs(tmp_path / "train")
    threads = torch.get_num_threads()
    rows = measure(tmp_path, input_size=40, batch_size=2, repeats=2)
    assert [row["pipeline"] for row in rows] == [
        "torchvision", "ours, the same pixels", "ours, --fast-decode"]
    for row in rows:
        assert all(row[name] > 0 for name in ("images_per_second", "ratio", *STAGES))
        assert 0 < row["with_device_share"] <= row["images_per_second"]
        assert row["ratio_with_device_share"] <= row["ratio"]
    assert rows[0]["ratio"] == rows[0]["ratio_with_device_share"] == 1 and rows[0]["device"] == 0
    assert all(row["device"] > 0 for row in rows[1:])
    lines = table(rows, COLUMNS).splitlines()
    assert len(lines) == 5 and lines[2].startswith("| torchvision |")
    assert torch.get_num_threads() == threads and Image.core.get_blocks_max() == 0


def test_a_folder_of_classes_or_of_splits(tmp_path):
    assert photographs(tmp_path) == tmp_path
    (tmp_path / "train").mkdir()
    assert photographs(tmp_path) == tmp_path / "train"


def test_the_pipelines_do_the_same(tmp_path):
    """Where nothing is erased, the batches are equal to float rounding."""
    root = make_photographs(tmp_path / "val")
    theirs = TorchvisionSamples(root, 40)
    theirs.to_tensor.transforms[-1].p = 0
    source = create_dataset("imagefolder", "val", str(tmp_path))
    ours = Samples(source, train_transform(40, random_erasing_prob=0), seed=0)
    to_images = BatchTransform((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for epoch in range(3):
        expected = torch.stack([theirs[epoch, index][0] for index in range(4)])
        images = to_images(collate([ours[epoch, index] for index in range(4)]).images)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_a_broken_photograph_is_named(tmp_path, monkeypatch):
    make_photographs(tmp_path)
    broken = next(tmp_path.rglob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:200])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=broken.name):
        measure(".", input_size=64, batch_size=2, repeats=1)
