"""Every test starts from the same random state, and one thread keeps small models fast."""

import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
