"""The `softrepa` command on the embedded pipeline: every sub-command, its settings, errors, outputs and statuses."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import command_options
import softrepa_command
from diffusers_softrepa.checkpoint import load_checkpoint
from diffusers_softrepa.commands import generate, run
from diffusers_softrepa.commands.models import placed_pipeline
from diffusers_softrepa.commands.output import survivable_output
from diffusers_softrepa.compat import pipeline_precision
from diffusers_softrepa.evaluation.images import grid

WORLD = Path(__file__).parents[1] / "examples" / "shapes_world"
ADAPTER = str(WORLD / "adapter")
SD3 = str(WORLD / "sd3")
SHORT = ["--pipeline", SD3, "--steps", "1", "--device", "cpu", "--max_sequence_length", "15"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def environment(**more: str) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    return os.environ | variables | more


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


# The front door.


def test_help_names_every_command_and_imports_no_torch():
    code = (
        "import sys, softrepa_command; status = softrepa_command.main(['--help']); "
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    for name in softrepa_command.COMMANDS:
        assert f"\n  {name} " in shown.stdout


@pytest.mark.parametrize("name", softrepa_command.COMMANDS)
def test_help_of_every_command_is_printed_with_status_0(name: str, capsys: pytest.CaptureFixture[str]):
    assert softrepa_command.main([name, "--help"]) == 0
    assert f"usage: softrepa {name}" in capsys.readouterr().out


def test_help_tells_type_default_and_need_of_an_option(capsys: pytest.CaptureFixture[str]):
    run("generate", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "--pipeline TEXT Pipeline to load: a Hugging Face Hub id, or a folder that save_pretrained wrote. (required)"
        in shown
    )
    assert "--weight NUMBER Weight of the adapter; 0 is the base model. (default: 1.0)" in shown
    assert "--dtype {float32,bfloat16,float16}" in shown


def test_an_unknown_command_is_a_sentence_and_status_2(capsys: pytest.CaptureFixture[str]):
    assert softrepa_command.main(["trein"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no command 'trein'; the commands are train,")
    assert softrepa_command.main([]) == 0


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 2, "error: two lines"),
        (
            FileNotFoundError(2, "No such file or directory", "a.png"),
            2,
            "error: [Errno 2] No such file or directory: 'a.png'",
        ),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (FloatingPointError("the loss is NaN"), 1, "error: the loss is NaN"),
        (RuntimeError("out of memory"), 1, "error: RuntimeError: out of memory"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (AssertionError(), 1, "error: AssertionError"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
):
    def fail(_argv: Any) -> None:
        raise error

    monkeypatch.setattr("diffusers_softrepa.commands.info.main", fail)
    assert run("info", []) == status
    assert capsys.readouterr().err == line + "\n"
    with pytest.raises(type(error)) if status != 130 else pytest.MonkeyPatch.context():
        run("info", ["--debug"])


def test_the_options_on_the_page_of_commands_are_those_that_help_prints(capsys: pytest.CaptureFixture[str]):
    page = command_options.PAGE.read_text(encoding="utf-8")
    assert sorted(command_options.named(page)) == sorted(softrepa_command.COMMANDS.keys() - {"convert"})
    assert command_options.with_options(page) == page, "run `python tests/command_options.py`"
    run("push", ["--help"])
    assert set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"} == set(
        re.findall(r"`(--\w+)`", command_options.table("push"))
    )


# Output.


def test_a_command_shows_no_requests_of_the_hub_and_no_hints_about_torchvision(monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: shown.append(record.getMessage()))
    library, client = logging.getLogger("transformers.utils.import_utils"), logging.getLogger("httpx")
    monkeypatch.setattr(client, "level", logging.INFO)

    def main(_argv: Any) -> None:
        client.info("HTTP Request: GET https://huggingface.co")
        library.error("`CLIPImageProcessor` requires torchvision (not installed); falling back")
        library.error("another message")
        client.warning("another message")

    monkeypatch.setattr("diffusers_softrepa.commands.info.main", main)
    for logger in (library, client):
        logger.addHandler(handler)
    try:
        assert run("info", []) == 0
    finally:
        for logger in (library, client):
            logger.removeHandler(handler)
    assert shown == ["another message"] * 2


def test_output_in_an_encoding_that_lacks_a_character_is_escaped_and_the_status_stays():
    command = [sys.executable, "-m", "diffusers_softrepa", "generate", *SHORT, "--prompt", "жанр", "--dry_run"]
    ran = subprocess.run(
        [*command, "--out", "жанр.png"], env=environment(PYTHONIOENCODING="cp1252"), capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert rb"would write \u0436\u0430\u043d\u0440.png" in ran.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_has_gone_does_not_end_the_work():
    code = (
        "import sys; from diffusers_softrepa.commands.output import survivable_output\n"
        "with survivable_output():\n"
        "    for number in range(100000): print(number)\n"
        "    print('done', file=sys.stderr)\n"
        "sys.exit(7)"
    )
    quiet = environment(PYTHONWARNINGS="ignore", DIFFUSERS_VERBOSITY="error")  # older releases say much when imported
    running = subprocess.Popen(
        [sys.executable, "-c", code], env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == "0\n"
        running.stdout.close()
        assert running.stderr.read() == "done\n"
        assert running.wait() == 7


def test_a_process_without_a_console_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    with survivable_output():
        print("nobody reads this")


# Settings.


def test_a_settings_file_serves_every_command_and_the_command_line_goes_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, write in (("settings.yaml", json.dumps), ("settings.json", json.dumps)):
        content = {"pipeline": SD3, "prompt": ["a red circle"], "seed": 3, "steps": 2, "out": "~/found.png"}
        (tmp_path / name).write_text(write(content))
        assert run("generate", [str(tmp_path / name), "--steps", "5", "--dry_run"]) == 0
        shown = capsys.readouterr().out
        assert '"seed": 3' in shown and '"steps": 5' in shown
        assert f"would write {tmp_path}/found.png" in shown
    (tmp_path / "settings.json").write_text('{"seeed": 3}')
    assert run("generate", ["--config", str(tmp_path / "settings.json")]) == 2
    assert "has unknown settings: seeed; did you mean seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt: 5", "prompt in settings.yaml must be a text, but is 5; write texts in quotes"),
        ("prompt: [a, null]", "prompt in settings.yaml must be a text, but is None; write texts in quotes"),
        ("prompt: {a: b}", "prompt in settings.yaml must be a text, but is {'a': 'b'}"),
        ("prompt: 2020-01-01", "prompt in settings.yaml must be a text, but is datetime.date"),
        ("out: yes", "out in settings.yaml must be a text, but is True; write texts in quotes"),
        ("seed: 1.5", "seed in settings.yaml must be a whole number, but is 1.5"),
        ("seed: true", "seed in settings.yaml must be a whole number, but is True"),
        ("seed: [1]", "seed in settings.yaml must be a whole number, but is [1]"),
        ("seed: 99999999999999999999", "seed must be below 2**63 in size, but is 99999999999999999999"),
        ("weight: .nan", "weight must be a finite number, but is nan"),
        ("dry_run: 1", "dry_run in settings.yaml must be true or false, but is 1"),
        ("dtype: int8", "dtype in settings.yaml must be one of float32, bfloat16, float16, but is 'int8'"),
        ("out: a.png\nout: b.png", "settings.yaml is neither YAML nor JSON: the key 'out' is there twice"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str, message: str
):
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(content)
    rest = ["--pipeline", SD3, *([] if "prompt" in content else ["--prompt", "a"])]
    assert run("generate", ["settings.yaml", *rest]) == 2
    assert message in capsys.readouterr().err


def test_one_text_in_a_file_is_a_list_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "settings.yaml").write_text("prompt: a red circle\nweight: 1\nseed: '7'")
    assert run("generate", [str(tmp_path / "settings.yaml"), "--pipeline", SD3, "--dry_run"]) == 0
    printed = json.loads(capsys.readouterr().out.split("would write")[0])
    assert (printed["prompt"], printed["weight"], printed["seed"]) == (["a red circle"], 1, 7)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "x"], "the following arguments are required: --pipeline"),
        (["--pipeline", SD3, "--prompt", "a", "--sed", "3"], "unknown settings: sed; did you mean seed?"),
        (["--pipeline", SD3, "--prompt", "a", "--seed", "x"], "invalid int value: 'x'"),
        (["--pipeline", "user/model", "--prompt", "a"], "user/model"),
        (
            ["--pipeline", SD3, "--prompt", "a", "--out", ""],
            "the output must name a file, such as image.png, but is ''",
        ),
        (["--pipeline", SD3, "--prompt", "a", "--out", "."], "the output must name a file, such as image.png, but is"),
        (["--pipeline", SD3, "--prompt", "a", "--out", "n" * 300], "File name too long"),
        (["--pipeline", SD3, "--prompt", "a", "--out", f"{__file__}/a"], "the folder of the output must be a folder,"),
        (
            ["--pipeline", SD3, "--prompt", "half \udcff"],
            "--prompt must be text in the encoding of the terminal, but is",
        ),
        (["--pipeline", SD3, "--prompt", "a", "--negative_prompt", "\udcff"], "--negative_prompt must be text in the"),
        (["--pipeline", SD3, "--prompt", "a", "--device", "zzz"], "--device zzz cannot be used here: "),
    ],
)
def test_a_wrong_option_is_a_sentence_and_status_2(argv: Any, message: str, capsys: pytest.CaptureFixture[str]):
    assert run("generate", argv) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", ADAPTER, "a/b/c", "--dry_run"], "repo_id must be a repository such as user/my-tokens, but: "),
        (["push", ADAPTER, "", "--dry_run"], "repo_id must be a repository such as user/my-tokens, but: "),
        (
            ["evaluate", "--pipeline", SD3, "--prompts", __file__, "--out", __file__, "--dry_run"],
            "--out must be a folder",
        ),
        (
            ["train", "--pretrained_model_name_or_path", SD3, "--train_data", ""],
            "train_data must name images or a data",
        ),
        (
            ["edit", *["--pipeline", "m", "--image", "i", "--source", "a", "--target", "b", "--output"], __file__],
            "--output must be a folder",
        ),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_wrong_options_of_the_other_commands_are_refused_before_a_model_is_loaded(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert softrepa_command.main(argv) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Loading" not in printed


def test_a_tilde_is_the_home_folder_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["--out", "~/a.png"], ["--out=~/a.png"]):
        assert run("generate", ["--pipeline", SD3, "--prompt", "a", *words, "--dry_run"]) == 0
        assert f"would write {tmp_path}/a.png" in capsys.readouterr().out
    assert run("info", ["~/nowhere"]) == 2
    assert f"there is no file or folder {tmp_path}/nowhere" in capsys.readouterr().err


def test_an_error_of_convert_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(torch.nn.Parameter(torch.zeros(5, 4, 8)), tmp_path / "dc_tokens.pth")
    argv = [str(tmp_path), str(tmp_path / "out"), "--family", "sd3", "--base-model", "a\nb"]
    assert run("convert", argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("softrepa convert: error: base_model_name_or_path must")


# The sub-commands.


def test_generate_lays_base_and_adapter_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [
        *SHORT,
        "--prompt",
        "a red circle",
        "a blue square",
        "--seed",
        "3",
        "--out",
        str(tmp_path / "new" / "a.png"),
    ]
    assert run("generate", [*argv, "--adapter", ADAPTER]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "a.png")
    pipe = StableDiffusion3Pipeline.from_pretrained(SD3, **pipeline_precision(torch.float32))
    pipe.set_progress_bar_config(disable=True)
    rows: list[list[Image.Image]] = [[], []]
    for column in range(2):
        for row, prompt in zip(rows, ("a red circle", "a blue square"), strict=True):
            generator = torch.Generator().manual_seed(3)
            row += pipe(prompt, num_inference_steps=1, max_sequence_length=15, generator=generator).images
        if not column:
            pipe.load_softrepa(ADAPTER)
    assert rows[0][0].tobytes() != rows[0][1].tobytes()
    expected = grid(rows, ["a red circle", "a blue square"], ["base", "adapter"], max_side=None)
    assert (pixels(tmp_path / "new" / "a.png") == np.asarray(expected)).all()
    assert run("generate", argv) == 0  # without an adapter, and never over a file that is there
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "a-1.png")
    assert pixels(tmp_path / "new" / "a-1.png").shape[1] == 32


def test_an_image_that_another_process_wrote_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def load(options: Any) -> Any:
        (tmp_path / "cat.png").write_text("of another process")
        return placed_pipeline(options)

    monkeypatch.setattr(generate, "placed_pipeline", load)
    assert run("generate", [*SHORT, "--prompt", "a red circle", "--out", str(tmp_path / "cat.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cat-1.png\n"
    assert (tmp_path / "cat.png").read_text() == "of another process"


def test_edit_and_evaluate_write_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    argv = ["--image", str(tmp_path / "white.png"), "--source", "nothing", "--target", "a red circle"]
    argv += ["--pipeline", SD3, "--device", "cpu", "--steps", "4", "--max_sequence_length", "15"]
    argv += ["--output", str(tmp_path / "edits"), "--adapter", ADAPTER]
    assert run("edit", [*argv, "--dry_run"]) == 0 and not (tmp_path / "edits").exists()
    assert run("edit", argv) == 0
    assert str(tmp_path / "edits" / "white.png") in capsys.readouterr().out
    assert pixels(tmp_path / "edits" / "white.png").shape[1] == 96 + 2 * 4
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    argv = [*SHORT, "--prompts", str(tmp_path / "prompts.txt"), "--adapter", f"ours={ADAPTER}"]
    assert run("evaluate", [*argv, "--metrics", "--out", str(tmp_path / "evaluation")]) == 0
    assert len(list((tmp_path / "evaluation" / "images").rglob("*.png"))) == 2
    assert "1 prompts x 1 seeds" in capsys.readouterr().out


def test_train_takes_text_to_start_from_and_leaves_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = [{"file_name": f"{number}.png", "text": f"a red circle {number}"} for number in range(4)]
    for row in rows:
        Image.effect_noise((32, 32), 50).convert("RGB").save(photos / row["file_name"])
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--pretrained_model_name_or_path", SD3, "--train_data", str(photos), "--output_dir", str(tmp_path / "out")]
    argv += [
        "--resolution",
        "32",
        "--train_batch_size",
        "2",
        "--max_steps",
        "1",
        "--init",
        "text",
        "--num_layers",
        "1",
    ]
    argv += ["--report_to", "none", "--max_sequence_length", "15", "--dtype", "float32"]
    assert run("train", argv) == 0
    config, tensors = load_checkpoint(tmp_path / "out")
    assert config.init == "text" and tensors["tokens"].isfinite().all()
    assert "pipe.load_softrepa(" in capsys.readouterr().out


def test_info_prints_what_an_adapter_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config, tensors = load_checkpoint(ADAPTER)
    assert run("info", [ADAPTER]) == 0
    shown = capsys.readouterr().out
    assert f"{config.num_parameters:,} parameters" in shown and "fits: SD3Transformer2DModel" in shown
    assert run("info", [ADAPTER, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"]["tokens"]["shape"] == list(tensors["tokens"].shape)
    assert facts["config"]["family"] == config.family
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not an adapter")
    assert run("info", [str(tmp_path / "adapter_model.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_convert_goes_there_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    tokens = torch.randn(2, 3, 48)
    torch.save(torch.nn.Parameter(tokens), tmp_path / "dc_tokens.pth")
    assert run("convert", [str(tmp_path), str(tmp_path / "ours"), "--family", "sd3"]) == 0
    torch.testing.assert_close(load_checkpoint(tmp_path / "ours")[1]["tokens"].flatten(), tokens.flatten())
    assert "pipe.load_softrepa(" in capsys.readouterr().out
    assert run("convert", [str(tmp_path / "nowhere"), str(tmp_path / "x"), "--family", "sd3"]) == 2
    assert "softrepa convert: error: " in capsys.readouterr().err


def test_push_says_what_it_would_upload_and_that_a_login_is_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run("push", [ADAPTER, "user/tokens", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "would upload adapter_model.safetensors, adapter_config.json, README.md" in shown
    assert run("push", [str(tmp_path), "user/tokens", "--dry_run"]) == 2
    assert run("push", [ADAPTER, "user/tokens", "--token", "hf_none"]) == 2
    assert "pushing needs a Hub login" in capsys.readouterr().err
