"""`softrepa train`: what it takes, what it says, and whole runs of it on a small pipeline in a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from diffusers_softrepa import SoftREPAConfig, softrepa_parameters
from diffusers_softrepa.checkpoint import load_checkpoint
from diffusers_softrepa.commands import run, train
from diffusers_softrepa.conditioning import conditioner_of
from diffusers_softrepa.conditioning.text import text_stream

MODULE = ["-m", "diffusers_softrepa", "train"]
NEEDED = ["--pretrained_model_name_or_path", "user/model", "--train_data", "photos"]


@pytest.fixture(scope="module")
def cli() -> SimpleNamespace:
    def main(argv: list[str]) -> int:
        return run("train", argv)

    return SimpleNamespace(main=main, parse=train.settings, put_adapter=train.put_adapter)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    rows = []
    for number in range(9):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": [f"photo {number} of a cat", f"picture {number}"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def settings(model: Path, photos: Path, tmp_path: Path) -> dict[str, Any]:
    """A short run."""
    return {
        "pretrained_model_name_or_path": str(model),
        "train_data": str(photos),
        "output_dir": str(tmp_path / "out"),
        "resolution": 16,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "max_sequence_length": 24,
        "num_validation_inference_steps": 1,
    }


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


# What it takes.


def test_every_setting_has_a_help_text(cli: SimpleNamespace, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "--num_backward_negatives" in printed and "--num_timestep_bins" in printed


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_sets_what_the_command_line_does_not(cli: SimpleNamespace, tmp_path: Path, suffix: str):
    file = tmp_path / f"settings{suffix}"
    content = {
        "pretrained_model_name_or_path": "user/model",
        "train_data": "photos",
        "stages": ["down", "mid"],
        "max_steps": 7,
        "train_batch_size": 8,
        "aspect_buckets": True,
        "validation_prompts": ["-a cat", "two dogs"],
        "optim_args": {"weight_decay": 0.5},
        "temperature": None,
    }
    file.write_text(json.dumps(content))
    model, data, args = cli.parse(["--config", str(file), "--max_steps", "9", "--seed", "3"])
    assert (model.stages, data.train_data) == (["down", "mid"], "photos")
    assert (args.max_steps, args.train_batch_size, args.seed, args.aspect_buckets) == (9, 8, 3, True)
    assert args.validation_prompts == ["-a cat", "two dogs"]
    assert json.loads(args.optim_args) == {"weight_decay": 0.5}
    assert cli.parse([str(file)])[2].max_steps == 7


def test_numbers_that_yaml_takes_for_words_are_numbers(cli: SimpleNamespace, tmp_path: Path):
    file = tmp_path / "settings.yml"
    file.write_text("pretrained_model_name_or_path: a/b\ntrain_data: c\nlearning_rate: 1e-4\nmax_grad_norm: 1e-1\n")
    args = cli.parse([str(file)])[2]
    assert (args.learning_rate, args.max_grad_norm) == (1e-4, 0.1)


def test_settings_can_be_written_with_hyphens(cli: SimpleNamespace):
    assert cli.parse([*NEEDED, "--train-batch-size", "6"])[2].train_batch_size == 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: --pretrained_model_name_or_path"),
        (
            [*NEEDED, "--learning_rat", "1"],
            "the command line has unknown settings: learning_rat; did you mean learning",
        ),
        ([*NEEDED, "--max_steps", "many"], "argument --max_steps.*invalid int value: 'many'"),
        ([*NEEDED, "--objective", "best"], "invalid choice: 'best'"),
        ([*NEEDED, "--train_batch_size", "1"], "needs at least 1 negatives"),
        (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        ([*NEEDED], "photos"),
    ],
)
def test_a_wrong_command_line_is_a_sentence_and_exit_status_2(
    cli: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: Any, message: str
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(argv) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    with pytest.raises((ValueError, OSError), match=message):
        cli.main([*argv, "--debug"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3\n", "has unknown settings: max_step; did you mean max_steps?"),
        ("- 3\n", "must contain settings by name"),
        ("a: [\n", "is neither YAML nor JSON"),
    ],
)
def test_a_wrong_file_is_a_sentence(cli: SimpleNamespace, tmp_path: Path, text: str, message: str):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        cli.parse([str(tmp_path / "settings.yaml")])


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
def test_tokens_can_start_from_a_text_in_every_family(cli: SimpleNamespace, family: tiny.Family):
    pipe = family.pipeline()
    model, _, args = cli.parse([*NEEDED, "--init", "text", "--num_timestep_bins", "0", "--max_sequence_length", "24"])
    args.max_sequence_length = 24 if family.name in ("sd3", "flux") else None
    cli.put_adapter(pipe, model, args)
    tokens = softrepa_parameters(pipe)
    assert list(tokens) == ["tokens"]
    conditioner = conditioner_of(pipe, max_sequence_length=args.max_sequence_length)
    pipe.disable_softrepa()
    start = text_stream(conditioner, model.init_text)[:4]
    assert (tokens["tokens"][0] - start).std() < 0.05 < start.std()


def test_an_adapter_that_is_there_brings_its_own_shape(cli: SimpleNamespace, tmp_path: Path):
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, num_tokens=2))
    pipe.save_softrepa(tmp_path)
    pipe.unload_softrepa()
    model, _, args = cli.parse([*NEEDED, "--adapter", str(tmp_path)])
    cli.put_adapter(pipe, model, args)
    assert softrepa_parameters(pipe)["tokens"].shape[1] == 2
    assert softrepa_parameters(pipe)["tokens"].requires_grad
    model.num_tokens = 3
    with pytest.raises(ValueError, match="already has its shape; leave out num_tokens"):
        cli.put_adapter(pipe, model, args)


# Whole runs.


def test_a_dry_run_prints_numbers_and_writes_nothing(
    cli: SimpleNamespace, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = [*words(settings), "--dry_run", "--cache_text", "--cache_latents", "--report_to", "tensorboard"]
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    assert "2, 1 epochs of 9 images" in printed and "text cache" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_file_starts_a_run_and_resume_latest_goes_on(
    cli: SimpleNamespace, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, out = tmp_path / "settings.yaml", tmp_path / "out"
    more = {"eval_data": settings["train_data"], "validation_prompts": ["a cat"], "num_tokens": 2, "num_layers": 1}
    file.write_text(json.dumps(settings | more))
    assert cli.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"pipe.load_softrepa({str(out)!r})" in printed and f"{out}/best" in printed
    assert load_checkpoint(out)[0].num_tokens == 2
    assert cli.main(["--config", str(file), "--max_steps", "4", "--resume_from_checkpoint", "latest"]) == 0
    assert {"checkpoint-2", "checkpoint-4", "curves.png", "validation.png", "training_args.json"} <= {
        path.name for path in out.iterdir()
    }
    pipe = tiny.sd3_pipeline()
    pipe.load_softrepa(out)
    assert torch.isfinite(tiny.generate(pipe)).all()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def test_accelerate_launches_it(settings: dict[str, Any], tmp_path: Path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *MODULE]
    ran = subprocess.run([*command, *words(settings)], env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "pipe.load_softrepa(" in ran.stdout
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM is POSIX")
def test_sigterm_saves_says_where_and_exits_with_0(settings: dict[str, Any], tmp_path: Path):
    log = tmp_path / "out" / "log.jsonl"
    command = [sys.executable, *MODULE, *words(settings | {"max_steps": 100000, "save_steps": 100000})]
    run = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (log.is_file() and log.read_text()) and run.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        printed, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert str(checkpoint) in printed and "--resume_from_checkpoint latest" in printed
