"""What a finished run leaves: a card with settings, curves and pictures, beside what people wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import tiny
from diffusers_softrepa.checkpoint import save_checkpoint
from diffusers_softrepa.config import SoftREPAConfig
from diffusers_softrepa.objectives import Contrastive
from diffusers_softrepa.tokens import SoftTokens
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer
from diffusers_softrepa.training.card import Report, data_name, draw_curves
from training_runs import At

pytest_plugins = ["hub_server"]

LOG = [
    {"step": 0, "eval/top1": 0.25, "eval/margin": -0.01, "eval/information": 0.0},
    {"step": 10, "loss": 1.4, "top1": 0.3, "margin": 0.0, "information": 0.1, "learning_rate": 1e-3},
    {"step": 10, "eval/top1": 0.75, "eval/margin": 0.02, "eval/information": 0.5},
    {"step": 20, "loss": 1.2, "top1": 0.5, "margin": 0.1, "information": 0.2, "learning_rate": 1e-3},
    {"step": 20, "eval/top1": 0.5, "eval/margin": 0.03, "eval/information": 0.4},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves before its report."""
    config = SoftREPAConfig.for_denoiser(tiny.sd3_transformer(), base_model_name_or_path="somebody/base")
    save_checkpoint(tmp_path, config, dict(SoftTokens(config).state_dict()))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    (tmp_path / "validation").mkdir()
    for step, colour in ((0, "black"), (20, "white")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "validation" / f"step-{step:06d}.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "00.png")
    return tmp_path


def reported(folder: Path, *names: str, images: int | None = 1234, **settings: Any) -> str:
    """Writes a report and returns the card."""
    args = ContrastiveFlowMatchingArguments(output_dir=str(folder), validation_prompts=["a red cat"], **settings)
    Report(args, 20, 4, images, *names).write()
    return (folder / "README.md").read_text()


def test_the_card_says_what_was_learned_from_what_and_how(folder: Path):
    card = reported(folder, "alice/photos", logits="linear", cache_dir="/home/me/secret", hub_token="hf_x")
    assert "1,234 images with captions of [alice/photos]" in card
    assert "| objective | softrepa |" in card and "| logits | linear |" in card
    assert "logit_scale" not in card  # the default
    assert "- a red cat" in card and "![Without and with the soft tokens](validation.png)" in card
    assert "| top-1 of the matched caption | 0.25 | 0.75 | 0.5 |" in card
    for private in ("/home/me", "hf_x", str(folder), "None"):
        assert private not in card
    assert 'pipe.load_softrepa("user/this-adapter")' in card


def test_the_metadata_name_the_data_sets_and_the_result_of_the_evaluation(folder: Path):
    data = ModelCard(reported(folder, "alice/photos", "alice/eval")).data
    assert data.datasets == ["alice/photos", "alice/eval"]
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("alice/eval", "accuracy", 0.5)
    assert "among 4" in result.metric_name


def test_the_folder_gets_curves_the_last_pictures_and_settings_without_the_token(folder: Path):
    reported(folder, hub_token="hf_x", seed=7)
    with Image.open(folder / "curves.png") as curves, Image.open(folder / "validation.png") as pictures:
        assert curves.size == (1320, 704)
        assert len(np.unique(np.asarray(curves.convert("L")))) > 20
        assert pictures.getpixel((4, 4)) == (255, 255, 255)
    settings = json.loads((folder / "training_args.json").read_text())
    assert settings["seed"] == 7 and "hub_token" not in settings
    assert ContrastiveFlowMatchingArguments(**settings).seed == 7


def test_the_gallery_shows_what_was_drawn_with_tokens_for_each_prompt(folder: Path):
    data = ModelCard(reported(folder)).data
    assert data.widget == [{"text": "a red cat", "output": {"url": "images/00.png"}}]


def test_a_picture_drawn_anew_replaces_its_example_in_the_gallery(folder: Path):
    path = folder / "README.md"
    reported(folder)
    mine = "- text: mine\n  output:\n    url: mine.png\n"
    path.write_text(path.read_text().replace("widget:\n", f"widget:\n{mine}").replace("a red cat", "an old cat"))
    gallery = ModelCard(reported(folder)).data.widget
    assert [example["text"] for example in gallery] == ["mine", "a red cat"]


def test_the_licence_stands_in_the_metadata_and_not_among_the_settings(folder: Path):
    card = reported(folder, hub_license="apache-2.0")
    assert ModelCard(card).data.license == "apache-2.0"
    assert "hub_license" not in card
    assert ModelCard(reported(folder)).data.license == "apache-2.0"


def test_a_second_report_replaces_its_section_and_nothing_else(folder: Path):
    reported(folder)
    path = folder / "README.md"
    path.write_text(path.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\nTrained in Oslo.\n")
    again = reported(folder, logits="linear")
    assert again.count("## Training") == 1 and "| logits | linear |" in again
    assert "license: mit" in again and again.endswith("Trained in Oslo.\n")
    assert reported(folder, logits="linear") == again


def test_a_card_written_by_hand_is_not_touched(folder: Path):
    (folder / "README.md").write_text("# Mine\n")
    assert reported(folder) == "# Mine\n"


def test_what_there_is_not_is_not_shown(folder: Path):
    (folder / "log.jsonl").unlink()
    (folder / "validation" / "step-000000.png").unlink()
    (folder / "validation" / "step-000020.png").unlink()
    (folder / "images" / "00.png").unlink()
    card = reported(folder, images=None)
    assert "a stream of images" in card
    assert "### " not in card and "png" not in card
    assert ModelCard(card).data.eval_results is None


def test_a_run_of_one_entry_or_of_parts_of_the_figures_has_curves():
    draw_curves([{"step": 1, "loss": 1.0}], num_captions=4).canvas.draw()
    draw_curves(LOG[:1], num_captions=4).canvas.draw()


@pytest.mark.parametrize(
    ("source", "name"), [("alice/photos", "alice/photos"), ("/data/photos", None), ("photos", None), ([], None)]
)
def test_only_a_hub_id_is_a_name_to_tell(source: Any, name: str | None):
    assert data_name(source) == name


# Through the trainer and to the Hub.


def trainer_of(folder: Path, **settings: Any) -> ContrastiveFlowMatchingTrainer:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(8)]
    data = [{"image": image, "text": f"picture {number}"} for number, image in enumerate(images)]
    args = ContrastiveFlowMatchingArguments(
        output_dir=str(folder),
        resolution=16,
        max_steps=2,
        logging_steps=1,
        eval_steps=1,
        validation_prompts=["a cat"],
        num_validation_inference_steps=1,
        report_to="none",
        dataloader_num_workers=0,
        **settings,
    )
    return ContrastiveFlowMatchingTrainer(tiny.sd15_pipeline(), args, data, data[:4])


def test_training_ends_with_a_report_that_is_pushed(hub: Any, tmp_path: Path):
    token = hub.add_user("alice")
    trainer = trainer_of(tmp_path / "tokens", push_to_hub=True, hub_token=token)
    trainer.train()
    files = hub.files("alice/tokens")
    assert files.keys() == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "curves.png",
        "validation.png",
        "images/00.png",
    }
    assert files["curves.png"] == (tmp_path / "tokens" / "curves.png").read_bytes()
    card = files["README.md"].decode()
    assert 'pipe.load_softrepa("alice/tokens")' in card and "user/this-adapter" not in card
    assert "Learned from 8 images" in card and "### Evaluation" in card
    ModelCard(card).validate()
    fresh = tiny.sd15_pipeline()
    fresh.load_softrepa("alice/tokens", token=token)


