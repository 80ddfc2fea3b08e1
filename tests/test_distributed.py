"""What many processes share, and how the programs end."""
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from utils import distributed
from utils.checkpoint import find_saved
from utils.config import Parser, program
from utils.distributed import Place, find_place
from utils.optim import resolve_batch
from utils.registry import UserError


def run_raising(error: Exception) -> int:
    @program("prog", Parser)
    def main(args: object) -> int:
        raise error

    return main([])


@pytest.mark.parametrize("error, code, words", [
    (UserError("a\nsentence."), 2, "prog: error: a sentence."),
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
    settings = {"steps_per_epoch": 10, "epochs": 2}
    torch.save({"optimizer": {}, "args": settings, "step": 7, "epoch": 0}, file)
    assert find_saved(tmp_path, None, True, settings, {})[0] == file
    monkeypatch.setattr("utils.checkpoint.gather_objects", lambda step: [step, None])
    with pytest.raises(UserError, match=r"updates \[7, None\].*storage that all machines share"):
        find_saved(tmp_path, None, True, settings, {})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"2 or more processes .* 1 CUDA device.*nproc_per_node"):
        distributed.setup("cuda")


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MEETING = {"MASTER_ADDR": "gpu7", "MASTER_PORT": "1234"}
BATCH_JOB = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize("environ, expected", [
    ({}, Place()),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING},
     Place("torchrun", 1, 2, 0, "gpu7", 1234)),
    ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, Place("torchrun", 1, 2, None, "gpu7", 1234)),
    ({"RANK": "0", "WORLD_SIZE": "1"}, Place("torchrun")),
    (OPEN_MPI, Place("mpirun", 1, 2, 1)),
    ({**OPEN_MPI, **BATCH_JOB}, Place("mpirun", 1, 2, 1)),  # within a job of Slurm
    ({"PMI_RANK": "3", "PMI_SIZE": "4", **MEETING}, Place("MPICH", 3, 4, None, "gpu7", 1234)),
    (BATCH_JOB, Place()),  # its script, not one of its tasks
    ({**BATCH_JOB, **MEETING}, Place("srun", 0, 4, 0, "gpu7", 1234)),
    ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "5",
      "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[03-04,7],big1"},
     Place("srun", 3, 4, 1, "gpu03", 33066)),
])
def test_every_launcher_tells_a_process_its_place(environ, expected):
    assert find_place(environ) == expected


@pytest.mark.parametrize("environ, words", [
    ({"WORLD_SIZE": "2"}, "RANK must be a whole number"),
    ({"WORLD_SIZE": "two", "RANK": "0"}, "got 'two'"),
    ({"RANK": "1"}, "RANK=1 and WORLD_SIZE=not set"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "Set MASTER_ADDR"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "Set MASTER_ADDR"),
    ({**BATCH_JOB, "SLURM_PROCID": "1"}, "Set MASTER_ADDR"),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "["},
     "Set MASTER_ADDR"),
    ({**OPEN_MPI, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 .* is no port"),
    ({**OPEN_MPI, "MASTER_PORT": "0"}, "MASTER_PORT=0 .* is no port"),
])
def test_an_environment_that_tells_too_little_names_torchrun(environ, words):
    with pytest.raises(UserError, match=words) as caught:
        find_place(environ)
    assert "torchrun" in str(caught.value)


@pytest.mark.parametrize("number", ["two", "", "0"])
def test_a_program_in_a_strange_environment_ends_in_a_sentence(number, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", number)
    monkeypatch.setenv("RANK", "0")

    @program("prog", Parser)
    def main(args: object) -> None:
        distributed.setup("cpu")

    assert main([]) == 2
    err = capsys.readouterr().err
    assert "WORLD_SIZE" in err and err.count("\n") == 1


def test_processes_that_do_not_meet_say_so(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(distributed, "JOIN", timedelta(seconds=1))
    with pytest.raises(UserError, match="process 1 of 2.* did not meet at localhost:.*torchrun"):
        distributed.setup("cpu")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_processes_of_mpirun_join_and_find_their_machine():
    """Without a rank within the machine."""
    code = ("from utils import distributed as d; d.setup('cpu'); print(d.rank(), d.world_size(), "
            "d.is_first_here(), d.gather_objects(d.rank())); d.end_process(0)")
    environ = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    processes = [subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, text=True,
        env={**environ, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2"},
        stdout=subprocess.PIPE) for rank in "01"]
    printed = [process.communicate(timeout=100)[0] for process in processes]
    assert printed == ["0 2 True [0, 1]\n", "1 2 False [0, 1]\n"]


def test_the_word_of_a_launcher_is_no_unknown_flag(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="local-rank.*torchrun"):
        Parser(prog="prog").parse(["--local-rank=1"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    for word in ("--local-rank=1", "--local_rank=1"):
        assert Parser(prog="prog").parse([word]).given == []


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
