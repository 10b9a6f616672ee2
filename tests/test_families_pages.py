"""The pages about families: one is written from the specs and current, the code of the other runs."""

import re
from pathlib import Path
from typing import Any

import pytest

import diffusers_softrepa.families as families
from diffusers_softrepa.families import built_in_families
from diffusers_softrepa.families.table import families_page

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_families_is_current():
    current = (DOCS / "families.md").read_text(encoding="utf-8")
    assert current == families_page(built_in_families()), (
        "python -m diffusers_softrepa.families.table > docs/families.md"
    )


def test_adding_a_family_works_as_the_guide_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    page = (DOCS / "adding_a_family.md").read_text(encoding="utf-8")
    code = re.findall(r"<!-- run -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(code) == page.count("```python") == 4
    names: dict[str, Any] = {"__name__": "guide"}
    for block in code:
        exec(block, names)
    answer = capsys.readouterr().out
    assert "no component of LetterDenoiser takes soft tokens" in answer
    assert "LetterDenoiser has letter_blocks of LetterBlock(image, words, words_mask)" in answer
    assert "docs/adding_a_family.md" in answer