def test_a_second_push_keeps_what_was_written_on_the_hub(hub: Any, tmp_path: Path):
    token = hub.add_user("alice")
    trainer = trainer_of(tmp_path, push_to_hub=True, hub_token=token, hub_model_id="alice/mine", hub_private_repo=True)
    trainer.train()
    assert hub.repos["alice/mine"].private
    written = hub.files("alice/mine")["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1) + b"\nBy hand.\n"
    hub.commit("alice/mine", {"README.md": written.replace(b"Learned from", b"Once learned from")})
    trainer.push_to_hub()
    assert hub.files("alice/mine")["README.md"] == written


def test_without_a_login_nothing_is_trained(hub: Any, tmp_path: Path):
    trainer = trainer_of(tmp_path / "out", push_to_hub=True, hub_token="hf_wrong")
    with pytest.raises(OSError, match="pushing needs a Hub login"):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_a_refused_push_leaves_the_folder(hub: Any, tmp_path: Path):
    token = hub.add_user("alice")
    trainer = trainer_of(tmp_path, push_to_hub=True, hub_token=token, hub_model_id="alice/tokens")
    trainer.callbacks.callbacks.append(At("on_step_end", 2, lambda _: hub.users.clear()))
    with pytest.raises(OSError, match=f"the adapter is saved in {tmp_path}"):
        trainer.train()
    assert (tmp_path / "README.md").is_file() and (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("alice/my tokens", ValueError, "is not a valid repository name .* give a hub_model_id such as"),
        ("x/y/z", ValueError, "is not a valid repository name"),
        (None, ValueError, "pushed to 'my tokens', which is not a valid repository name"),
        ("bob/tokens", OSError, "does not let you push to 'bob/tokens'.*rights"),
        ("bob/his", OSError, "does not let you push to 'bob/his'.*rights to write"),
    ],
)
def test_a_repository_that_cannot_be_pushed_to_is_refused_before_the_first_step(
    hub: Any, tmp_path: Path, name: str | None, kind: type[Exception], message: str
):
    token = hub.add_user("alice")
    hub.add_repo("bob/his", {})
    folder = tmp_path / "my tokens"
    trainer = trainer_of(folder, push_to_hub=True, hub_token=token, hub_model_id=name)
    before = [parameter.clone() for parameter in trainer.parameters]
    with pytest.raises(kind, match=message):
        trainer.train()
    assert not folder.exists()
    assert all(map(torch.equal, before, trainer.parameters))


