"""Settings: every field checked, former names read, accelerate followed, and all of it before a model is there."""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, check_run
from training_runs import QUICK, rows, trainer


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more, but is -1"),
        ({"seed": 1.5}, "seed must be of type int"),
        ({"learning_rate": float("nan")}, "learning_rate must be of type float"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float, but is 'fast'"),
        ({"learning_rate": 0}, "learning_rate must be a positive number"),
        ({"learning_rate": 10**400}, "learning_rate must be of type float, but is a whole number of 1329 bits"),
        ({"seed": 10**400}, r"seeds must be below 2\*\*63, but are a whole number of 1329 bits and 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a positive number"),
        ({"logit_scale": 0.0}, "logit_scale must be a positive number"),
        ({"temperature": 1e-300}, "temperature must be a positive number that float32 holds, but is 1e-300"),
        ({"logit_scale": 1e300}, "logit_scale must be a positive number that float32 holds"),
        ({"timestep_shift": 1e300}, "timestep_shift must be a positive number that float32 holds"),
        ({"denoising_weight": 1e300}, "denoising_weight must be 0 or more that float32 holds"),
        ({"denoising_weight": -1.0}, "denoising_weight must be 0 or more"),
        ({"max_broken": -0.1}, "max_broken must be 0 or more"),
        ({"max_cache_gigabytes": 0.0}, "max_cache_gigabytes must be a positive number"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be 0 or more"),
        ({"validation_seed": 2**63}, r"seeds must be below 2\*\*63"),
        ({"random_flip": "yes"}, "random_flip must be of type bool"),
        ({"output_dir": ""}, "output_dir must name a folder"),
        ({"output_dir": None}, "output_dir must be of type str"),
        ({"validation_prompts": [3]}, "validation_prompts must be of type"),
        ({"report_to": 3}, "report_to must be of type"),
        ({"hub_model_id": 7}, "hub_model_id must be of type str"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of"),
        ({"optim_args": "fast"}, "optim_args must be name=value pairs or a JSON object"),
        ({"optim": "x", "optimizer": "y"}, "optimizer is the former name of optim, and both are given"),
    ],
    ids=str,
)
def test_every_field_is_checked(setting: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ContrastiveFlowMatchingArguments(**setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "carrier_pigeon"}, "no tracker is called 'carrier_pigeon'"),
        ({"report_to": "wandb"}, "tracker 'wandb' is not installed, only tensorboard"),
        ({"optim": "AdamX"}, "optim='AdamX'"),
        ({"lr_scheduler": "warm"}, "lr_scheduler='warm' makes no schedule"),
    ],
    ids=str,
)
def test_what_a_run_needs_is_checked_before_a_model_is_there(settings: dict[str, Any], message: str):
    args = ContrastiveFlowMatchingArguments(**QUICK | settings)
    with pytest.raises(ValueError, match=message):
        check_run(args, rows())


def test_checked_data_are_what_the_trainer_takes(tmp_path: Path):
    train, evaluation = check_run(ContrastiveFlowMatchingArguments(**QUICK), rows(), rows(4, seed=1))
    assert evaluation is not None and evaluation.count == 4
    trainer(tmp_path / "checked", train).train()
    trainer(tmp_path / "given").train()
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("checked", "given")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_prompt_is_one_prompt_and_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    args = ContrastiveFlowMatchingArguments(
        validation_prompts="ab c", report_to="none", output_dir="~/tokens", cache_dir="~/cache"
    )
    assert (args.validation_prompts, args.report_to) == (["ab c"], [])
    assert (args.output_dir, args.cache_dir) == ("/home/somebody/tokens", "/home/somebody/cache")


def test_former_names_are_read_with_a_warning():
    with pytest.warns(FutureWarning, match="is called") as told:
        args = ContrastiveFlowMatchingArguments(
            optimizer="SGD", optimizer_arguments='{"momentum": 0.9}', validation_steps=7, hub_private=True
        )
    assert len(told) == 4
    assert (args.optim, args.optim_args, args.eval_steps) == ("SGD", '{"momentum": 0.9}', 7)
    assert args.hub_private_repo is True


