"""What is in the way of a run's output is found before the first step, and nothing is written or removed by then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusers_softrepa.training import check_run
from diffusers_softrepa.training.arguments import ContrastiveFlowMatchingArguments
from training_runs import QUICK, rows, stream, trainer

FILES = (
    "log.jsonl",
    "curves.png",
    "training_args.json",
    "README.md",
    "adapter_model.safetensors",
    "adapter_config.json",
)
DRAWING: dict[str, Any] = {"validation_prompts": ["a cat"]}
CACHING: dict[str, Any] = {"cache_text": True}


def as_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "mine").write_text("mine")


def as_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


@pytest.mark.parametrize(
    ("name", "make", "settings", "message"),
    [
        *((name, as_folder, {}, f"{name} must be a file, but is a folder") for name in FILES),
        ("validation.png", as_folder, DRAWING, "validation.png must be a file, but is a folder"),
        ("validation", as_file, DRAWING, "validation must be a folder, but is a file"),
        ("images", as_file, DRAWING, "images must be a folder, but is a file"),
        ("best", as_file, {}, "best must be a folder, but is a file"),
        ("best/README.md", as_folder, {}, "README.md must be a file, but is a folder"),
        ("softrepa", as_file, {"report_to": "tensorboard"}, "softrepa must be a folder, but is a file"),
        ("checkpoint-4", as_file, {}, "checkpoint-4 must be a folder, but is a file"),
        ("cache", as_file, CACHING, "cache_dir must be a folder, but .*cache is a file"),
    ],
)
def test_a_folder_in_the_place_of_a_file_and_the_other_way_round_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], settings: dict[str, Any], message: str
):
    make(tmp_path / "run" / name)
    before = {path: path.is_dir() for path in tmp_path.rglob("*")}
    given = {**QUICK, **settings, "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=message):
        check_run(ContrastiveFlowMatchingArguments(**given), rows())
    assert {path: path.is_dir() for path in tmp_path.rglob("*")} == before


def test_names_that_a_run_does_not_use_are_left_alone(tmp_path: Path):
    for name in ("validation", "images", "cache", "checkpoint-x", "checkpoint-04"):
        as_file(tmp_path / name)
    as_folder(tmp_path / "validation.png")
    assert trainer(tmp_path, max_steps=1).train().finished


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_compile": True, "torch_compile_backend": "zzz"}, "takes no torch_compile_backend='zzz' with"),
        ({"torch_compile": True, "torch_compile_mode": "zzz"}, "with torch_compile_mode='zzz': "),
        ({"hub_license": "a\nb"}, "a licence must be a text as the Hub spells it, .* but is 'a.*b'"),
        ({"validation_prompts": ["half a \ud83d"]}, "the text of a prompt must be text, but .* lone surrogate"),
        ({"validation_prompts": ["nul \0"]}, "the text of a prompt must be text, but .* null character"),
        (
            {"learning_rate": 1e30},
            r"with learning_rate=1e\+30 and .* train tokens: a step makes .* of ones; lower the",
        ),
        ({"learning_rate": 1e38}, r"with learning_rate=1e\+38 and .* cannot train tokens: value cannot be converted"),
        ({"optim_args": "eps=0"}, r"optim_args='{\"eps\": 0}' cannot train tokens: a step makes \[.*, nan\] of ones"),
        ({"optim_args": "weight_decay=1e308"}, "cannot train tokens: a step makes .*inf"),
        ({"optim_args": "betas=(0.9,)"}, "makes no optimizer: list index out of range"),
        ({"optim_args": "foreach=True,fused=True"}, "makes no optimizer: `fused` and `foreach` cannot be"),
        ({"optim": "SparseAdam", "optim_args": "{}"}, "cannot train tokens: SparseAdam does not support dense grad"),
        ({"max_broken": 1.5}, r"max_broken must be a share in \[0.0, 1.0\] or a number of examples but got 1.5"),
        ({"train_batch_size": 9}, "a batch of all processes holds 9 images of one size, but there are only 16x16: 8"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "resume_from_checkpoint='checkpoint-7' is no checkpoint folder"),
    ],
)
def test_settings_that_would_end_the_run_later_are_refused_before_a_model_is_loaded(
    tmp_path: Path, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        check_run(ContrastiveFlowMatchingArguments(**QUICK | settings, output_dir=str(tmp_path / "run")), rows())


def test_a_stream_without_what_its_settings_need_is_refused_before_a_model_is_loaded(tmp_path: Path):
    settings = QUICK | {"output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="cache_latents needs data of known length"):
        check_run(ContrastiveFlowMatchingArguments(**settings, cache_latents=True), stream())


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-1"])
def test_a_checkpoint_of_other_settings_is_refused_before_a_model_is_loaded(tmp_path: Path, wanted: str):
    trainer(tmp_path, max_steps=1).train()
    settings = QUICK | {"output_dir": str(tmp_path), "resume_from_checkpoint": wanted, "seed": 1}
    with pytest.raises(ValueError, match=r"checkpoint-1 was saved under other settings .*'seed': \(0, 1\)"):
        check_run(ContrastiveFlowMatchingArguments(**settings), rows())


@pytest.mark.parametrize("args", [None, {"output_dir": "run"}])
def test_settings_of_another_class_are_named(args: Any):
    with pytest.raises(TypeError, match="args must be ContrastiveFlowMatchingArguments, but are"):
        check_run(args, rows())


def test_a_trainer_refuses_it_as_well(tmp_path: Path):
    as_folder(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"log\.jsonl must be a file, but is a folder; move it away"):
        trainer(tmp_path)
