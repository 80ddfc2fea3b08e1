"""What many processes share, and how the programs end."""
import pytest
import torch

from utils import distributed
from utils.checkpoint import find_saved
from utils.config import Parser, program
from utils.optim import resolve_batch
from utils.registry import UserError


def run_raising(error: Exception) -> int:
    @program("prog", Parser)
    def main(args: object) -> int:
        raise error

    return main([])


@pytest.mark.parametrize("error, code, words", [
    (UserError("a sentence."), 2, "prog: error: a sentence."),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), 2, "Lower --batch-size"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_what_the_user_can_mend_is_one_sentence(capsys, error, code, words):
    assert run_raising(error) == code
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    with pytest.raises(RuntimeError, match="shapes"):
        run_raising(RuntimeError("shapes cannot be multiplied"))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RuntimeError, match="closed"):  # alone there is no peer
        run_raising(lost)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert run_raising(lost) == 2


def test_processes_must_see_the_same_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint-last.pth"
    torch.save({"optimizer": {}, "args": {}, "step": 7}, file)
    assert find_saved(tmp_path, None, True, {}, {})[0] == file
    monkeypatch.setattr("utils.checkpoint.gather_objects", lambda step: [step, None])
    with pytest.raises(UserError, match=r"updates \[7, None\].*storage that all machines share"):
        find_saved(tmp_path, None, True, {}, {})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"2 or more processes .* 1 CUDA device.*nproc_per_node"):
        distributed.setup("cuda")


@pytest.mark.parametrize("batch, world, accum, effective, expected", [
    (64, 8, None, None, (8, 4096)),  # the published product
    (64, 1, None, None, (64, 4096)),
    (64, 4, 8, None, (8, 2048)),
    (16, 1, None, 32, (2, 32)),
    (16, 1, 2, 32, (2, 32)),
])
def test_batch_arithmetic(batch, world, accum, effective, expected):
    assert resolve_batch(batch, world, accum, effective, default=4096) == expected


@pytest.mark.parametrize("batch, world, accum, effective, words", [
    (64, 3, None, None, "4096 is not a multiple of 3 process"),
    (64, 1, None, 32, "32 is not a multiple"),
    (16, 1, 2, 64, "contradicts"),
])
def test_batch_arithmetic_that_does_not_add_up(batch, world, accum, effective, words):
    with pytest.raises(UserError, match=words):
        resolve_batch(batch, world, accum, effective, default=4096)
