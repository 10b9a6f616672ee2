"""The evaluation's command lines, end to end on small pipelines and small scorers."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn

import scorers
import tiny
from diffusers_softrepa.commands import run
from diffusers_softrepa.commands.evaluate import EvaluateOptions
from diffusers_softrepa.commands.models import PipelineOptions
from diffusers_softrepa.commands.settings import parse
from diffusers_softrepa.evaluation import IMAGE_METRICS, SET_METRICS, CLIPScore, Prompt, metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
GUIDE = Path(__file__).parents[1] / "docs" / "evaluation.md"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pipelines, adapters and scorers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, make in (("sd15", tiny.sd15_pipeline), ("sd3", tiny.sd3_pipeline)):
        pipe = make()
        pipe.save_pretrained(folder / name)
        pipe.add_softrepa()
        pipe.save_softrepa(folder / f"{name}-adapter")
    published = folder / "published"
    published.mkdir()
    torch.save(nn.Parameter(torch.randn(3, 2, 48)), published / "dc_tokens.pth")
    torch.save(nn.Embedding(100, 3 * 48), published / "dc_t_tokens.pth")
    scorers.clip(folder / "clip")
    scorers.hps(folder)
    return folder


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for the packages of LPIPS and ImageReward."""

    class Network(nn.Module):
        def __init__(self, net: str, verbose: bool = True) -> None:
            super().__init__()

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return (one - other).square().mean()[None]

    class Reward:
        def score(self, prompt: str, image: Image.Image) -> float:
            return float(np.asarray(image).mean() / 255)

    lpips, reward = ModuleType("lpips"), ModuleType("ImageReward")
    lpips.LPIPS, reward.load = Network, lambda name, device: Reward()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    monkeypatch.setitem(sys.modules, "ImageReward", reward)
    yield


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO captions with their images, and two edits of them."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)]
    captions = [{"image_id": number, "id": number, "caption": f"image {number}"} for number in range(3)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    edits = [
        {"image": "0.jpg", "source_prompt": "a cat", "target_prompt": "a dog"},
        {"img_path": "1.jpg", "prompt": "a red cat", "tgt_prompt": "a blue cat"},
    ]
    (folder / "edits.json").write_text(json.dumps(edits))
    return folder


def paper(models: Path, out: Path, model: str, adapter: str, *more: str) -> list[str]:
    return [
        *("--model", model, "--adapter", str(models / adapter), "--pipeline", str(models / model), "--out", str(out)),
        *("--size", "16", "--steps", "2", "--dtype", "float32", "--clip", str(models / "clip")),
        *("--hps", str(models / "hps.pt"), "--hps_clip", str(models / "hps-clip"), *more),
    ]


def test_the_papers_tables_are_made_from_the_authors_files(
    models: Path, coco: Path, packages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    script = example("reproduce_paper")
    data = ["--captions", str(coco / "captions.json"), "--images", str(coco), "--edits", str(coco)]
    argv = paper(
        models, tmp_path, "sd3", "published", *data, "--limit", "2", "--max_sequence_length", "24", "--edit_steps", "4"
    )
    assert script.main([*argv, "--debug"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "comparison.md").read_text() in printed
    for text in (
        "Other than in the paper: pipeline ",
        "## Generation, sd3",
        "## Editing, div2k",
        "2 prompts x 1 seeds",
        "take about ",
    ):
        assert text in printed, text
    for name in ("image_reward ↑", "clip ↑", "hps ↑", "lpips ↓"):
        assert printed.count(f"| {name} |") == 2
    assert "| image_reward ↑ | 0.942 |" in printed and "| 1.085 |" in printed and "| +0.143 |" in printed
    assert "nan" not in printed
    images = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("0*.png"))
    assert len(images) == 8
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in images}
    assert script.main(argv) == 0  # a second time nothing is drawn
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in images} == before
    assert script.main([*argv, "--edit_steps", "5"]) == 2
    assert "holds edits made with" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_missing_scorers_are_left_out_with_a_sentence(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
):
    for name in ("lpips", "ImageReward"):
        monkeypatch.setitem(sys.modules, name, None)
    if model == "sdxl":
        pipe = tiny.sdxl_pipeline()
        pipe.save_pretrained(tmp_path / "sdxl")
        pipe.add_softrepa()
        pipe.save_softrepa(tmp_path / "sdxl-adapter")
        shutil.copytree(models / "clip", tmp_path / "clip")
        models = tmp_path
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    script = example("reproduce_paper")
    argv = paper(models, tmp_path / "out", model, f"{model}-adapter", "--captions", str(tmp_path / "prompts.txt"))
    argv[argv.index("--hps") + 1] = str(tmp_path / "nowhere.pt")
    if model == "sdxl":
        argv[argv.index("--hps_clip") + 1] = str(models / "clip")
    assert script.main([*argv, "--debug"]) == 0
    printed = capsys.readouterr().out
    assert "image_reward is left out: ImageReward needs the package image-reward, which cannot be imported" in printed
    assert "lpips is left out: LPIPS compares with the images of the captions; give --images" in printed
    assert "hps is left out: HPSv2 needs its checkpoint, but there is no file" in printed
    assert "| clip ↑ | 0.26" in printed


