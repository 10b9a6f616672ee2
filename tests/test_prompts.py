"""Prompt sets in the shapes in which they are published."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from diffusers_softrepa.evaluation import Prompt, load_prompts

COCO = {
    "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe. "},
        {"image_id": 9, "id": 2, "caption": "Some food"},
        {"image_id": 9, "id": 3, "caption": "A meal"},
    ],
}
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
]
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
    '"a sign that says ""Stop"", red"\tWorld Knowledge\tWriting\t\n'
    'a "quoted" word\tAbstract\tWriting & Symbols\t\n'
    '"Hi" says the "cat"\tAnimals\tBasic\t\n'
)


def test_coco_gives_the_first_caption_of_each_image(tmp_path: Path):
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    prompts = load_prompts(tmp_path / "captions.json", images=tmp_path / "val")
    assert [(prompt.id, prompt.text) for prompt in prompts] == [
        ("000000000009", "Some food"),
        ("000000000025", "A giraffe."),
    ]
    assert prompts[0].metadata["image"] == str(tmp_path / "val" / "000000000009.jpg")
    assert "image" not in load_prompts(tmp_path / "captions.json")[0].metadata
    more = load_prompts(tmp_path / "captions.json", captions_per_image=5)
    assert [prompt.id for prompt in more] == ["000000000009-0", "000000000009-1", "000000000025-0"]


def test_geneval_keeps_what_is_to_be_checked(tmp_path: Path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    prompts = load_prompts(str(path))
    assert [prompt.category for prompt in prompts] == ["single_object", "counting"]
    assert prompts[1].metadata["exclude"] == [{"class": "clock", "count": 3}]
    assert prompts[1].text == "a photo of two clocks"


def test_parti_has_categories_and_quotes_as_they_are_meant(tmp_path: Path):
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    prompts = load_prompts(tmp_path / "PartiPrompts.tsv")
    assert [prompt.text for prompt in prompts] == [
        "bond",
        'a sign that says "Stop", red',
        'a "quoted" word',
        '"Hi" says the "cat"',
    ]
    assert [prompt.category for prompt in prompts] == ["Abstract", "World Knowledge", "Abstract", "Animals"]
    assert prompts[0].metadata["Challenge"] == "Basic"
    (by_challenge, *_) = load_prompts(tmp_path / "PartiPrompts.tsv", category_column="Challenge")
    assert by_challenge.category == "Basic"


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \r\na cat\n", encoding="utf-8")
    prompts = load_prompts(tmp_path / "prompts.txt")
    assert [(prompt.id, prompt.text) for prompt in prompts] == [
        ("00000", "a cat"),
        ("00001", "a dog"),
        ("00002", "a cat"),
    ]


def test_a_data_set_is_read_by_column_and_split(monkeypatch: pytest.MonkeyPatch):
    rows = datasets.Dataset.from_list([{"id": "x", "en": "a cat", "kind": 3}, {"id": "y", "en": "a dog", "kind": 4}])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: rows if (name, split) == ("user/p", "train") else 0
    )
    (prompt,) = load_prompts("user/p", column="en", category_column="kind", split="train", limit=1)
    assert prompt == Prompt("x", "a cat", "3", {"kind": 3})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'user/p' is not a file; .*pip install datasets"):
        load_prompts("user/p")


def test_a_list_may_hold_strings_mappings_and_prompts():
    given = ["a cat", {"text": "a dog", "id": 7, "size": 2}, Prompt("own", "a bird")]
    prompts = load_prompts(given, limit=5)
    assert [prompt.id for prompt in prompts] == ["00000", "7", "own"]
    assert prompts[1].metadata == {"size": 2}
    assert load_prompts(prompts) == prompts
    assert len(load_prompts(given, limit=2)) == 2


def test_what_are_no_prompts_is_said(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="there are no prompts in"):
        load_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="each prompt needs an id of its own, but 2 prompts have 1 ids"):
        load_prompts([Prompt("a", "x"), Prompt("a", "y")])
    with pytest.raises(ValueError, match=r"number 0 of the list has \['words'\]"):
        load_prompts([{"words": "x"}])
    with pytest.raises(ValueError, match="number 0 of the list is 3"):
        load_prompts([3])  # type: ignore[list-item]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a COCO captions file"):
        load_prompts(tmp_path / "other.json")
    (tmp_path / "prompts.yaml").write_text("a: b")
    with pytest.raises(ValueError, match=r"prompts are read from .json, .jsonl, .tsv and .txt"):
        load_prompts(tmp_path / "prompts.yaml")
    with pytest.raises(FileNotFoundError):
        load_prompts(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("limit", [0, -1, 1.5])
def test_a_limit_is_a_whole_number_of_at_least_one(limit: float):
    with pytest.raises(ValueError, match=f"limit must be a whole number of at least 1, or None .* but is {limit}"):
        load_prompts(["a", "b"], limit=limit)
