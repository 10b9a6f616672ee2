"""The walk of the training guide: ten images with text files to a trained, pushed and loaded adapter that draws."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import softrepa_command
from shapes_world.drawing import BASE, load_base
from shapes_world.models import MAX_WORDS
from shapes_world.world import SIZE, random_ask, random_background, render

pytest_plugins = ["hub_server"]
MODEL = Path(BASE).resolve()
GUIDE = Path(__file__).parents[1] / "docs" / "training.md"
# The model of the guide is replaced by the one in the repository, and the run is short.
CHANGES = {
    "--pretrained_model_name_or_path": str(MODEL),
    "--resolution": str(SIZE),
    "--max_sequence_length": str(MAX_WORDS),
    "--max_steps": "3",
    "--mixed_precision": "no",
    "--learning_rate": "0.03",
    "--validation_prompts": "two red circles",
    "--num_validation_inference_steps": "2",
    "--hub_model_id": "you/my-tokens",
}


def make_folder(folder: Path, count: int, seed: int) -> None:
    """Writes images with a text file beside each."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        ask = random_ask(rng)
        render(ask.scene(rng), random_background(rng)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(ask.caption + "\n")


def command_of_the_guide() -> list[str]:
    """Returns the options of the first command of the guide, with `CHANGES`."""
    text = GUIDE.read_text(encoding="utf-8").replace("\\\n", "")
    line = re.search(r"accelerate launch -m diffusers_softrepa train +(--.*)", text)
    assert line is not None
    words = line[1].split()
    options = dict(zip(words[::2], words[1::2], strict=True)) | CHANGES
    return [word for pair in options.items() for word in pair] + ["--push_to_hub"]


def test_the_walk_of_the_training_guide(tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("you"))
    make_folder(Path("photos"), 10, seed=0)
    make_folder(Path("eval-photos"), 4, seed=1)
    assert softrepa_command.main(["train", *command_of_the_guide()]) == 0
    for name in ("README.md", "curves.png", "validation.png", "images/00.png", "log.jsonl", "best", "softrepa"):
        assert (Path("my-tokens") / name).exists(), name
    card = ModelCard(hub.files("you/my-tokens")["README.md"].decode())
    assert "### Evaluation" in card.text and 'pipe.load_softrepa("you/my-tokens")' in card.text
    pipe = load_base(MODEL)
    call = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "max_sequence_length": MAX_WORDS}

    def draw() -> bytes:
        return pipe("two red circles", generator=torch.Generator().manual_seed(0), **call).images[0].tobytes()

    base = draw()
    pipe.load_softrepa("you/my-tokens")
    drawn = draw()
    pipe.unload_softrepa()
    pipe.load_softrepa("my-tokens")
    assert drawn == draw() != base
