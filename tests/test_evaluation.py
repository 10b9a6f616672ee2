"""An evaluation draws each image once, whatever happens, and leaves tables that add up."""

import csv
import io
import json
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from diffusers_softrepa import get_softrepa_adapters
from diffusers_softrepa.evaluation import EvaluationResult, FunctionMetric, ImageMetric, Metric, evaluate
from diffusers_softrepa.evaluation.gallery import generator_seed
from diffusers_softrepa.evaluation.images import grid
from diffusers_softrepa.evaluation.statistics import clustered_mean, share_better
from evaluation_runs import ADAPTERS, CALL, PROMPTS, REFERENCES, ColorDistance, Counted, brightness, pipeline, run

IMAGES = len(ADAPTERS) * len(PROMPTS) * 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationResult, list[str]]:
    """An evaluation: its folder, its result and what was drawn for it."""
    folder = tmp_path_factory.mktemp("evaluation")
    result = run(folder / "out", pipe=Counted(pipeline(), folder / "drawn.txt"))
    return folder / "out", result, (folder / "drawn.txt").read_text().splitlines()


def images_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).astype(int)
        for path in sorted((folder / "images").rglob("*.png"))
    }


def tables_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("results.md", "results.csv", "results.json")]


# Drawing.


def test_every_image_is_drawn_once_in_its_setting(finished: Any):
    _, _, drawn = finished
    assert len(drawn) == len(set(drawn)) == IMAGES
    active = Counter(line.split("}")[0] + "}" for line in drawn)
    assert active == {
        "{'a': None, 'b': None}": IMAGES // 3,
        "{'a': 1.0, 'b': None}": IMAGES // 3,
        "{'a': 0.5, 'b': None}": IMAGES // 3,
    }


def test_settings_share_the_noise_and_prompts_do_not():
    seeds = {generator_seed(prompt.id, seed) for prompt in PROMPTS for seed in (0, 1)}
    assert len(seeds) == 6


def test_a_image_is_what_the_pipeline_draws_from_its_seed(finished: Any):
    folder, _, _ = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["images"]) == IMAGES
    pipe = pipeline()
    for entry in (manifest["images"][0], manifest["images"][-1]):
        if entry["setting"] == "base":
            pipe.disable_softrepa()
        else:
            pipe.enable_softrepa()
            pipe.set_softrepa("a", 0.5)
        generator = torch.Generator().manual_seed(entry["generator_seed"])
        image = pipe(manifest["prompts"][entry["prompt"]], generator=generator, **CALL).images[0]
        assert (np.asarray(image) == np.asarray(Image.open(folder / entry["file"]))).all()


def test_adapters_show(finished: Any):
    images = images_of(finished[0])
    for name in [name for name in images if "/base/" in name]:
        one, half = (images[name.replace("/base/", f"/{other}/")] for other in ("a", "a:0.5"))
        assert (images[name] != one).mean() > 0.2 < (half != one).mean()


def test_the_batch_does_not_change_images(finished: Any, tmp_path: Path):
    run(tmp_path, batch_size=4, metrics=[])
    one, other = images_of(finished[0]), images_of(tmp_path)
    assert one.keys() == other.keys()
    assert max(np.abs(one[name] - other[name]).max() for name in one) <= 1  # rounding of another sum


# Resuming.


