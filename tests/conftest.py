"""One thread for every test, and the folder of small reference figures."""
from pathlib import Path

import numpy as np
import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fixture_npz():
    """name -> the arrays of tests/fixtures/<name>.npz, figures of the published code."""
    return lambda name: dict(np.load(FIXTURES / f"{name}.npz"))
