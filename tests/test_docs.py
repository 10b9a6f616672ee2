"""What the guides tell readers to type works: marked Python runs, commands and files of settings are read."""

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import tiny
from diffusers_softrepa import training
from test_cli import cli  # noqa: F401

DOCS = Path(__file__).parents[1] / "docs"
# What makes a run of the guide's code short.
SHORT = {
    "resolution": 16,
    "max_steps": 1,
    "mixed_precision": "no",
    "train_batch_size": 3,
    "max_sequence_length": 24,
    "num_validation_inference_steps": 1,
    "dataloader_num_workers": 0,
    "report_to": "none",
}


def blocks(page: str, language: str, *, marked: bool = False) -> list[str]:
    """Returns the blocks of a page in a language, for a machine without a GPU."""
    mark = r"<!-- run -->\n" if marked else ""
    found = re.findall(rf"{mark}```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return [block.replace('"cuda"', '"cpu"') for block in found]


def make_photos(folder: Path) -> None:
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"image {number}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def test_the_python_of_the_training_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    make_photos(tmp_path / "eval-photos")
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: tiny.sd3_pipeline())
    monkeypatch.setattr(StableDiffusion3Pipeline, "to", lambda pipe, *_, **__: pipe)  # there may be no GPU
    original = training.ContrastiveFlowMatchingArguments
    short = functools.wraps(original)(lambda **settings: original(**(settings | SHORT)))
    monkeypatch.setattr(training, "ContrastiveFlowMatchingArguments", short)
    code = blocks("training.md", "python", marked=True)
    assert len(code) == 6
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    assert (tmp_path / "my-tokens" / "README.md").is_file()
    assert names["further"].adapter_name in names["pipe"].get_softrepa_adapters()
    assert names["smaller"].adapter.config.num_tokens == 8


def test_the_command_lines_of_the_training_guide_are_understood(
    cli: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (settings,) = blocks("training.md", "yaml")
    Path("settings.yaml").write_text(settings)
    lines = "".join(blocks("training.md", "bash")).replace("\\\n", "").splitlines()
    commands = [
        shlex.split(line)[5:] for line in lines if line.startswith("accelerate launch -m diffusers_softrepa train")
    ]
    assert len(commands) == 3
    for argv in commands:
        model, data, args = cli.parse(argv)
        assert model.pretrained_model_name_or_path.startswith("stabilityai/")
        assert (data.train_data, args.max_steps, args.output_dir) == ("photos", 2000, "my-tokens")


def test_every_setting_and_file_that_the_training_guide_names_exists():
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    from diffusers_softrepa.training import card
    from diffusers_softrepa.training.log import LOG_NAME

    for name in (card.CURVES_NAME, card.VALIDATION_NAME, card.SETTINGS_NAME, LOG_NAME):
        assert f"`{name}`" in text
    settings = set(training.ContrastiveFlowMatchingArguments.__dataclass_fields__)
    assigned = set(re.findall(r"`(\w+)=", text)) - {"objective", "is_trainable"}
    assert assigned <= settings, assigned - settings