def program(settings: dict[str, Any], *launcher: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "1"}
    script = str(Path(__file__).with_name("evaluation_runs.py"))
    command = [sys.executable, *launcher, script, json.dumps(settings)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_run_goes_on_and_draws_nothing_twice(finished: Any, tmp_path: Path):
    killed = program({"output_dir": str(tmp_path / "out"), "fatal": 7})
    assert killed.returncode == -9, killed.stderr
    assert len((tmp_path / "drawn-0.txt").read_text().splitlines()) == 7
    assert not (tmp_path / "out" / "results.json").exists()
    run(tmp_path / "out", pipe=Counted(pipeline(), tmp_path / "drawn-0.txt"))
    drawn = (tmp_path / "drawn-0.txt").read_text().splitlines()
    assert len(drawn) == len(set(drawn)) == IMAGES
    assert drawn == finished[2]
    assert tables_of(tmp_path / "out") == tables_of(finished[0])


def test_half_a_image_is_drawn_again(finished: Any, tmp_path: Path):
    partial = tmp_path / "out" / "images" / "base" / ".0-0.png.17.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\x89PNG half")
    run(tmp_path / "out", adapters=[None], metrics=[])
    assert (
        np.asarray(Image.open(partial.with_name("0-0.png"))) == images_of(finished[0])["images/base/0-0.png"]
    ).all()


def test_two_processes_share_the_work_and_find_the_same(finished: Any, tmp_path: Path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = program({"output_dir": str(tmp_path / "out"), "batch_size": 2}, *launcher)
    assert ran.returncode == 0, ran.stderr[-4000:]
    drawn = [(tmp_path / f"drawn-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert abs(len(drawn[0]) - len(drawn[1])) <= 2
    assert Counter(drawn[0] + drawn[1]) == Counter(finished[2])
    one, other = EvaluationResult.load(tmp_path / "out"), EvaluationResult.load(finished[0])
    assert list(one.directions) == list(other.directions)
    for name, values in other.scores.items():
        torch.testing.assert_close(one.scores[name], values, atol=2e-3, rtol=0, equal_nan=True)
    assert one.distances["colors"] == pytest.approx(other.distances["colors"], abs=2e-3)


def test_settings_prompts_seeds_and_metrics_may_come_later(tmp_path: Path):
    log = tmp_path / "drawn.txt"
    first = run(
        tmp_path / "out", pipe=Counted(pipeline(), log), adapters=[None], prompts=PROMPTS[:2], seeds=[0], metrics=[]
    )
    assert first.directions == {} and len(log.read_text().splitlines()) == 2
    pipe = Counted(pipeline(), log)
    result = run(tmp_path / "out", pipe=pipe, adapters=[None, "b"], prompts=PROMPTS, seeds=[0, 1])
    drawn = log.read_text().splitlines()
    assert len(drawn) == len(set(drawn)) == 12
    assert result.scores["brightness/all"].isfinite().all()
    run(tmp_path / "out", pipe=pipe, adapters=["b"], seeds=[1])
    assert len(log.read_text().splitlines()) == 12
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["images"]) == 12


def test_what_changed_is_named_and_nothing_is_drawn(finished: Any, tmp_path: Path):
    folder, _, _ = finished
    before = tables_of(folder), {name: value.tolist() for name, value in images_of(folder).items()}
    changes: list[tuple[str, Any, dict[str, Any]]] = [
        ("num_inference_steps was 2, is 3", pipeline(), {"num_inference_steps": 3}),
        ("negative_prompt was None, is 'ugly'", pipeline(), {"negative_prompt": "ugly"}),
        ("prompt '1' was 'two dogs', is 'two cats'", pipeline(), {"prompts": [PROMPTS[1].__class__("1", "two cats")]}),
    ]
    other_tokens, other_weights, other_scheduler = pipeline(), pipeline(), pipeline()
    next(iter(other_tokens.softrepa_parameters("a").values())).data += 1
    other_weights.unet.conv_in.weight.data += 1
    other_scheduler.scheduler.register_to_config(timestep_spacing="trailing")
    changes += [
        ("setting 'a' was", other_tokens, {}),
        ("weights of unet was", other_weights, {}),
        ("scheduler.timestep_spacing was 'leading', is 'trailing'", other_scheduler, {}),
    ]
    for message, pipe, settings in changes:
        counted = Counted(pipe, tmp_path / "drawn.txt")
        with pytest.raises(ValueError, match=f"drawn with something else: .*{message}.*give another output_dir"):
            run(folder, pipe=counted, **settings)
    assert not (tmp_path / "drawn.txt").exists()
    assert (tables_of(folder), {name: value.tolist() for name, value in images_of(folder).items()}) == before


# The pipeline.


def test_the_pipeline_is_left_as_found_also_after_an_error(tmp_path: Path):
    pipe = pipeline()
    pipe.set_softrepa(["b", "a"], [0.25, 0.75])
    pipe.disable_softrepa()
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.set_progress_bar_config(desc="mine", disable=True)
    modes = [module.training for module in pipe.unet.modules()]

    def assert_same() -> None:
        assert get_softrepa_adapters(pipe) == {"a": None, "b": None}
        pipe.enable_softrepa()
        assert get_softrepa_adapters(pipe) == {"a": 0.75, "b": 0.25}
        pipe.disable_softrepa()
        assert [module.training for module in pipe.unet.modules()] == modes
        assert pipe._progress_bar_config == {"desc": "mine", "disable": True}

    class Broken(Counted):
        def __call__(self, prompt: Any, **arguments: Any) -> Any:
            assert not any(module.training for module in self.unet.modules())
            if self.get_softrepa_adapters()["a"]:
                raise RuntimeError("out of memory")
            return super().__call__(prompt, **arguments)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "out", pipe=Broken(pipe, tmp_path / "drawn.txt"), metrics=[])
    assert_same()
    run(tmp_path / "whole", pipe=pipe, metrics=[])
    assert_same()


def test_a_pipeline_without_adapters_is_evaluated_as_it_is(tmp_path: Path):
    pipe = tiny.sd3_pipeline()
    call = CALL | {"max_sequence_length": tiny.MAX_LENGTH}
    result = evaluate(pipe, ["a cat", "a dog"], [brightness], output_dir=tmp_path, **call)
    assert result.settings == ["base"]
    assert result.row("base", "brightness/all").count == 2
    assert pipe._progress_bar_config == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": ["c"]}, r"no soft-token adapter is named \['c'\]; loaded are \['a', 'b'\]"),
        ({"adapters": "a"}, r'adapters must be a list such as \[None, "softrepa"\]'),
        ({"adapters": []}, "adapters must be a list"),
        ({"adapters": ["a", "a"]}, "the settings must differ"),
        (
            {"seeds": 3},
            r"seeds must be a list of different whole numbers of at least 0, such as \[0, 1, 2\], but is 3",
        ),
        ({"seeds": [1, 1]}, "seeds must be a list of different whole numbers"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1"),
        ({"generator": None}, "evaluate passes generator to the pipeline itself"),
        ({"metrics": ["fid"]}, "no metric is named 'fid'"),
        ({"prompts": []}, "there are no prompts"),
    ],
)
def test_what_cannot_be_evaluated_is_said_first(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            SimpleNamespace(frames=[]),
            "evaluate needs a pipeline that returns images, but Other returns SimpleNamespace",
        ),
        (SimpleNamespace(images=[]), "drew 0 images for 1 prompts; it must draw one for each"),
    ],
)
def test_what_is_no_image_for_each_prompt_is_refused(tmp_path: Path, output: Any, message: str):
    class Other(Counted):
        def __call__(self, prompt: Any, **arguments: Any) -> Any:
            return output

    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", pipe=Other(pipeline(), tmp_path / "drawn.txt"))