def test_the_repository_is_there_before_the_first_step(hub: Any, tmp_path: Path):
    token = hub.add_user("alice")
    trainer = trainer_of(tmp_path, push_to_hub=True, hub_token=token, hub_model_id="tokens", hub_private_repo=True)
    seen: list[bool] = []
    trainer.callbacks.callbacks.append(
        At("on_step_begin", 0, lambda _: seen.append(hub.repos["alice/tokens"].private))
    )
    trainer.train()
    assert seen == [True]


# What a card may claim.


def test_without_an_evaluation_the_card_claims_no_improvement(folder: Path):
    (folder / "log.jsonl").write_text(json.dumps(LOG[1]) + "\n")
    card = reported(folder)
    assert "No eval_dataset was evaluated in this run" in card
    assert ModelCard(card).data.eval_results is None


@pytest.mark.parametrize(("gain", "told"), [(0.05, "cannot be told from no change"), (0.25, "by +0.25 ± 0.06, the")])
def test_a_gain_of_the_evaluation_has_its_error_in_the_card(folder: Path, gain: float, told: str):
    measured = {"eval/top1_stderr": 0.08, "eval/top1_gain": gain, "eval/top1_gain_stderr": 0.06}
    lines = [json.dumps(entry | (measured if entry["step"] == 20 else {})) for entry in LOG]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    card = reported(folder)
    assert "0.5 ± 0.08" in card
    assert told in card


def test_remarks_of_the_run_and_a_chosen_objective_stand_in_the_card(folder: Path):
    args = ContrastiveFlowMatchingArguments(output_dir=str(folder), validation_prompts=["a red cat"])
    chosen = Contrastive(logits="linear", temperature=0.013)
    Report(args, 20, 4, 8, objective=chosen, warnings=["the logits were saturated"]).write()
    card = (folder / "README.md").read_text()
    assert "### Remarks\n\n- the logits were saturated" in card
    assert "| logits (chosen) | linear |" in card and "| temperature (chosen) | 0.013 |" in card
