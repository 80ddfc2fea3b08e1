"""What signals, lost readers and faults of the machine do to a program."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from data.loader import EvalKeys, Loader
from utils import distributed, faults
from utils.distributed import StopRequest
from utils.registry import UserError

ROOT = Path(__file__).parent.parent


def start(code: str, **streams: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", f"from utils import process\nprocess.begin()\n{code}"], cwd=ROOT,
        text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        # Where the tests run in the background Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


# The second one is a call that no signal interrupts, as joining other processes is.
SLEEPING = "import time; print('ready', flush=True); time.sleep(60)"
LOCKED = ("import ctypes; lock = ctypes.create_string_buffer(64); c = ctypes.CDLL(None)\n"
          "print('ready', flush=True); [c.pthread_mutex_lock(lock) for _ in range(2)]")


@pytest.mark.parametrize("number, code, words", [
    (signal.SIGTERM, SLEEPING, "stopped by SIGTERM; what was saved before is kept."),
    (signal.SIGINT, SLEEPING, "interrupted; what was saved before is kept."),
    (signal.SIGTERM, LOCKED, "stopped by SIGTERM")])
def test_a_signal_ends_a_program_in_a_sentence(number, code, words):
    process = start(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert words in err and len(err.split("\n")) == 3


def test_a_signal_at_the_end_does_not_change_the_code():
    process = start(f"process.finish(0)\n{SLEEPING}")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 0


def test_a_program_outlives_whoever_reads_it():
    reading, writing = os.pipe()
    process = start("for _ in range(10 ** 5): print('k\\xe4se \\udce9')\nsys = process.sys\n"
                    "sys.stderr.write('end'); sys.exit(3)", stdout=writing)
    os.close(writing), os.read(reading, 10), os.close(reading)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 3
    assert err.splitlines() == ["standard output is lost (Broken pipe); the program goes on.",
                                "end"]


@pytest.mark.parametrize("before", ["", "exec >&-; ", "exec >&- 2>&-; ", "exec > /dev/full; ",
                                    "export PYTHONIOENCODING=ascii; "])
def test_output_that_takes_no_text(before):
    code = "from utils import process; process.begin(); print('k\\xe4se \\udce9')"
    result = subprocess.run(["bash", "-c", f'{before}exec "$0" -c "$1"', sys.executable, code],
                            cwd=ROOT, capture_output=True)
    assert result.returncode == 0 and b"Error" not in result.stderr
    if before in ("", "export PYTHONIOENCODING=ascii; "):
        assert result.stdout.endswith(b"se \\udce9\n")


def test_a_wish_to_stop_and_what_ends_at_once():
    numbers, previous = [], signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    try:
        with StopRequest() as stop:
            assert not stop.agreed()
            with stop.at_once():
                signal.raise_signal(signal.SIGTERM)
            assert numbers == [signal.SIGTERM] and not stop.agreed()
            signal.raise_signal(signal.SIGTERM)
            assert len(numbers) == 1 and stop.agreed()
            with stop.at_once():  # the earlier one counts
                assert len(numbers) == 2
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.slow
@pytest.mark.parametrize("number, codes, words", [
    (signal.SIGTERM, [143, 143], "stopped on request"),
    (signal.SIGKILL, [2, -9], "another process of this run ended")])
def test_one_of_two_processes_is_stopped_or_killed(number, codes, words, tmp_path):
    """Without torchrun, whose own words would stand between those of the processes."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    processes = [subprocess.Popen(
        [sys.executable, "train_kd.py", "--teacher", "none", "--student", "resnet_nano",
         "--data-set", "outlines", "train_size=64", "val_size=20", "--input-size", "48",
         "--batch-size", "8", "--effective-batch", "16", "--epochs", "5000", "--save-freq", "0",
         "--num-workers", "1", "--device", "cpu", "--output-dir", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": rank, "WORLD_SIZE": "2",
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "log.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].send_signal(number)
        printed = ["".join(process.communicate(timeout=100)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == codes, printed
    assert printed[0].count(words) == 1 and "Traceback" not in "".join(printed)
    assert (tmp_path / "run" / "checkpoint-last.pth").exists()


class Dying(Dataset):
    source = range(4)

    def __getitem__(self, key: tuple[int, int]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_that_is_killed_is_a_sentence():
    loader = Loader(Dying(), EvalKeys(4, 2), num_workers=1)
    with pytest.raises(RuntimeError) as caught:
        list(loader)
    loader.close()
    said = faults.describe(caught.value, {})
    assert "loader process ended" in said and "--num-workers" in said and "\n" not in said


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
     "2.00 GiB more were asked for; --batch-size is 64. Lower --batch-size"),
    (RuntimeError("CUDA error: out of memory"), "the GPU's memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12345 bytes"),
     "memory of the machine is full: 12345 bytes more"),
    (MemoryError(), "memory of the machine is full; --batch-size is 64"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: "
                  "unable to write to file </torch_1_2_0>: No space left on device (28)"),
     "shared memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), "--shm-size"),
    (RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376. "
                  "Reducing block sizes or `num_stages` may help."), "--large-kernel torch"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"),
    (RuntimeError("CUDA error: no kernel image is available for execution"), "--device cpu"),
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "Install g++"),
    (PermissionError(13, "Permission denied", "there"), "cannot use there: Permission denied."),
    (OSError(28, "No space left on device"), "no space is left")])
def test_faults_of_the_machine_are_sentences(error, words):
    said = faults.describe(error, {"batch_size": 64})
    assert words in said and "\n" not in said


@pytest.mark.parametrize("text", [
    "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:22",
    "[../gloo/transport/tcp/pair.cc:544] Read error [127.0.0.1]:22: Connection reset by peer",
    "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
    "writev [127.0.0.1]:22: Broken pipe",
    "failed to recv, got 0 bytes",
    "NCCL error: remote process exited or there was a network error, ncclRemoteError: A call failed"
])
def test_a_lost_peer_is_a_sentence_where_there_is_one(text, monkeypatch):
    assert faults.describe(RuntimeError(text), {}) is None  # alone there is no peer
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert faults.describe(RuntimeError(text), {}) == distributed.LOST_PEER


@pytest.mark.parametrize("error", [
    ZeroDivisionError(), RuntimeError("shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("[enforce fail at ../gloo/transport/tcp/pair.cc:446] op.preamble.length <= "
                 "op.nbytes. 8 vs 4")])  # the processes are out of step, which is a mistake of ours
def test_our_own_mistakes_are_no_faults_of_the_machine(error, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert faults.describe(error, {}) is None


def test_what_the_machine_lacks_is_told_before_the_run(monkeypatch, capsys):
    def fail(*args: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: none found Set TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(torch, "compile", fail)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert faults.what_to_compile(None, cpu, 300) == (False, False)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler,.* \(.*none found\)"):
        faults.what_to_compile(True, cpu, 1)
    assert faults.what_to_compile(None, gpu, 299) == (False, False)
    assert not capsys.readouterr().out
    assert faults.what_to_compile(None, gpu, 300) == (False, False)
    assert "compiled: nothing" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert [faults.resolve_precision(amp, gpu) for amp in ("fp16", "auto")] == ["fp16", "none"]
    assert [faults.resolve_precision(amp, cpu) for amp in ("bf16", "auto")] == ["bf16", "none"]
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16. Use --amp fp16"):
        faults.resolve_precision("bf16", gpu)
