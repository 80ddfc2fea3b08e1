"""One thread for every test, and the folder of small reference figures."""
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the tests are the CPU's

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # before fixtures of a whole file begin
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fixture_npz():
    """name -> the arrays of tests/fixtures/<name>.npz, figures of the published code."""
    return lambda name: dict(np.load(FIXTURES / f"{name}.npz"))