def test_images_that_a_safety_checker_blackened_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Checked(Counted):
        def __call__(self, prompt: Any, **arguments: Any) -> Any:
            return SimpleNamespace(images=[Image.new("RGB", (16, 16))], nsfw_content_detected=[True])

    run(tmp_path, pipe=Checked(pipeline(), tmp_path / "drawn.txt"), adapters=[None], seeds=[0], metrics=[])
    assert len([record for record in caplog.records if "safety_checker=None" in record.message]) == 3


def test_after_a_few_images_the_time_left_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="diffusers_softrepa"):
        run(tmp_path, metrics=[])
    (line,) = (record.message for record in caplog.records if "s per image" in record.message)
    assert line.endswith(" h") and "the remaining 15 take about" in line


def test_metrics_are_closed_also_after_an_error(tmp_path: Path):
    class Broken(ImageMetric):
        name, closed = "broken", False

        def score(self, images: Any, prompts: Any) -> Any:
            raise RuntimeError("no memory")

        def close(self) -> None:
            self.closed = True

    metric = Broken()
    with pytest.raises(RuntimeError, match="no memory"):
        run(tmp_path, metrics=[metric], adapters=[None], seeds=[0])
    assert metric.closed
    with pytest.raises(TypeError, match="must be an ImageMetric or a SetMetric"):
        run(tmp_path, metrics=[type("Neither", (Metric,), {"name": "x"})()], adapters=[None], seeds=[0])


