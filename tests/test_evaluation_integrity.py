"""An evaluation does not mislead: images know what they were drawn with, and what is asked for is checked first."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import tiny
from diffusers_softrepa.evaluation import EvaluationResult, FunctionMetric, GenEval, Prompt, load_prompts, score
from diffusers_softrepa.evaluation.lengths import check_lengths
from diffusers_softrepa.evaluation.provenance import CutImage, facts_of, save_with_facts
from diffusers_softrepa.evaluation.writing import RESULT_FILES, write_result
from evaluation_runs import PROMPTS, Counted, brightness, pipeline, run

SHORT: dict[str, Any] = {"adapters": [None, "a"], "seeds": [0], "metrics": [], "prompts": PROMPTS[:2]}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "out"
    run(folder, pipe=Counted(pipeline(), folder.with_name("log.txt")), **SHORT)
    return folder


@pytest.fixture
def copy(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "out"))


def again(folder: Path, log: Path, **more: Any) -> list[str]:
    """Evaluates once more and returns what was drawn for it."""
    run(folder, pipe=Counted(more.pop("pipe", None) or pipeline(), log), **SHORT | more)
    return log.read_text().splitlines() if log.is_file() else []


# What an image keeps.


def test_what_was_saved_is_read_back_from_the_file_alone(tmp_path: Path):
    image = Image.effect_noise((7, 5), 90).convert("RGB")
    save_with_facts(image, tmp_path / "a.png", {"steps": 3, "text": "жанр 🎨"})
    shutil.move(tmp_path / "a.png", tmp_path / "elsewhere.png")
    assert facts_of(tmp_path / "elsewhere.png") == {"steps": 3, "text": "жанр 🎨"}
    with Image.open(tmp_path / "elsewhere.png") as file:
        assert np.array_equal(np.asarray(file), np.asarray(image))


def test_an_image_that_is_cut_at_any_byte_is_no_whole_image(tmp_path: Path):
    path = tmp_path / "a.png"
    save_with_facts(Image.effect_noise((16, 16), 90).convert("RGB"), path, {})
    whole = path.read_bytes()
    for length in (0, 1, 8, 40, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(CutImage, match="is truncated, damaged or not an image"):
            facts_of(path)


def test_an_image_that_was_changed_or_drawn_elsewhere_has_no_facts(tmp_path: Path):
    path = tmp_path / "a.png"
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    save_with_facts(image, path, {"steps": 3})
    with Image.open(path) as file:
        kept = file.info["softrepa"]
        other = file.copy()
    other.putpixel((3, 3), (1, 2, 3))
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("softrepa", kept)
    other.save(path, pnginfo=chunks)
    assert facts_of(path) is None
    image.save(path)
    assert facts_of(path) is None
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("softrepa", "{not json")
    image.save(path, pnginfo=chunks)
    assert facts_of(path) is None


# Going on.


@pytest.mark.parametrize(
    ("name", "is_folder", "message"),
    [
        *((name, True, f"{name} must be a file, but is a folder") for name in ("manifest.json", *RESULT_FILES)),
        (f"images/a/{PROMPTS[0].id}-0.png", True, "-0.png must be a file, but is a folder"),
        ("images", False, "output_dir must be a folder, but .*images is a file"),
        ("images/a", False, "output_dir must be a folder, but .*a is a file"),
    ],
)
def test_what_is_in_the_way_of_a_file_is_seen_before_anything_is_drawn(
    tmp_path: Path, name: str, is_folder: bool, message: str
):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if is_folder else path.write_text("mine")
    with pytest.raises(ValueError, match=message):
        again(tmp_path / "out", tmp_path / "log.txt")
    assert not (tmp_path / "log.txt").exists()
    assert path.is_dir() if is_folder else path.read_text() == "mine"


def test_without_a_manifest_images_are_still_not_mixed_with_others(copy: Path, tmp_path: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="drawn with something else: num_inference_steps was 2, is 3"):
        again(copy, tmp_path / "log.txt", num_inference_steps=3)
    other = pipeline()
    next(iter(other.softrepa_parameters("a").values())).data += 1
    with pytest.raises(ValueError, match="drawn with something else: setting 'a' was"):
        again(copy, tmp_path / "log.txt", pipe=other)
    with pytest.raises(ValueError, match="prompt '0' was 'a red cat', is 'a blue cat'"):
        again(copy, tmp_path / "log.txt", prompts=[Prompt("0", "a blue cat")])
    assert not (copy / "manifest.json").exists()
    assert again(copy, tmp_path / "log.txt") == []
    assert len(json.loads((copy / "manifest.json").read_text())["images"]) == 4


def test_a_cut_image_is_drawn_again_and_is_the_same(
    copy: Path, drawn: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cut = copy / "images" / "a" / "1-0.png"
    cut.write_bytes(cut.read_bytes()[:200])
    assert len(again(copy, tmp_path / "log.txt")) == 1
    assert cut.read_bytes() == (drawn / "images" / "a" / "1-0.png").read_bytes()
    assert f"{cut} is truncated or damaged and will be drawn again" in caplog.messages


@pytest.mark.parametrize("how", ["another prompt's", "another setting's", "somebody else's"])
def test_an_image_in_the_place_of_another_one_is_seen_and_nothing_is_drawn(copy: Path, tmp_path: Path, how: str):
    place = copy / "images" / "a" / "1-0.png"
    if how == "another prompt's":
        shutil.copy(copy / "images" / "a" / "0-0.png", place)
    elif how == "another setting's":
        shutil.copy(copy / "images" / "base" / "1-0.png", place)
    else:
        Image.new("RGB", (16, 16)).save(place)
    (copy / "images" / "base" / "0-0.png").unlink()
    with pytest.raises(ValueError, match=r"1-0\.png (was drawn with something else|is not as evaluate drew it)"):
        again(copy, tmp_path / "log.txt")
    assert not (tmp_path / "log.txt").exists()


# What is asked for.


@pytest.mark.parametrize("seeds", [[0, 1.5], ["0"], [True, 0], [-1], [0, 0], None])
def test_a_seed_is_a_whole_number_from_0(tmp_path: Path, seeds: Any):
    with pytest.raises((ValueError, TypeError)):
        run(tmp_path / "out", **SHORT | {"seeds": seeds})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "id": 1.5}], "the id must be a string or a whole number, but number 0 of the list has 1.5"),
        ([{"prompt": "a", "id": ["x"]}], "the id must be a string"),
        ([{"prompt": "a", "id": True}], "the id must be a string"),
        ([{"prompt": "a", "id": " "}], "each prompt needs an id"),
        ([{"prompt": "a", "category": {"x": 1}}], "the category must be a string or a whole number"),
        ([{"prompt": ["a"]}], "a prompt must be a string that is not empty, but number 0 of the list has"),
        ([{"prompt": "  "}], "a prompt must be a string that is not empty"),
        ([Prompt("x", 3)], "the text of a prompt must be a string, but is 3"),  # type: ignore[arg-type]
        ([Prompt(3, "x")], "the id of a prompt must be a string"),  # type: ignore[arg-type]
        ([Prompt("x", "y", 3)], "the category of a prompt must be a string"),  # type: ignore[arg-type]
        ([Prompt("x", "y", "")], "the category of prompt 'x' is empty"),
        ([Prompt("x", "half \ud83d")], "has a lone surrogate"),
        ([Prompt("x\0", "y")], "has a lone surrogate or a null character"),
        ([Prompt("Cat", "y"), Prompt("cat", "z")], "ids must differ in more than case"),
    ],
)
def test_what_cannot_be_an_id_a_category_or_a_text_is_refused(rows: Any, message: str):
    with pytest.raises(ValueError, match=message):
        load_prompts(rows)


def test_empty_cells_are_no_category():
    rows = [{"prompt": "a", "category": value} for value in (None, float("nan"), "", " ")]
    assert [prompt.category for prompt in load_prompts(rows)] == [None] * 4


def test_a_prompt_that_no_encoder_reads_to_its_end_is_refused_before_anything_is_drawn(tmp_path: Path):
    long = [Prompt("ok", "a cat"), Prompt("long", "a cat and a dog and a bird and a cow")]
    with pytest.raises(
        ValueError, match=r"prompt 'long' has 28 tokens of tokenizer, but .* reads 24: .*allow_truncation"
    ):
        run(tmp_path / "out", **SHORT | {"prompts": long}, pipe=pipeline())
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", **SHORT | {"prompts": long, "adapters": [None]}, allow_truncation=True)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2


def test_one_encoder_that_reads_a_prompt_to_its_end_is_enough():
    pipe = tiny.sd3_pipeline()
    pipe.tokenizer_3.model_max_length = 512
    long = [Prompt("long", "a cat and a dog and a bird and a cow")]
    check_lengths(pipe, long, {"max_sequence_length": 64})
    with pytest.raises(ValueError, match="prompt 'long' has"):
        check_lengths(pipe, long, {"max_sequence_length": 24})


def test_metrics_say_what_prompts_lack_before_anything_is_drawn(tmp_path: Path):
    with pytest.raises(ValueError, match="prompt '0' has no 'include'"):
        run(tmp_path / "out", **SHORT | {"metrics": [GenEval()]})
    assert not (tmp_path / "out").exists()


def test_a_pipeline_whose_tokenizer_names_no_limit_takes_any_prompt():
    pipe = tiny.sd15_pipeline()
    pipe.tokenizer.model_max_length = 10**30
    check_lengths(pipe, [Prompt("0", "a cat " * 100)], {})


# Further ways to mislead.


def refused(folder: Path, log: Path, message: str, **more: Any) -> None:
    with pytest.raises(ValueError, match=message):
        again(folder, log, **more)
    assert not log.exists()


def test_a_lora_whose_scale_or_activity_changed_is_seen(tmp_path: Path):
    def with_lora(scale: float, *, active: bool = True) -> Any:
        pipe = pipeline()
        torch.manual_seed(1)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        pipe.set_adapters("style", scale)
        if not active:
            pipe.disable_lora()
        return pipe

    folder, log = tmp_path / "out", tmp_path / "log.txt"
    assert len(again(folder, log, pipe=with_lora(1.0))) == 4
    log.unlink()
    assert again(folder, log, pipe=with_lora(1.0)) == []
    refused(folder, log, "LoRA of unet was", pipe=with_lora(0.5))
    refused(folder, log, "LoRA of unet was", pipe=with_lora(1.0, active=False))
    refused(folder, log, "weights of unet was", pipe=pipeline())


def test_weights_that_went_through_half_precision_are_seen(copy: Path, tmp_path: Path):
    other = pipeline()
    other.text_encoder.to(torch.bfloat16)
    refused(copy, tmp_path / "log.txt", "weights of text_encoder was", pipe=other)


def test_a_manifest_that_was_edited_to_fit_does_not_excuse_the_images(copy: Path, tmp_path: Path):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"num_inference_steps": 2', '"num_inference_steps": 3'))
    refused(copy, tmp_path / "log.txt", r"-0\.png was drawn with something else", num_inference_steps=3)


def test_a_prompt_of_a_hundred_thousand_characters_is_refused_or_drawn_and_never_breaks_a_file(tmp_path: Path):
    endless = [Prompt("endless", "a red cat and жанр " * 6000)]
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match=r"prompt 'endless' has .* tokens") as caught:
        run(folder, **SHORT | {"prompts": endless})
    assert len(str(caught.value)) < 500 and not folder.exists()
    for _ in range(2):  # the second time nothing is drawn
        assert len(again(folder, tmp_path / "log.txt", prompts=endless, allow_truncation=True)) == 2
    with Image.open(folder / "grid.png") as sheet:
        assert sheet.height < 1500
    assert EvaluationResult.load(folder).texts == [endless[0].text]


def test_names_of_settings_that_differ_in_case_alone_are_refused(tmp_path: Path):
    pipe = pipeline()
    pipe.add_softrepa(adapter_name="A")
    with pytest.raises(ValueError, match="settings must differ in more than case"):
        run(tmp_path / "out", pipe=pipe, **SHORT | {"adapters": ["a", "A"]})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "x", [1.0, None]])
def test_a_weight_that_is_no_number_is_refused_before_anything_is_drawn(tmp_path: Path, weight: Any):
    with pytest.raises(ValueError, match=r"the weight of 'a' must be a finite number, at most 1e.06 in size, but is"):
        run(tmp_path / "out", **SHORT | {"adapters": [{"a": weight}]})
    assert not (tmp_path / "out").exists()


def test_a_setting_has_every_weight_that_set_softrepa_takes(tmp_path: Path):
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(adapter_name="a")
    torch.nn.init.normal_(pipe.softrepa_parameters("a")["tokens"], std=2.0)
    pipe.add_softrepa(adapter_name="b")
    pipe.set_softrepa({"a": 1.0, "b": None})
    layers = len(pipe.softrepa_parameters("a")["tokens"])
    settings = [None, "a", pipe.get_softrepa_adapters(), {"a": [0.0] * layers}, {"a": {0: 1}}]
    given = SHORT | {"adapters": settings, "metrics": [brightness]}
    result = run(tmp_path / "out", pipe=pipe, **given)
    assert result.settings == ["base", "a", "a:1", "a:" + ",".join(["0"] * layers), "a:0=1"]
    base, full, as_found, off, on = (result.row(setting, "brightness/all").mean for setting in result.settings)
    assert off == base != full == as_found == on
    run(tmp_path / "out", pipe=pipe, **given)  # goes on, which compares the weights with those of the images


@pytest.mark.parametrize("weight", [[1.0] * 9, {0: 1.0}, {"up": 1.0}, [[1.0]]], ids=str)
def test_weights_for_other_stages_are_refused_before_anything_is_drawn(tmp_path: Path, weight: Any):
    with pytest.raises(ValueError, match=r"stages \['down'\]"):
        run(tmp_path / "out", **SHORT | {"adapters": [None, {"a": weight}]})
    assert not (tmp_path / "out").exists()


def test_two_metrics_cannot_write_one_score(tmp_path: Path):
    one = FunctionMetric(lambda images, prompts: {"x": [0.0] * len(images)}, "m")
    other = FunctionMetric(lambda images, prompts: [1.0] * len(images), "m/x")
    with pytest.raises(ValueError, match="two metrics return scores named m/x"):
        run(tmp_path / "out", **SHORT | {"metrics": [one, other]})


def test_an_infinite_score_shows_and_breaks_no_table(tmp_path: Path):
    endless = FunctionMetric(lambda images, prompts: [float("inf")] * len(images), "m")
    result = run(tmp_path / "out", **SHORT | {"metrics": [endless]})
    assert "inf" in result.to_markdown()


def test_lines_of_a_file_are_its_prompts_whatever_stands_inside_them(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\u2028on a mat\r\n\x0ba dog\n\n".encode())
    assert [prompt.text for prompt in load_prompts(tmp_path / "a.txt")] == ["a cat\u2028on a mat", "a dog"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"\n')
    with pytest.raises(ValueError, match=r"line 2 of .*a\.jsonl is not JSON"):
        load_prompts(tmp_path / "a.jsonl")
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\na cat\tAnimals\textra\n")
    with pytest.raises(ValueError, match=r"line 2 of .*a\.tsv has 3 cells, but the first line names 2"):
        load_prompts(tmp_path / "a.tsv")
    (tmp_path / "a.txt").write_bytes("жанр".encode("cp1251"))
    with pytest.raises(ValueError, match=r"line 1 of .*a\.txt is not UTF-8"):
        load_prompts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "content",
    [
        {"images": [{"id": 1}], "annotations": []},
        {"images": [], "annotations": [{"image_id": 1, "caption": None}]},
        {"images": [{"id": "x", "file_name": "a.jpg"}], "annotations": []},
        {"images": 3, "annotations": []},
        [],
    ],
)
def test_a_file_that_is_not_cocos_says_so(tmp_path: Path, content: Any):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must be a COCO captions file, with `images` \(id, file_name\)"):
        load_prompts(tmp_path / "a.json")


def test_a_result_that_was_cut_or_is_another_file_says_so(copy: Path, tmp_path: Path):
    again(copy, tmp_path / "log.txt", metrics=[FunctionMetric(brightness)])
    path = copy / "results.json"
    whole = path.read_text()
    for text in (whole[:-40], "{}", "[]", whole.replace('"seeds": [\n  0', '"seeds": [\n  0, 1')):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"results\.json is not"):
            EvaluationResult.load(copy)


def test_result_files_are_written_whole_or_not_at_all(copy: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    result, kept = EvaluationResult.load(copy), Image.new("RGB", (8, 8))

    def full(partial: Any, path: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_softrepa.files.move_into_place", full)
    with pytest.raises(OSError, match="No space left"):
        write_result(result, copy, kept, None)
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_a_plot_of_an_earlier_evaluation_does_not_stay_beside_new_numbers(copy: Path, tmp_path: Path):
    (copy / "plot.png").write_bytes(b"old")
    again(copy, tmp_path / "log.txt")  # no metrics, so there is nothing to plot
    assert not (copy / "plot.png").exists()


# What is asked for is checked before anything is drawn.


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"seeds": None}, ValueError, "seeds must be a list of different whole numbers of at least 0, .* but is None"),
        ({"seeds": torch.tensor(1)}, ValueError, r"seeds must be a list .* but is tensor\(1\)"),
        ({"prompts": None}, TypeError, "prompts must be a file, a data set or a list of strings, but are None"),
        ({"output_dir": None}, TypeError, "output_dir must be a path, but is None"),
        ({"number_of_steps": 3}, ValueError, "StableDiffusion.*Pipeline takes no number_of_steps; leave it out"),
        ({"adapters": [{"a": "0.5"}]}, ValueError, "the weight of 'a' must be a finite number, .* but is '0.5'"),
        ({"adapters": [{"a": True}]}, ValueError, "the weight of 'a' must be a finite number, .* but is True"),
        ({"adapters": [{"a": 10**400}]}, ValueError, "the weight of 'a' must be a finite number, .* of 1329 bits"),
        ({"adapters": [{"a": torch.tensor([0.5])}]}, ValueError, "the weight of 'a' must be a finite number"),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_kind_are_refused_before_anything_is_drawn(
    tmp_path: Path, asked: dict[str, Any], error: type[Exception], message: str
):
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(adapter_name="a")
    given = {"output_dir": tmp_path / "out", **SHORT, **asked}
    with pytest.raises(error, match=message):
        run(pipe=pipe, **given)
    assert not (tmp_path / "out").exists()


def test_a_run_that_drew_nothing_does_not_bind_the_next_one(tmp_path: Path):
    with pytest.raises(ValueError, match="divisible by"):
        again(tmp_path / "out", tmp_path / "log.txt", height=15)
    again(tmp_path / "out", tmp_path / "log.txt")
    with pytest.raises(ValueError, match=r"holds images drawn with something else: .*height was"):
        again(tmp_path / "out", tmp_path / "log.txt", height=32)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "odd must be one number for each of 2 images, but is None"),
        (["x", "y"], r"odd must be one number for each of 2 images, but is \['x', 'y'\]"),
        (torch.zeros(2, dtype=torch.complex64), "odd must be one number for each of 2 images, but is torch.complex64"),
        ({"part": [1.0]}, r"odd/part must be one number for each of 2 images, but is torch.float32 of shape \(1,\)"),
    ],
    ids=str,
)
def test_what_a_metric_returns_is_checked(found: Any, message: str):
    images = [Image.new("RGB", (8, 8))] * 2
    with pytest.raises(ValueError, match=message):
        score({"drawn": images}, ["a", "b"], [FunctionMetric(lambda _images, _prompts: found, "odd")])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([1], ValueError, r"images to score must be a mapping of settings to lists of images, but are \[1\]"),
        ({"x": "a"}, ValueError, "each setting needs an image for each of 1 prompts"),
        ({"x": [5]}, TypeError, "an image must be a PIL image or a path, but is 5"),
        ({"x": ["nowhere.png"]}, FileNotFoundError, "nowhere.png"),
    ],
    ids=str,
)
def test_what_is_no_image_is_refused_before_a_metric_is_loaded(images: Any, error: type[Exception], message: str):
    metric = FunctionMetric(lambda *_: pytest.fail("the metric was called"), "never")
    with pytest.raises(error, match=message):
        score(images, ["a cat"], [metric])
