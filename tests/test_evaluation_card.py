"""An evaluation finds its place in the model card of an adapter, and images drawn elsewhere are scored alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

import tiny
from diffusers_softrepa.card import model_card, refreshed, section
from diffusers_softrepa.config import SoftREPAConfig
from diffusers_softrepa.evaluation import EvaluationResult, FunctionMetric, Prompt, add_to_card, score
from evaluation_runs import REFERENCES, ColorDistance, brightness

pytest_plugins = ["hub_server"]


@pytest.fixture
def result() -> EvaluationResult:
    scores = torch.tensor([[[0.25], [0.26]], [[0.27], [0.30]]], dtype=torch.float64)
    return EvaluationResult(
        settings=["base", "mine"],
        prompts=["0", "1"],
        texts=["a cat", "a dog"],
        categories=[None, None],
        seeds=[0],
        scores={"clip_score": scores},
        distances={"cmmd": [0.5, 0.4]},
        directions={"clip_score": True, "cmmd": False},
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pipe = tiny.sd15_pipeline()
    pipe.add_softrepa()
    pipe.save_softrepa(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_card_gets_the_table_and_the_numbers(result: EvaluationResult, adapter: Path, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    add_to_card(result, adapter, dataset_name="COCO captions", dataset_id="user/coco", grid=tmp_path / "grid.png")
    card = ModelCard.load(adapter / "README.md")
    assert "## Evaluation" in card.text and "On COCO captions." in card.text
    assert "| base | 0.2550 ± 0.0050 | 0.5 |" in card.text
    assert "![Settings side by side, from the same noise](evaluation.png)" in card.text
    assert (adapter / "evaluation.png").is_file()
    found = {one.metric_type: (one.metric_value, one.dataset_type) for one in card.data.eval_results}
    assert found == {"clip_score": (0.285, "user/coco"), "cmmd": (0.4, "user/coco")}
    assert "pipe.load_softrepa(" in card.text  # the other sections stay
    (index,) = card.data.to_dict()["model-index"]
    assert {metric["type"] for metric in index["results"][0]["metrics"]} == {"clip_score", "cmmd"}


def test_a_second_evaluation_replaces_the_first_and_leaves_the_rest(result: EvaluationResult, adapter: Path):
    add_to_card(result, adapter, dataset_name="COCO", setting="base")
    path = adapter / "README.md"
    path.write_text(path.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\nBy hand.\n")
    add_to_card(result, adapter, dataset_name="COCO")
    add_to_card(result, adapter, dataset_name="PartiPrompts")
    again = path.read_text()
    assert again.count("## Evaluation") == 1 and "On PartiPrompts." in again
    assert again.endswith("By hand.\n")
    card = ModelCard(again)
    assert card.data.license == "mit"
    values = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert values[("COCO", "clip_score")] == values[("PartiPrompts", "clip_score")] == 0.285
    assert len(values) == 4


def test_results_of_training_stay_beside_those_of_an_evaluation(result: EvaluationResult, adapter: Path):
    path = adapter / "README.md"
    trained = model_card(SoftREPAConfig.for_denoiser(tiny.unet()), "user/mine")
    trained.data["model_name"] = "user/mine"
    top1 = {"task_type": "text-to-image", "dataset_type": "held-out", "dataset_name": "held out"}
    trained.data["eval_results"] = [EvalResult(**top1, metric_type="accuracy", metric_value=0.5)]
    trained.text += "\n" + section("training", "How.") + "\n"
    path.write_text(str(trained))
    add_to_card(result, adapter, dataset_name="COCO")
    card = ModelCard.load(path)
    assert {one.metric_type for one in card.data.eval_results} == {"accuracy", "clip_score", "cmmd"}
    assert card.data.model_name == "user/mine"
    trained.data["eval_results"][0].metric_value = 0.75
    values = {
        one.metric_type: one.metric_value for one in ModelCard(refreshed(str(card), str(trained))).data.eval_results
    }
    assert values == {"accuracy": 0.75, "clip_score": 0.285, "cmmd": 0.4}


def test_a_card_written_by_hand_is_left_alone_and_a_missing_one_is_written(result: EvaluationResult, adapter: Path):
    (adapter / "README.md").write_text("# Mine\n")
    add_to_card(result, adapter, dataset_name="COCO")
    assert (adapter / "README.md").read_text() == "# Mine\n"
    (adapter / "README.md").unlink()
    add_to_card(result, adapter, dataset_name="COCO")
    card = (adapter / "README.md").read_text()
    assert "## Use it" in card and "## Evaluation" in card
    with pytest.raises(OSError, match=r"there is no adapter_config.json in .*nowhere"):
        add_to_card(result, adapter / "nowhere", dataset_name="COCO")
    with pytest.raises(KeyError, match="there is no"):
        add_to_card(result, adapter, dataset_name="COCO", setting="other")


def test_card_and_image_are_pushed(hub: Any, result: EvaluationResult, adapter: Path, tmp_path: Path):
    token = hub.add_user("alice")
    pipe = tiny.sd15_pipeline()
    pipe.load_softrepa(adapter)
    pipe.save_softrepa(adapter, push_to_hub=True, repo_id="alice/tokens", token=token)
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    url = add_to_card(
        result, adapter, dataset_name="COCO", grid=tmp_path / "grid.png", repo_id="alice/tokens", token=token
    )
    assert url is not None
    files = hub.files("alice/tokens")
    assert {"README.md", "evaluation.png", "adapter_model.safetensors"} <= files.keys()
    card = files["README.md"].decode()
    assert "## Evaluation" in card and "user/this-adapter" not in card
    ModelCard(card).validate()


# Images drawn elsewhere.


def test_images_drawn_elsewhere_are_scored(tmp_path: Path):
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(4)]
    drawn[3].save(tmp_path / "3.png")
    images = {"before": drawn[:2], "after": [drawn[2], tmp_path / "3.png"]}
    found = score(images, ["a cat", "a dog"], [FunctionMetric(brightness), ColorDistance(REFERENCES)])
    expected = [np.asarray(image).mean() / 255 for image in drawn]
    assert found.scores["brightness/all"].flatten().tolist() == pytest.approx(expected)
    assert found.row("after", "brightness/all").difference == pytest.approx(
        sum(expected[2:]) / 2 - sum(expected[:2]) / 2
    )
    assert len(found.distances["colors"]) == 2
    with pytest.raises(ValueError, match="an image for each of 2 prompts, but after has 1"):
        score({"before": drawn[:2], "after": drawn[:1]}, ["a cat", "a dog"], [brightness])


def test_the_oracle_of_the_shapes_world_is_a_metric_with_skills_as_categories(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "shapes_world"))
    import oracle
    import world

    rng = np.random.default_rng(0)
    asks = [world.random_ask(rng, skill) for skill in ("colors", "counting") for _ in range(3)]
    prompts = [Prompt(str(number), ask.caption, ask.skill, {"ask": ask}) for number, ask in enumerate(asks)]
    wrong = [next(iter(kind for kind in ask.negatives().values() if kind))[0] for ask in asks]

    def verdict(images: Any, prompts: Any) -> dict[str, list[float]]:
        found = [oracle.judge(image, prompt.metadata["ask"]) for image, prompt in zip(images, prompts, strict=True)]
        return {"correct": [one.correct for one in found], "quality": [one.quality for one in found]}

    images = {
        "wrong": [world.render(ask.scene(rng)) for ask in wrong],
        "right": [world.render(ask.scene(rng)) for ask in asks],
    }
    found = score(images, prompts, [FunctionMetric(verdict, "oracle")])
    for skill in ("colors", "counting"):
        row = found.row("right", "oracle/correct", skill)
        assert (row.mean, row.difference, row.better, row.count) == (1.0, 1.0, 1.0, 3)
    assert "### oracle/correct by category" in found.to_markdown()