def test_the_published_settings_are_the_papers():
    script = example("reproduce_paper")
    drawn = {
        name: (recipe.size, recipe.steps, recipe.guidance, recipe.ddim) for name, recipe in script.RECIPES.items()
    }
    assert drawn == {
        "sd15": (512, 30, 7.0, True),
        "sdxl": (1024, 30, 7.0, True),
        "sd3": (1024, 28, 4.0, False),
    }
    assert script.RECIPES["sd3"].call == {"max_sequence_length": 512}
    assert [round(50 * share) for share, _ in script.EDIT_SETTINGS.values()] == [33, 30]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to do: give --captions, --edits or both"),
        (["--edits", "x"], "--edits goes with --model sd3"),
    ],
)
def test_what_makes_no_sense_is_said(more: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        example("reproduce_paper").main(["--model", "sd15", "--adapter", "a", "--out", "o", *more])
    assert message in capsys.readouterr().err


def test_adapters_are_compared_on_a_file_of_prompts(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics, "IMAGE_METRICS", {"clip_score": lambda: CLIPScore(str(models / "clip"))})
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red cat\n")
    argv = [
        *("--pipeline", str(models / "sd3"), "--adapter", f"mine={models / 'sd3-adapter'}", "--weights", "0.5", "1"),
        *("--prompts", str(tmp_path / "prompts.txt"), "--limit", "2", "--out", str(tmp_path / "out")),
        *("--seeds", "0", "1", "--steps", "1", "--size", "16", "--max_sequence_length", "24", "--batch_size", "2"),
    ]
    assert run("evaluate", [*argv, "--dry_run"]) == 0
    assert "3 settings x 2 prompts x 2 seeds: 12 images, of which 12 are not in" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run("evaluate", [*argv, "--debug"]) == 0
    printed = capsys.readouterr().out
    assert "| setting | clip_score ↑ |" in printed
    assert all(f"| {name} |" in printed for name in ("base", "mine:0.5", "mine"))
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 12
    assert run("evaluate", [*argv, "--steps", "2"]) == 2
    assert "num_inference_steps was 1, is 2" in capsys.readouterr().err
    assert run("evaluate", [*argv, "--adapter", "other"]) == 2
    assert "an adapter must be given as NAME=SOURCE" in capsys.readouterr().err


def test_the_python_of_the_guide_runs(models: Path, tmp_path: Path, packages: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\n")
    shutil.copytree(models / "sd3-adapter", tmp_path / "my-tokens")
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: tiny.sd3_pipeline())
    monkeypatch.setattr(metrics, "IMAGE_METRICS", {"clip_score": lambda: CLIPScore(str(models / "clip"))})
    code = re.findall(r"<!-- run -->\n```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 4
    names: dict[str, object] = {}
    for block in code:
        exec(block.replace("28", "1").replace('"cuda"', '"cpu"'), names)
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    image.save(tmp_path / "original.png")
    prompts = [Prompt("0", "a cat", metadata={"image": tmp_path / "original.png"})] * 2
    reward, distance = (
        metrics.metric.named_scores(one, [image, Image.new("RGB", (16, 16))], prompts)
        for one in metrics.as_metrics(names["metrics"])
    )
    assert distance["lpips"][0] == 0 < distance["lpips"][1]
    assert reward["image_reward"][0] == pytest.approx(np.asarray(image).mean() / 255) and not reward["image_reward"][1]
    assert "| softrepa |" in (tmp_path / "evaluation" / "results.md").read_text()
    assert "redness/all" in (tmp_path / "my-tokens" / "README.md").read_text()


def test_the_guide_lists_every_metric_with_its_direction_and_paper():
    rows = [
        line.split(" | ")
        for line in GUIDE.read_text(encoding="utf-8").splitlines()
        if "| higher |" in line or "| lower |" in line
    ]
    listed = {name.strip("|` "): row for row in rows for name in row[0].split(",")}
    assert listed.keys() == {*IMAGE_METRICS, *SET_METRICS}
    for name, row in listed.items():
        metric = metrics.make_metric(name, [Image.new("RGB", (8, 8))] * 2)
        assert row[1].strip("`") == type(metric).__name__
        assert row[2] == ("higher" if metric.higher_is_better else "lower")
        assert name == "clip_similarity" or metric.reference.split()[-1] in row[3]


def test_the_command_lines_of_the_guide_are_understood():
    text = GUIDE.read_text(encoding="utf-8")
    starts = ("softrepa evaluate ", "accelerate launch -m diffusers_softrepa evaluate ")
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.startswith(starts)]
    assert len(lines) == 2
    for line in lines:
        _, argv = line.split(" evaluate ")
        parse("evaluate", "", (PipelineOptions, EvaluateOptions), shlex.split(argv))
    (line,) = (
        line for line in text.replace("\\\n", "").splitlines() if line.startswith("python examples/reproduce_paper.py")
    )
    example("reproduce_paper").parser().parse_args(shlex.split(line)[2:])
