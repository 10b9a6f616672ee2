"""The long description of the package: README.md without its relative links, which lead nowhere on a package index.

Everything else is in pyproject.toml. Once the repository has a public address, relative links can become absolute.
"""

import re
from pathlib import Path

from setuptools import setup


def without_relative_links(text: str) -> str:
    """Returns Markdown with relative links as plain text, and without relative images and the captions below them."""
    relative = r"\((?!https?://|#)[^)]*\)"
    text = re.sub(rf"!\[[^\]]*\]{relative}\n*(\*[^*]+\*\n*)?", "", text)
    return re.sub(rf"\[([^\]]*)\]{relative}", r"\1", text)


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(long_description=without_relative_links(readme), long_description_content_type="text/markdown")
