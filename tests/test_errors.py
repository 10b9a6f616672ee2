"""Every load that must fail says why, and leaves the pipeline bit for bit as it was."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

import tiny
from diffusers_softrepa import (
    SoftREPAConfig,
    add_softrepa,
    delete_softrepa,
    get_softrepa_adapters,
    load_softrepa,
    save_softrepa,
    set_softrepa,
    softrepa_parameters,
    supported_denoisers,
    unload_softrepa,
)
from diffusers_softrepa.adapter import adapters_of
from diffusers_softrepa.checkpoint import save_checkpoint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Setting:
    """A pipeline to load into, and a sound adapter for it that each case spoils in its own way."""

    def __init__(self, folder: Path, family: tiny.Family, pipe: DiffusionPipeline) -> None:
        self.pipe, self.family = pipe, family
        self.denoiser: Any = pipe.unet if family.name == "sd15" else pipe.transformer
        self.inputs = family.inputs(2)
        self.config = SoftREPAConfig.for_denoiser(self.denoiser, num_timestep_bins=5)
        self.tensors = {name: torch.randn(shape) for name, shape in self.config.shapes.items()}
        self.folder = folder / "adapter"
        save_checkpoint(self.folder, self.config, self.tensors)

    def bare_file(self) -> Path:
        """The weights without metadata, so that the JSON beside them counts."""
        save_file(self.tensors, self.folder / WEIGHTS)
        return self.folder / WEIGHTS

    def changed(self, **fields: Any) -> SoftREPAConfig:
        return SoftREPAConfig.from_dict({**self.config.to_dict(), **fields})

    def with_json(self, text: str | bytes) -> Path:
        self.bare_file()
        (self.folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.folder

    def with_fields(self, **fields: Any) -> Path:
        return self.with_json(json.dumps({**self.config.to_dict(), **fields}))

    def with_bytes(self, content: bytes, name: str = WEIGHTS) -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def with_values(self, spoil: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {"source": {**self.tensors, "tokens": spoil(self.tensors["tokens"])}, "config": self.config}


def other_family(s: Setting) -> dict[str, Any]:
    other = tiny.unet() if s.config.family == "sd3" else tiny.sd3_transformer()
    config = SoftREPAConfig.for_denoiser(other)
    save_checkpoint(s.folder, config, {name: torch.randn(shape) for name, shape in config.shapes.items()})
    return {"source": s.folder}


def reshaped(s: Setting, **fields: Any) -> dict[str, Any]:
    config = s.changed(**fields)
    save_checkpoint(s.folder, config, {name: torch.randn(shape) for name, shape in config.shapes.items()})
    return {"source": s.folder}


def too_many_layers(s: Setting) -> dict[str, Any]:
    return reshaped(s, num_layers=9)


def wrong_stages(s: Setting) -> dict[str, Any]:
    return reshaped(s, stages=["left"])


def entry(tensor: Tensor, value: float) -> Tensor:
    return torch.cat([torch.full_like(tensor.flatten()[:1], value), tensor.flatten()[1:]]).reshape(tensor.shape)


def torch_pickle(s: Setting, name: str) -> Path:
    torch.save(s.tensors, s.folder / name)
    return s.folder / name


def truncated(s: Setting) -> Path:
    return s.with_bytes((s.folder / WEIGHTS).read_bytes()[:-100])


def directory_for_a_file(s: Setting) -> Path:
    (s.folder / WEIGHTS).unlink()
    (s.folder / WEIGHTS).mkdir()
    return s.folder


PICKLE = r"adapters are safetensors files, but .* is a pickle.*diffusers_softrepa\.convert"
BROKEN = r"is no complete safetensors file \(.*\); download or save it again"
NO_CONFIG = r"carries no SoftREPA config .* pass config=SoftREPAConfig\.for_denoiser"

# name -> (what is loaded: a source or all arguments, the error, its message)
CASES: dict[str, tuple[Callable[[Setting], Any], type[Exception], str]] = {
    "other family": (other_family, ValueError, r"the adapter was made for family '\w+', but \w+ is of family"),
    "other width": (lambda s: reshaped(s, token_dim=7), ValueError, r"soft tokens have width 7 but the blocks of"),
    "too many layers": (
        too_many_layers,
        ValueError,
        r"(has 4 blocks that read text|share one layer of tokens, not 9)",
    ),
    "wrong stages": (wrong_stages, ValueError, r"(numbered layers, not stages|stages must name some of)"),
    "missing key": (
        lambda s: {"source": {"tokens": s.tensors["tokens"]}, "config": s.config},
        ValueError,
        r"exactly the tensors .*: missing \['timestep_tokens'\], unexpected \[\]",
    ),
    "extra key": (
        lambda s: {"source": {**s.tensors, "lora_A": torch.ones(1)}, "config": s.config},
        ValueError,
        r"missing \[\], unexpected \['lora_A'\]",
    ),
    "NaN": (lambda s: s.with_values(lambda t: entry(t, float("nan"))), ValueError, r"tokens in .* holds 1 NaN or inf"),
    "infinity": (lambda s: s.with_values(lambda t: entry(t, float("-inf"))), ValueError, r"holds 1 NaN or infinite"),
    "beyond float32": (lambda s: s.with_values(lambda t: entry(t.double(), 1e99)), ValueError, r"holds 1 NaN or inf"),
    "wrong shape": (
        lambda s: s.with_values(lambda t: t[..., :-1]),
        ValueError,
        r"tokens in .* must be .* of shape \(",
    ),
    "transposed": (lambda s: s.with_values(lambda t: t.mT.contiguous()), ValueError, r"must be .* of shape \("),
    "integers": (lambda s: s.with_values(lambda t: t.to(torch.int8)), ValueError, r"floating point .* is torch.int8"),
    "complex": (lambda s: s.with_values(lambda t: t.to(torch.complex64)), ValueError, r"but is torch.complex64"),
    "no tensors": (lambda s: s.with_values(lambda t: t.tolist()), TypeError, r"tokens in .* must be a tensor"),
    "empty file": (lambda s: s.with_bytes(b""), ValueError, BROKEN),
    "truncated file": (truncated, ValueError, BROKEN),
    "text in the file": (lambda s: s.with_bytes(b"<html>404</html>" * 9), ValueError, BROKEN),
    "a pointer of git lfs": (
        lambda s: s.with_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        ValueError,
        BROKEN,
    ),
    "pickle .pth": (lambda s: torch_pickle(s, "tokens.pth"), ValueError, PICKLE),
    "pickle .bin": (lambda s: torch_pickle(s, "tokens.bin"), ValueError, PICKLE),
    "pickle by weight_name": (lambda s: {"source": s.folder, "weight_name": "tokens.bin"}, ValueError, PICKLE),
    "torch pickle renamed": (lambda s: torch_pickle(s, WEIGHTS), ValueError, PICKLE),
    "plain pickle renamed": (lambda s: s.with_bytes(pickle.dumps({"tokens": [1.0]})), ValueError, PICKLE),
    "config not JSON": (lambda s: s.with_json("{"), ValueError, r"config in .*json is not JSON \(.*\); save"),
    "config not text": (lambda s: s.with_json(b"\xff\xfe\x00"), ValueError, r"config in .*json is not JSON"),
    "config a list": (lambda s: s.with_json("[1, 2]"), ValueError, r"must be a JSON object, but is \[1, 2\]"),
    "config of LoRA": (
        lambda s: s.with_fields(peft_type="LORA"),
        ValueError,
        r"json holds no .*; load it with the lib",
    ),
    "config empty": (lambda s: s.with_json("{}"), ValueError, r"holds no SoftREPA config: .*peft_type"),
    "config with an unknown field": (
        lambda s: s.with_fields(rank=4),
        ValueError,
        r"does not know: \['rank'\]; upgrade",
    ),
    "config with text for a number": (
        lambda s: s.with_fields(num_tokens="4"),
        ValueError,
        r"num_tokens must be a whole",
    ),
    "config with a number for stages": (lambda s: s.with_fields(stages=5), ValueError, r"holds no SoftREPA config"),
    "config null": (lambda s: s.with_fields(family=None), ValueError, r"needs a family"),
    "no config": (lambda s: s.bare_file().rename(s.folder.parent / "bare.safetensors"), ValueError, NO_CONFIG),
    "state dict without config": (lambda s: s.tensors, ValueError, r"a state dict carries no config; pass config="),
    "config that is a name": (
        lambda s: {"source": s.tensors, "config": "sd3"},
        TypeError,
        r"config must be a SoftREPAConfig, but is 'sd3'; SoftREPAConfig.for_denoiser\(denoiser\) makes one",
    ),
    "no such folder": (
        lambda s: s.folder / "nothing" / "here",
        OSError,
        r"there is no file or folder .*; check the path",
    ),
    "no such file": (lambda s: "adapter.safetensors", OSError, r"there is no file or folder adapter.safetensors"),
    "folder without weights": (lambda s: s.folder.parent, OSError, rf"there is no {WEIGHTS} in .*; give weight_name="),
    "folder in place of the file": (directory_for_a_file, OSError, rf"there is no {WEIGHTS} in"),
    "no such subfolder": (lambda s: {"source": s.folder, "subfolder": "x"}, OSError, rf"there is no {WEIGHTS} in .*x"),
    "no source": (lambda s: {"source": None}, TypeError, r"or a state dict, but source is None"),
    "name of no text": (
        lambda s: {"source": s.folder, "adapter_name": ""},
        TypeError,
        r"adapter_name must be a non-empty",
    ),
    "unknown keyword": (lambda s: {"source": s.folder, "low_cpu_mem_usage": True}, TypeError, r"low_cpu_mem_usage"),
    "hotswap of nothing": (
        lambda s: {"source": s.folder, "adapter_name": "absent", "hotswap": True},
        ValueError,
        r"hotswap needs the name of a loaded adapter, but 'absent' is not among",
    ),
}


@pytest.fixture(scope="module", params=[tiny.FAMILIES[0], tiny.FAMILIES[2]], ids=lambda family: family.name)
def made(request: pytest.FixtureRequest) -> tuple[tiny.Family, DiffusionPipeline]:
    torch.manual_seed(0)
    return request.param, request.param.pipeline()


@pytest.fixture(params=[False, True], ids=["no adapter", "adapters"])
def setting(request: pytest.FixtureRequest, made: tuple[tiny.Family, DiffusionPipeline], tmp_path: Path) -> Any:
    """The pipeline as it comes, or with two adapters of which one is active at half weight."""
    setting = Setting(tmp_path, *made)
    if request.param:
        for name in ("first", "second"):
            setting.pipe.add_softrepa(setting.changed(init_std=1.0), name)
        setting.pipe.set_softrepa("first", 0.5)
    yield setting
    setting.pipe.unload_softrepa()


def everything(setting: Setting) -> dict[str, Any]:
    """What must not change: attributes and forwards of all modules, adapters, their values, base weights, output."""
    pipe, denoiser = setting.pipe, setting.denoiser
    adapters = pipe.get_softrepa_adapters()
    with torch.no_grad():
        predicted = setting.family.call(denoiser, setting.inputs, 500)
    return {
        "attributes": {path: set(vars(module)) for path, module in denoiser.named_modules()},
        "forwards": {path: vars(module).get("forward") for path, module in denoiser.named_modules()},
        "adapters": adapters,
        "repr": repr(denoiser),
        "training": denoiser.training,
        "gradients": [parameter.requires_grad for parameter in denoiser.parameters()],
        "tensors": [
            *(value.clone() for value in denoiser.state_dict().values()),
            *(value.clone() for name in adapters for value in softrepa_parameters(pipe, name).values()),
            predicted,
        ],
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(torch.equal(old, new) for old, new in zip(before.pop("tensors"), after.pop("tensors"), strict=True))
    assert before == after


@pytest.mark.parametrize("case", CASES)
def test_a_failing_load_says_why_and_changes_nothing(setting: Setting, case: str):
    spoil, error, message = CASES[case]
    given = spoil(setting)
    arguments = given if isinstance(given, dict) and "source" in given else {"source": given}
    before = everything(setting)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)) as caught:
        setting.pipe.load_softrepa(**arguments)
    assert str(caught.value).count("\n") == 0
    assert_unchanged(before, everything(setting))


def test_a_name_that_is_taken_says_so_and_changes_nothing(setting: Setting):
    setting.pipe.load_softrepa(setting.folder, "mine")
    before = everything(setting)
    for again in (
        lambda: setting.pipe.load_softrepa(setting.folder, "mine"),
        lambda: setting.pipe.add_softrepa(adapter_name="mine"),
    ):
        with pytest.raises(ValueError, match=r"'mine' is already loaded; choose another .* or pass hotswap=True"):
            again()
    assert_unchanged(before, everything(setting))


@pytest.mark.parametrize("spoil", [lambda t: entry(t, float("nan")), lambda t: t[..., :1]], ids=["NaN", "shape"])
def test_a_failing_hotswap_leaves_the_loaded_values(setting: Setting, spoil: Callable[[Tensor], Tensor]):
    setting.pipe.load_softrepa(setting.folder, "mine")
    before = everything(setting)
    with pytest.raises(ValueError, match="tokens in the state dict must be"):
        setting.pipe.load_softrepa(**setting.with_values(spoil), adapter_name="mine", hotswap=True)
    assert_unchanged(before, everything(setting))


def test_a_sound_load_still_works_after_a_failed_one(setting: Setting):
    with pytest.raises(ValueError, match="must be finite"):
        setting.pipe.load_softrepa(**setting.with_values(lambda t: t * float("nan")), adapter_name="mine")
    drawn = tiny.generate(setting.pipe)
    assert setting.pipe.load_softrepa(setting.folder, "mine") == "mine"
    assert not torch.equal(tiny.generate(setting.pipe), drawn)


def test_after_a_failed_load_the_pipeline_draws_the_same_picture(setting: Setting):
    drawn = tiny.generate(setting.pipe)
    with pytest.raises(ValueError, match="is no complete safetensors file"):
        setting.pipe.load_softrepa(truncated(setting))
    assert torch.equal(tiny.generate(setting.pipe), drawn)


def test_no_pickle_code_is_run(setting: Setting, tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "boom",))

    for name in ("tokens.bin", WEIGHTS):
        with pytest.raises(ValueError, match="is a pickle"):
            setting.pipe.load_softrepa(setting.with_bytes(pickle.dumps(Bomb()), name))
    assert not (tmp_path / "boom").exists()


def pixel_pipeline() -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


@pytest.mark.parametrize("verb", [load_softrepa, add_softrepa])
def test_a_pipeline_without_text_says_what_it_has_and_what_is_supported(verb: Callable[..., Any], tmp_path: Path):
    pipe = pixel_pipeline()
    keys = set(vars(pipe.unet))
    for target, owner in ((pipe, "DDPMPipeline"), (pipe.unet, "UNet2DModel")):
        with pytest.raises(
            ValueError, match=rf"no component of {owner} takes soft tokens: it has \w+ \(UNet2DModel\)"
        ) as caught:
            verb(target, *([tmp_path] if verb is load_softrepa else []))
        assert all(name in str(caught.value) for name in (*supported_denoisers(), "register_family"))
    assert set(vars(pipe.unet)) == keys
    assert pipe.unet.config.in_channels == 3


TARGETS = {"None": None, "a path": "runs/tokens", "a number": 5, "a class": tiny.sd3_pipeline, "a dict": {}}
CALLS: dict[str, Callable[[Any], Any]] = {
    "load": lambda target: load_softrepa(target, "source"),
    "add": add_softrepa,
    "save": lambda target: save_softrepa(target, "folder"),
    "set": lambda target: set_softrepa(target, "softrepa"),
    "delete": lambda target: delete_softrepa(target, "softrepa"),
    "unload": unload_softrepa,
    "get": get_softrepa_adapters,
    "parameters": softrepa_parameters,
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_pipeline_is_named(call: Callable[[Any], Any], target: Any):
    with pytest.raises(TypeError, match="soft tokens are for a diffusers pipeline or its denoiser, but the target is"):
        call(target)


ARGUMENTS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "add a dict": (lambda d: add_softrepa(d, {"family": "sd3"}), TypeError, "config must be a SoftREPAConfig, but is"),
    "add with a seed": (lambda d: add_softrepa(d, generator=5), TypeError, "generator must be a torch.Generator, but"),
    "delete a number": (lambda d: delete_softrepa(d, 5), TypeError, "must be an adapter's name, several, or"),
    "delete bytes": (lambda d: delete_softrepa(d, b"mine"), TypeError, "must be an adapter's name, several, or"),
    "save nowhere": (
        lambda d: save_softrepa(d, None),
        TypeError,
        "the place of an adapter must be a path, but is None",
    ),
    "save into nothing": (lambda d: save_softrepa(d, ""), ValueError, "must be a folder, but its name is empty"),
    "save as a number": (
        lambda d: save_softrepa(d, "never", weight_name=5),
        ValueError,
        "weight_name must be a plain file name that ends in .safetensors, but is 5",
    ),
    "save with a list": (
        lambda d: save_softrepa(d, "never", license=["mit"]),
        ValueError,
        r"a licence must .* \['mit'\]",
    ),
    "save as a suffix": (
        lambda d: save_softrepa(d, "never", weight_name=".safetensors"),
        ValueError,
        "weight_name must be a plain file name that ends in .safetensors, but is",
    ),
    "save as a long name": (
        lambda d: save_softrepa(d, "never", weight_name="n" * 300 + ".safetensors"),
        ValueError,
        "the name of a file cannot be .*: File name too long",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_of_a_wrong_kind_is_named_and_changes_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    denoiser = tiny.sd3_transformer()
    denoiser.add_softrepa(adapter_name="mine")
    state = adapters_of(denoiser).state
    call, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        call(denoiser)
    assert adapters_of(denoiser).state is state
    assert not list(tmp_path.iterdir())