@pytest.mark.parametrize("given", ["betas=(0.8, 0.9),eps=1e-6", '{"betas": [0.8, 0.9], "eps": 1e-6}'])
def test_arguments_of_the_optimizer_are_read_as_transformers_writes_them_and_as_json(given: str):
    assert ContrastiveFlowMatchingArguments(optim_args=given).optim_args == '{"betas": [0.8, 0.9], "eps": 1e-06}'


def test_every_field_has_its_meaning_in_the_help():
    text = ContrastiveFlowMatchingArguments.__doc__ or ""
    for entry in fields(ContrastiveFlowMatchingArguments):
        assert f"{entry.name}: {entry.metadata['help'][:20]}" in text and len(entry.metadata["help"]) > 10


ACCELERATE = {
    "bf16 taken over": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, ("bf16", 1)),
    "the same twice": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"mixed_precision": "fp16"}, ("fp16", 1)),
    "accelerate has no wish": ({"ACCELERATE_MIXED_PRECISION": "no"}, {"mixed_precision": "bf16"}, ("bf16", 1)),
    "accumulation": ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, {}, ("no", 3)),
    "neither": ({}, {}, ("no", 1)),
}
CONTRADICTIONS = {
    "precision": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "no"}, "contradicts accelerate"),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "accelerate asks for mixed_precision='fp8'"),
    "accumulation": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps=2 contradicts accelerate",
    ),
    "accumulation in words": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
        {},
        "accelerate asks for gradient_accumulation_steps='auto', but it must be a whole number",
    ),
    "sharding as accelerate reads it": (
        {"ACCELERATE_USE_DEEPSPEED": "yes"},
        {},
        "accelerate was told to use DEEPSPEED",
    ),
    "sharding": ({"ACCELERATE_USE_FSDP": "true"}, {}, "accelerate was told to use FSDP"),
}


@pytest.mark.parametrize("name", ACCELERATE)
def test_settings_of_accelerate_are_taken_over(monkeypatch: pytest.MonkeyPatch, name: str):
    environment, settings, expected = ACCELERATE[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    args = ContrastiveFlowMatchingArguments(**settings)
    assert (args.mixed_precision, args.gradient_accumulation_steps) == expected


def test_compilation_of_accelerate_is_taken_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert not ContrastiveFlowMatchingArguments().torch_compile
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    args = ContrastiveFlowMatchingArguments()
    assert (args.torch_compile, args.torch_compile_backend, args.torch_compile_mode) == (True, "aot_eager", "default")
    own = ContrastiveFlowMatchingArguments(torch_compile=True, torch_compile_backend="eager")
    assert (own.torch_compile_backend, own.torch_compile_mode) == ("eager", None)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_accelerate_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str):
    environment, settings, message = CONTRADICTIONS[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        ContrastiveFlowMatchingArguments(**settings)


# The table of settings in the guide.

GUIDE = Path(__file__).parents[1] / "docs" / "training.md"
TABLE = re.compile(r"(<!-- settings: [^\n]*-->\n)(.*?)(<!-- /settings -->)", re.DOTALL)


def shown(kind: Any) -> str:
    """Returns a type as the table shows it: `str`, `list of str`, `float or None`."""
    if get_origin(kind) is Literal:
        return "str"
    if get_origin(kind) is list:
        return f"list of {shown(get_args(kind)[0])}"
    if parts := get_args(kind):
        return " or ".join(map(shown, parts))
    return "None" if kind is type(None) else kind.__name__


def table_of_settings() -> str:
    """Returns name, type, default and meaning of every field, as Markdown."""
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(ContrastiveFlowMatchingArguments):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        lines.append(f"| `{field.name}` | {shown(field.type)} | `{default!r}` | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_settings_in_the_guide_is_that_of_the_fields():
    found = TABLE.search(GUIDE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == table_of_settings(), "run: python tests/test_arguments.py"


if __name__ == "__main__":
    page = TABLE.sub(lambda found: found[1] + table_of_settings() + found[3], GUIDE.read_text(encoding="utf-8"))
    GUIDE.write_text(page, encoding="utf-8")
