"""TensorBoard and wandb: what a run sends there, stopped and continued."""
import json
import sys
from types import ModuleType

import pytest

import train_kd
from utils.distributed import StopRequest

WORDS = ["--student", "resnet_nano", "--data-set", "outlines", "train_size=64", "val_size=20",
         "--input-size", "32", "--batch-size", "8", "--effective-batch", "16", "--epochs", "2",
         "--num-workers", "0", "--warmup-steps", "1", "--save-freq", "0", "--print-every", "2"]
# 4 updates an epoch


class FakeWandB(ModuleType):
    """The part of wandb's interface that is used; its runs live on as long as it does."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[dict] = []
        self.figures: list[tuple[int, dict]] = []
        self.num_finished = 0

    def init(self, **words) -> "FakeWandB":
        self.calls.append(words)
        return self

    def log(self, values: dict, step: int) -> None:
        assert all(type(value) in (int, float, bool) for value in values.values())
        self.figures.append((step, values))

    def finish(self) -> None:
        self.num_finished += 1


def stop_after(monkeypatch, number: int) -> None:
    """Ask the run to stop once it has looked `number` times whether it should."""
    looks = iter(range(number))
    monkeypatch.setattr(StopRequest, "agreed", lambda self: next(looks, None) is None)


def train(folder, *words: str) -> int:
    return train_kd.main([*WORDS, "--output-dir", str(folder), *words])


@pytest.fixture
def wandb(monkeypatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_continues_its_run_by_updates(tmp_path, monkeypatch, wandb):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # before the first epoch, after an update, and after another
        assert train(tmp_path / "run", "--log-to", "wandb") == 143
    assert train(tmp_path / "run", "--log-to", "wandb") == 0
    first, second = wandb.calls
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["name"] == "run" and first["config"]["lr"] == 4e-3
    assert wandb.num_finished == 2
    assert [step for step, _ in wandb.figures] == [2, 4, 4, 6, 8, 8]
    points = [values for _, values in wandb.figures if "update/loss" in values]
    epochs = [values for _, values in wandb.figures if "test_acc1" in values]
    assert len(points) == 4 and {"update/ce", "update/lr", "update/grad_norm"} <= set(points[0])
    records = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert epochs == [{name: value for name, value in record.items() if value is not None}
                      for record in records]
    assert points[1]["update/loss"] == records[0]["train_loss"]  # the epoch's last update
    assert train(tmp_path / "other", "--log-to", "wandb", "--epochs", "1") == 0
    assert wandb.calls[-1]["id"] != first["id"]


def test_wandb_that_does_not_start_is_a_sentence(tmp_path, wandb, capsys):
    def init(**words) -> None:
        raise ValueError("no API key\nconfigured")

    wandb.init = init
    assert train(tmp_path / "run", "--log-to", "wandb") == 2
    assert "error: wandb did not start (no API key configured). Try" in capsys.readouterr().err


def test_tensorboard_has_a_point_every_so_many_updates_and_the_settings(tmp_path, monkeypatch):
    """--tensorboard is the same place. Points of updates that a kill undid are purged."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(tmp_path / "run", "--tensorboard") == 143
    saved = (tmp_path / "run" / "checkpoint-last.pth").read_bytes()
    assert train(tmp_path / "run", "--log-to", "tensorboard") == 0
    (tmp_path / "run" / "checkpoint-last.pth").write_bytes(saved)
    assert train(tmp_path / "run", "--log-to", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("update/loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("test_acc1")] == [4, 8]
    (text, *_) = events.Tensors("settings/text_summary")
    assert b"lr: 0.004" in text.tensor_proto.string_val[0]
    assert "hparams" in events.PluginTagToContent("hparams").__repr__()
