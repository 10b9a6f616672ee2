"""Every test starts from the same random state, and one thread keeps small models fast."""

import logging
from collections.abc import Iterator

import diffusers
import pytest
import torch
import transformers
from packaging.version import Version

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for those that older releases of other packages raise beside newer ones."""
    if Version(diffusers.__version__) < Version("0.42"):
        config.addinivalue_line("filterwarnings", "ignore")
        config.addinivalue_line("filterwarnings", "error:::diffusers_softrepa")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    """A file of tests about classes that a release of diffusers or transformers does not have is skipped beside it."""
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed and report.call.excinfo else None
    module = getattr(error, "name", None) or ""
    if isinstance(error, ImportError) and module.split(".")[0] in ("diffusers", "transformers"):
        package = diffusers if module.startswith("diffusers") else transformers
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {module} {package.__version__} lacks it: {error}")
    return report


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
