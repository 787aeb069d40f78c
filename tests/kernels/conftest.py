"""Where kernels run: natively on a GPU, else on the CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
