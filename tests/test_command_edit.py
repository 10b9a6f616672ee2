"""The editing guide's Python runs, and `softrepa edit` does what it says, on a small pipeline in a folder."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import diffusers_softrepa
import tiny
from diffusers_softrepa.commands import edit, models
from diffusers_softrepa.commands.settings import parse
from test_docs import blocks

SHORT = ["--steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def command() -> SimpleNamespace:
    return SimpleNamespace(main=edit.main, DiffusionPipeline=models.DiffusionPipeline)


def strong_adapter(pipe: StableDiffusion3Pipeline, folder: Path) -> Path:
    pipe.add_softrepa()
    for parameter in pipe.softrepa_parameters().values():
        torch.nn.init.normal_(parameter)
    pipe.save_softrepa(folder)
    pipe.unload_softrepa()
    return folder


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline, an adapter and two images."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny.sd3_pipeline()
    strong_adapter(pipe, tmp_path / "my-tokens")
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: pipe)
    rng = np.random.default_rng(0)
    for name, size in (("cat", (17, 24)), ("dog", (16, 24))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(f"{name}.png")
    return tmp_path


def test_the_python_of_the_editing_guide_runs(files: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("flow_edit", "invert", "regenerate"):
        run = getattr(diffusers_softrepa, name)

        def short(*args: Any, run: Any = run, **settings: Any) -> Any:
            small = {"height": 16, "width": 16} if "height" in settings else {}
            return run(*args, **settings | small | {"num_inference_steps": 2, "max_sequence_length": 24})

        monkeypatch.setattr(diffusers_softrepa, name, short, raising=False)
    names: dict[str, Any] = {}
    code = blocks("editing.md", "python", marked=True)
    assert len(code) == 4 == len(blocks("editing.md", "python"))
    for block in code:
        exec(block, names)
    names["pipe"].set_progress_bar_config(disable=True)
    assert (files / "dog.png").is_file() and names["dog"].size == (24, 16)
    assert len(names["animals"]) == 3 and len(names["pets"]) == 2
    assert np.any(np.array(names["base"][0]) != np.array(names["half"][0]))
    assert names["again"].size == names["lion"].size == (24, 16)


def test_the_command_of_the_editing_guide_is_understood(command: SimpleNamespace):
    (line,) = blocks("editing.md", "bash")
    argv = shlex.split(line.replace("\\\n", " "))
    assert argv[:2] == ["softrepa", "edit"]
    (_, given) = parse("edit", "", (models.PipelineOptions, edit.EditOptions), argv[2:])
    assert (given.image, given.adapter, given.adapter_target_guidance_scale) == (["cat.png"], "my-tokens", 10.0)


def test_base_and_adapter_are_laid_side_by_side(
    command: SimpleNamespace, files: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command.DiffusionPipeline, "from_pretrained", StableDiffusion3Pipeline.from_pretrained)
    argv = ["--pipeline", "any", "--image", "cat.png", "dog.png", "--source", "a cat", "a dog", "--target", "a tree"]
    argv += [*SHORT, "--output", "edits/today", "--max_sequence_length", "24"]
    written = command.main([*argv, "--adapter", "my-tokens"])
    assert [path.as_posix() for path in written] == ["edits/today/cat.png", "edits/today/dog.png"]
    with Image.open(written[0]) as opened:
        image = np.array(opened)
    assert image.shape[1:] == (3 * 24 + 2 * 4, 3) and (image[0] == 255).all()
    image, base, adapter = (image[-16:, left : left + 24] for left in (0, 28, 56))
    assert (base != adapter).any() and (image != base).any()
    expected = np.array(Image.open("dog.png"))
    with Image.open(written[1]) as opened:
        assert (np.array(opened)[-16:, :24] == expected).all()
    (again, _) = command.main(argv)
    assert again.as_posix() == "edits/today/cat-1.png"
    with Image.open(again) as opened:
        alone = np.array(opened)[-16:]
    assert alone.shape == (16, 2 * 24 + 4, 3) and (alone[:, 28:] == base).all()


def test_prompts_and_images_that_do_not_go_together_are_refused(
    command: SimpleNamespace, files: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command.DiffusionPipeline, "from_pretrained", StableDiffusion3Pipeline.from_pretrained)
    with pytest.raises(ValueError, match="--target needs one prompt for all images or one for each: 3 for 1"):
        command.main(["--pipeline", "any", "--image", "cat.png", "--source", "a", "--target", *"abc", *SHORT])