# Numbers.


def test_scores_are_those_of_the_images(finished: Any):
    folder, result, _ = finished
    images = images_of(folder)
    for s, label in enumerate(result.settings):
        for p, prompt in enumerate(PROMPTS):
            for k, seed in enumerate((0, 1)):
                expected = images[f"images/{label}/{prompt.id}-{seed}.png"].mean() / 255
                assert result.scores["brightness/all"][s, p, k].item() == pytest.approx(expected, abs=1e-9)
    assert result.scores["brightness/red"].isnan().sum() == 3 * 2 * 2
    colors = torch.tensor(np.stack([images[f"images/a/{p.id}-{k}.png"].mean((0, 1)) for p in PROMPTS for k in (0, 1)]))
    references = ColorDistance(REFERENCES).reference_features()
    expected = (colors.mean(0) / 255 - references.mean(0)).norm().item()
    assert result.distances["colors"][1] == pytest.approx(expected, abs=1e-6)


def test_means_and_errors_are_clustered_by_prompt():
    values = torch.tensor([[1.0, 3.0], [2.0, math.nan], [6.0, 8.0]], dtype=torch.float64)
    found = clustered_mean(values)
    assert (found.value, found.count) == (4.0, 5)
    clusters = np.array([(1 - 4) + (3 - 4), 2 - 4, (6 - 4) + (8 - 4)])
    assert found.error == pytest.approx(math.sqrt(3 / 2 * (clusters**2).sum()) / 5)
    even = torch.randn(40, 3, dtype=torch.float64)
    assert clustered_mean(even).error == pytest.approx((even.mean(1).std() / math.sqrt(40)).item())
    assert math.isnan(clustered_mean(values[:1]).error)
    assert clustered_mean(torch.full((2, 2), math.nan)).count == 0


def test_seeds_of_one_prompt_are_no_independent_evidence():
    one = torch.randn(30, 1, dtype=torch.float64)
    copied = one.expand(30, 5)
    assert clustered_mean(copied).error == pytest.approx(clustered_mean(one).error)


def test_differences_are_paired(finished: Any):
    _, result, _ = finished
    scores = result.scores["brightness/all"]
    row = result.row("a", "brightness/all")
    differences = scores[1] - scores[0]
    assert row.difference == pytest.approx(differences.mean().item())
    assert row.difference_error == pytest.approx((differences.mean(1).std() / math.sqrt(3)).item())
    assert row.better == share_better(differences, higher_is_better=True)
    assert math.isnan(result.row("base", "brightness/all").difference)
    counting = result.row("a", "brightness/all", "counting")
    assert (counting.count, counting.mean) == (4, pytest.approx(scores[1, 1:].mean().item()))
    with pytest.raises(KeyError, match="there is no score 'x' of setting 'a'"):
        result.row("a", "x")


def test_better_follows_the_direction_and_ties_count_half():
    differences = torch.tensor([1.0, -1.0, -2.0, 0.0, math.nan])
    assert share_better(differences, higher_is_better=True) == 0.375
    assert share_better(differences, higher_is_better=False) == 0.625


# What is left.


