"""Every test starts from the same random state, and one thread keeps small models fast."""

import logging
from collections.abc import Iterator

import diffusers
import pytest
import torch
from packaging.version import Version

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for those that older releases of other packages raise beside newer ones."""
    if Version(diffusers.__version__) < Version("0.42"):
        config.addinivalue_line("filterwarnings", "ignore")
        config.addinivalue_line("filterwarnings", "error:::diffusers_softrepa")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
