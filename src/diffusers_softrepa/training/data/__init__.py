"""From stored rows to loaded examples: `dataset` opens, `sampler` orders, `loader` loads, `encode` encodes."""

from .dataset import Example, Examples, open_examples

__all__ = ["Example", "Examples", "open_examples"]