def test_the_folder_gets_tables_and_images(finished: Any):
    folder, result, _ = finished
    table = (folder / "results.md").read_text()
    assert "| setting | brightness/all ↑ | brightness/red ↑ | colors ↓ |" in table
    assert "### brightness/all by category" in table and "mean of categories" in table
    assert "nan" not in table
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert {row["category"] for row in rows} == {"", "colors", "counting"}
    assert all(row["difference"] == "" for row in rows if row["setting"] == "base")
    again = EvaluationResult.load(folder)
    assert again.to_markdown() == result.to_markdown() == str(result)
    assert again.to_dict() == result.to_dict()
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    with Image.open(folder / "grid.png") as grid:
        assert grid.width == 3 * 256 + 2 * 4 and grid.height > 3 * 256
    with Image.open(folder / "plot.png") as plot:
        assert len(np.unique(np.asarray(plot.convert("L")))) > 20


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path, adapters=[None], seeds=[0])
    assert (tmp_path / "grid.png").is_file() and not (tmp_path / "plot.png").exists()


def test_a_better_setting_is_bold_and_a_lower_distance_is_better():
    def result(values: torch.Tensor, *, higher_is_better: bool) -> str:
        ids = [str(number) for number in range(values.shape[1])]
        found = EvaluationResult(
            ["base", "a"], ids, ids, [None] * len(ids), [0], {"x": values}, {}, {"x": higher_is_better}
        )
        return found.to_markdown()

    better = torch.stack([torch.zeros(9, 1), 1 + 0.1 * torch.randn(9, 1)]).double()
    assert "(**+0.9" in result(better, higher_is_better=True) and "↑" in result(better, higher_is_better=True)
    assert "**" not in result(better, higher_is_better=False)
    assert "(**-" in result(-better, higher_is_better=False)


def test_names_that_no_file_may_have_are_files_all_the_same(tmp_path: Path):
    prompts = [PROMPTS[0].__class__(name, "a cat") for name in ("../up", "a/b", ".", "x" * 300, "a%2Fb")]
    result = run(tmp_path / "out", prompts=prompts, adapters=[None], seeds=[0], metrics=[FunctionMetric(brightness)])
    assert result.scores["brightness/all"].shape == (1, 5, 1)
    assert len(list((tmp_path / "out" / "images" / "base").iterdir())) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("side", "shown"), [(32, 256), (100, 200), (200, 200), (512, 256)])
def test_a_grid_shows_small_images_enlarged_and_large_ones_reduced(side: int, shown: int):
    colors = Image.effect_noise((side, side), 80).convert("RGB")
    sheet = grid([[colors, colors]], ["a caption"], ["base", "adapter"])
    assert sheet.width == 2 * shown + 4  # with a gap
    if shown >= side:
        there = sheet.crop((0, sheet.height - shown, shown, sheet.height))
        assert there.resize((side, side), Image.Resampling.NEAREST).tobytes() == colors.tobytes()


@pytest.mark.parametrize("caption", ["a red cat", "a red cat " * 20, "w" * 200, "жанр\nand a line", ""])
def test_a_caption_is_whole_above_its_images(caption: str):
    colors = ((255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0))
    rows = [[Image.new("RGB", (90, 70), color) for color in colors[row : row + 2]] for row in (0, 2)]
    pixels = np.asarray(grid(rows, [caption, "short"], max_side=None))
    for number, color in enumerate(colors):
        places = np.argwhere((pixels == color).all(-1))
        assert len(places) == 90 * 70 and {int(column) // 94 for column in places[:, 1]} == {number % 2}
    first = int(np.argwhere((pixels == (255, 0, 0)).all(-1))[0, 0])
    above = pixels[:first]
    assert (above[:, -1] == 255).all() and (above[:, 0] == 255).all()  # no letter is cut at an edge
    assert (above.min() < 255) == bool(caption)


def test_a_caption_of_any_length_leaves_a_grid_that_can_be_opened():
    sheet = grid([[Image.new("RGB", (32, 32))]], ["a cat and " * 20_000])
    assert sheet.width == 256 and sheet.height < 1000
