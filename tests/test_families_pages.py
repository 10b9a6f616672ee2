"""The pages about families: one is written from the specs and current, the code of the other runs."""

import re
from pathlib import Path
from typing import Any

import pytest

import diffusers_softrepa.families as families
from diffusers_softrepa import conditioning
from diffusers_softrepa.families import built_in_families, table
from diffusers_softrepa.families.flux import FLUX
from golden import NAMES, golden

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.skipif(
    FLUX.groups[1].text == "hidden_states", reason="the page has FLUX.1's single blocks as newer releases write them"
)
def test_the_page_of_families_is_current():
    current = (DOCS / "families.md").read_text(encoding="utf-8")
    assert current == table.families_page(built_in_families()), (
        "python -m diffusers_softrepa.families.table > docs/families.md"
    )


def test_the_page_begins_with_the_families_that_can_be_trained_and_says_which_were_compared():
    assert set(table.TRAINED) == {conditioner.family for conditioner in conditioning._CONDITIONERS}
    assert set(table.COMPARED) == {golden(name).config.family for name in NAMES}
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    assert page.index("| model | use | train | tested |") < page.index("## ")


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
