"""The benchmark of training fed by each loader: rows, and what it refuses; no time is tested."""
import pytest
import torch

from analysis.benchmark import __main__ as benchmark
from analysis.benchmark import feeding
from tests.test_bench_loader import make_photographs


def test_a_row_for_each_loader_and_one_without(tmp_path, capsys):
    make_photographs(tmp_path / "train")
    words = ["data", "--data-path", str(tmp_path), "--student", "resnet_nano", "--input-size", "40",
             "--batch-size", "2", "--repeats", "1", "--num-workers", "0", "--device", "cpu"]
    assert benchmark.main(words) == 0
    printed = capsys.readouterr().out
    assert "2 steps of 2 images at 40 px, --aa 3a" in printed
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["loader", "disk", "ram", "no loader"]
    assert benchmark.main([*words, "--batch-size", "8"]) == 2
    assert "has 4 images, fewer than a batch of 8" in capsys.readouterr().err
    assert benchmark.main([*words, "--batch-size", "3"]) == 2
    assert "--batch-size must be even" in capsys.readouterr().err


@pytest.mark.parametrize("kind, places", [("cpu", ["disk", "ram"]),
                                          ("meta", ["disk", "ram"]),
                                          ("cuda", ["disk", "ram", "device"])])
def test_the_device_is_another_place_on_a_gpu_only(tmp_path, kind, places):
    make_photographs(tmp_path / "train")
    source = feeding.data.create_dataset("imagefolder", "train", str(tmp_path))
    loaders = feeding.build_loaders(source, torch.device(kind), input_size=40, batch_size=2,
                                    num_batches=2, num_workers=0, policy="none")
    assert [*loaders] == places
