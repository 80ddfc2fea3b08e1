"""What tests of a GPU's work share: their file run as a script, in a process of its own. Triton's
interpreter is chosen before Triton is imported, and conftest.py hides the GPU from the tests."""
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
SUCCESS = "every comparison holds"
ON_GPU = {"CUDA_VISIBLE_DEVICES": "0", "TRITON_INTERPRET": "0"}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU")


def run_script(file: str, *words: str, **environment: str) -> str:
    """What it prints; of one that fails, the error as well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run([sys.executable, file, *words], cwd=ROOT, env=environment, text=True,
                         capture_output=True)
    if "only 0-dimensional arrays" in run.stderr:
        pytest.skip("the interpreter of this Triton does not know this NumPy")
    return run.stdout if run.returncode == 0 else run.stdout + run.stderr


# Of a test that checks a file of kernels in Triton's interpreter and, where there is one, on a GPU.
on_both = pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=needs_triton, id="interpreted"),
    pytest.param("cuda", marks=(needs_triton, needs_gpu), id="gpu")])


def check_comparisons(file: str, device: str) -> None:
    """Of the file, run as a script with the word `device`."""
    environment = ON_GPU if device == "cuda" else {"TRITON_INTERPRET": "1"}
    printed = run_script(file, device, **environment)
    assert SUCCESS in printed, printed


def traced() -> list[AbstractContextManager]:
    """In which torch.compile, torch.export or the tracer seems to call."""
    yes = mock.Mock(return_value=True)
    return [mock.patch.multiple("torch.compiler", is_compiling=yes, is_dynamo_compiling=yes),
            mock.patch("torch.compiler.is_compiling", yes), mock.patch("torch.jit.is_tracing", yes)]


def tell(failures: Sequence[str]) -> None:
    print("\n".join(failures) or SUCCESS)
