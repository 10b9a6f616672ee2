"""The model card: metadata the Hub understands, and lines that work when pasted."""

import ast
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

import tiny
from diffusers_softrepa import SoftREPAConfig
from diffusers_softrepa.card import images_of, model_card, refreshed, section


def config_of(family: tiny.Family, **fields: Any) -> SoftREPAConfig:
    return SoftREPAConfig.for_denoiser(family.denoiser(), **fields)


def test_metadata_names_library_base_task_and_tags():
    config = config_of(tiny.FAMILIES[2], base_model_name_or_path="stabilityai/stable-diffusion-3-medium-diffusers")
    data = ModelCard(str(model_card(config, "user/tokens"))).data.to_dict()
    assert data == {
        "base_model": "stabilityai/stable-diffusion-3-medium-diffusers",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["softrepa", "diffusers", "text-to-image", "adapter", "sd3"],
    }


def code_of(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("```")[0]


def test_the_lines_to_paste_name_both_repositories_and_existing_methods():
    config = config_of(tiny.FAMILIES[2], base_model_name_or_path="somebody/base")
    code = code_of(model_card(config, "user/tokens"))
    ast.parse(code)
    assert 'DiffusionPipeline.from_pretrained("somebody/base")' in code
    assert 'pipe.load_softrepa("user/tokens")' in code
    assert hasattr(DiffusionPipeline, "load_softrepa")


def test_a_file_of_another_name_is_named():
    code = code_of(model_card(config_of(tiny.FAMILIES[0]), "user/tokens", weight_name="mine.safetensors"))
    assert 'pipe.load_softrepa("user/tokens", weight_name="mine.safetensors")' in code


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("bins", [None, 7])
def test_nothing_unknown_is_written_as_none(family: tiny.Family, bins: int | None):
    config = config_of(family, num_timestep_bins=bins)
    text = str(model_card(config, "user/tokens"))
    assert "None" not in text
    assert "null" not in text
    assert f"{config.num_parameters:,} parameters" in text
    assert ("timestep bins | 7" in text) == (bins == 7)


@pytest.mark.parametrize(
    "base", ["/home/me/secret/model", "./model", "model", "a/b/c", "C:\\models\\base", "bad id/x"]
)
def test_a_path_is_no_base_model(base: str):
    card = model_card(config_of(tiny.FAMILIES[0], base_model_name_or_path=base), "user/tokens")
    assert "base_model" not in card.data.to_dict()
    assert base not in str(card) or base == "model"


def test_a_folder_that_looks_like_a_repository_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card(config_of(tiny.FAMILIES[0], base_model_name_or_path="out/model"), "user/tokens")
    assert "base_model" not in card.data.to_dict()


def card_of(family: tiny.Family, **fields: Any) -> str:
    return str(model_card(config_of(family, **fields), "user/tokens"))


def test_a_card_brought_up_to_date_with_itself_is_the_same():
    text = card_of(tiny.FAMILIES[2], base_model_name_or_path="somebody/base")
    assert refreshed(text, text) == text


def test_what_people_write_around_the_sections_and_into_the_metadata_stays():
    old, new = card_of(tiny.FAMILIES[2], num_tokens=2), card_of(tiny.FAMILIES[2], num_tokens=3)
    by_hand = (
        old.replace("---\n", "---\nlicense: mit  # ours\n", 1).replace("<!--", "A preface.\n\n<!--", 1) + "\nThanks.\n"
    )
    again = refreshed(by_hand, new)
    assert "license: mit  # ours" in again
    assert again.index("A preface.") < again.index("| tokens per layer | 3 |") < again.index("Thanks.")
    assert "| tokens per layer | 2 |" not in again
    assert refreshed(again, new) == again


def test_metadata_are_replaced_lists_joined_and_further_keys_stay():
    old = card_of(tiny.FAMILIES[2], base_model_name_or_path="somebody/old")
    by_hand = old.replace("---\n", "---\nlicense: mit\n", 1).replace("- softrepa\n", "- softrepa\n- mine\n")
    data = ModelCard(refreshed(by_hand, card_of(tiny.FAMILIES[2], base_model_name_or_path="somebody/new"))).data
    assert (data.license, data.base_model) == ("mit", "somebody/new")
    assert data.tags == ["softrepa", "mine", "diffusers", "text-to-image", "adapter", "sd3"]


def test_a_card_without_sections_is_somebodys_own():
    by_hand = "---\nlicense: mit\n---\n# Mine\n"
    assert refreshed(by_hand, card_of(tiny.FAMILIES[2])) == by_hand


def test_a_new_section_follows_the_last_one():
    card = card_of(tiny.FAMILIES[2]) + "\nBy hand.\n"
    added = refreshed(card, card + section("training", "How."))
    assert added.index("softrepa:adapter") < added.index("How.") < added.index("By hand.")
    assert refreshed(added, card + section("training", "Why.")) == added.replace("How.", "Why.")


def test_metadata_that_are_no_yaml_are_left_alone():
    card = card_of(tiny.FAMILIES[2], num_tokens=2).replace("---\n", "---\n{: broken\n", 1)
    again = refreshed(card, card_of(tiny.FAMILIES[2], num_tokens=3))
    assert "{: broken" in again and "| tokens per layer | 3 |" in again


def test_a_licence_is_written_when_it_is_given_and_stays_when_it_is_not():
    config = config_of(tiny.FAMILIES[2])
    with_licence = str(model_card(config, "user/tokens", license="apache-2.0"))
    assert ModelCard(with_licence).data.license == "apache-2.0"
    assert "license" not in model_card(config, "user/tokens").data.to_dict()
    assert ModelCard(refreshed(with_licence, str(model_card(config, "user/tokens")))).data.license == "apache-2.0"


def test_the_pictures_of_a_card_are_those_beside_it():
    gallery = "widget:\n- text: a cat\n  output:\n    url: pictures/00.png\n"
    text = (
        "![here](curves.png) ![twice](curves.png) ![elsewhere](https://example.org/a.png) ![up](../secret.png) "
        "![up](a/../../secret.png) ![root](/etc/a.png) ![no picture](training_state.pt) [a link](linked.png)"
    )
    assert images_of(f"---\n{gallery}---\n{text}") == ["curves.png", "pictures/00.png"]
    assert images_of("---\n{: broken\n---\n![here](a.png)") == ["a.png"]
    assert images_of("no metadata, no pictures") == []
