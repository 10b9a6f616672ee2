"""A pipeline saved with adapters on: the adapters lie beside its files, come back, and are not in anybody's way."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline
from huggingface_hub import constants

import tiny
from diffusers_softrepa import SoftREPAConfig, load_softrepa, softrepa_parameters
from diffusers_softrepa.adapter import adapters_of

pytest_plugins = ["hub_server"]

INDEX = "model_index.json"


@pytest.fixture(params=["sd3", "sd15"])
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """A pipeline with one adapter at half weight and one that is not active."""
    pipe = {"sd3": tiny.sd3_pipeline, "sd15": tiny.sd15_pipeline}[request.param]()
    for name in ("on", "off"):
        pipe.add_softrepa(SoftREPAConfig.for_denoiser(denoiser_of(pipe), init_std=1.0), name)
    pipe.set_softrepa("on", 0.5)
    return pipe


def denoiser_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def component_of(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith("softrepa/")}


def values(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in pipe.get_softrepa_adapters()
        for key, value in softrepa_parameters(pipe, name).items()
    }


def assert_same_adapters(found: Any, expected: Any) -> None:
    assert found.get_softrepa_adapters() == expected.get_softrepa_adapters()
    assert values(found).keys() == values(expected).keys()
    assert all(torch.equal(values(found)[name], value) for name, value in values(expected).items())


# What is written


def test_the_base_files_are_those_of_the_bare_pipeline_but_for_one_entry_of_the_index(pipe: Any, tmp_path: Path):
    pipe.save_pretrained(tmp_path / "with")
    pipe.unload_softrepa()
    pipe.save_pretrained(tmp_path / "without")
    bare, ours = contents(tmp_path / "without"), contents(tmp_path / "with")
    index = json.loads(ours.pop(INDEX))
    state = index.pop("_softrepa")
    assert state == {component_of(pipe): {"enabled": True, "weights": {"on": 0.5, "off": None}}}
    assert index == json.loads(bare.pop(INDEX))
    assert ours == bare


def test_each_adapter_lies_in_a_folder_that_load_reads(pipe: Any, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    kept = values(pipe)
    pipe.unload_softrepa()
    pipe.load_softrepa(tmp_path, "again", subfolder=f"softrepa/{component_of(pipe)}/on")
    assert torch.equal(softrepa_parameters(pipe, "again")["tokens"], kept["on.tokens"])


def test_saving_changes_nothing_on_the_pipeline(pipe: Any, tmp_path: Path):
    drawn, config, adapters = tiny.generate(pipe), dict(pipe.config), pipe.get_softrepa_adapters()
    pipe.save_pretrained(tmp_path)
    assert dict(pipe.config) == config
    assert pipe.get_softrepa_adapters() == adapters
    assert torch.equal(tiny.generate(pipe), drawn)


def test_a_save_that_fails_leaves_the_pipelines_config_alone(pipe: Any, tmp_path: Path, monkeypatch: Any):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    config = dict(pipe.config)
    monkeypatch.setattr(type(denoiser_of(pipe)), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path)
    assert dict(pipe.config) == config


def test_a_denoiser_saved_alone_holds_no_key_of_the_adapter(pipe: Any, tmp_path: Path):
    denoiser_of(pipe).save_pretrained(tmp_path / "with")
    pipe.unload_softrepa()
    denoiser_of(pipe).save_pretrained(tmp_path / "without")
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


@pytest.mark.parametrize("branch", ["both", "positive"])
def test_weights_of_layers_and_the_guidance_branch_come_back(pipe: Any, tmp_path: Path, branch: Any):
    parts = {"down": 0.25} if "unet" in pipe.components else {0: 0.25}
    pipe.set_softrepa({"on": parts, "off": 0.75}, guidance_branch=branch)
    pipe.save_pretrained(tmp_path)
    found = type(pipe).from_pretrained(tmp_path)
    assert_same_adapters(found, pipe)
    assert adapters_of(denoiser_of(found)).state.guidance_branch == branch


# Read without this package

_VANILLA = """
import sys, warnings
sys.path.insert(0, {tests!r})
import torch, tiny
from diffusers import DiffusionPipeline
assert "diffusers_softrepa" not in sys.modules
warnings.simplefilter("error")
pipe = DiffusionPipeline.from_pretrained({folder!r})
assert not hasattr(pipe, "load_softrepa")
torch.save(tiny.generate(pipe), {output!r})
pipe.save_pretrained({again!r})
"""


@pytest.mark.parametrize("pipe", ["sd3"], indirect=True)
def test_plain_diffusers_reads_the_folder_as_the_base_model_without_a_word(pipe: Any, tmp_path: Path):
    pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_softrepa()
    names = {"folder": str(tmp_path / "saved"), "output": str(tmp_path / "drawn"), "again": str(tmp_path / "again")}
    code = _VANILLA.format(tests=str(Path(__file__).parent), **names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [
        line for line in done.stderr.splitlines() if "softrepa" in line.lower() or "unexpected" in line.lower()
    ]
    assert torch.equal(torch.load(tmp_path / "drawn"), tiny.generate(pipe))
    assert "_softrepa" not in json.loads((tmp_path / "again" / INDEX).read_text())


# Read back


def test_from_pretrained_brings_adapters_weights_and_inactive_ones_back(pipe: Any, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert_same_adapters(again, pipe)
    assert torch.equal(tiny.generate(again), tiny.generate(pipe))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # one of diffusers' models
@pytest.mark.parametrize("how", ["base class", "auto pipeline", "keyword", "text"])
def test_every_way_to_call_from_pretrained_brings_them_back(pipe: Any, tmp_path: Path, how: str):
    from diffusers import AutoPipelineForText2Image

    pipe.save_pretrained(tmp_path)
    again = {
        "base class": lambda: DiffusionPipeline.from_pretrained(tmp_path),
        "auto pipeline": lambda: AutoPipelineForText2Image.from_pretrained(tmp_path),
        "keyword": lambda: DiffusionPipeline.from_pretrained(pretrained_model_name_or_path=tmp_path),
        "text": lambda: DiffusionPipeline.from_pretrained(str(tmp_path)),
    }[how]()
    assert_same_adapters(again, pipe)


def test_several_active_adapters_and_none_come_back(pipe: Any, tmp_path: Path):
    for names, weights in ((["off", "on"], [0.25, 1.0]), ([], [])):
        pipe.set_softrepa(names, weights)
        pipe.save_pretrained(tmp_path)
        again = DiffusionPipeline.from_pretrained(tmp_path)
        assert_same_adapters(again, pipe)
        assert torch.equal(tiny.generate(again), tiny.generate(pipe))


def test_disabled_adapters_come_back_disabled_with_their_weights(pipe: Any, tmp_path: Path):
    pipe.disable_softrepa()
    pipe.save_pretrained(tmp_path)
    pipe.enable_softrepa()
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.get_softrepa_adapters() == {"on": None, "off": None}
    again.enable_softrepa()
    assert_same_adapters(again, pipe)


def test_saved_again_without_adapters_none_come_back(pipe: Any, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.unload_softrepa()
    again.save_pretrained(tmp_path)
    assert "_softrepa" not in json.loads((tmp_path / INDEX).read_text())
    assert DiffusionPipeline.from_pretrained(tmp_path).get_softrepa_adapters() == {}


def test_saved_again_with_others_only_those_come_back(pipe: Any, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    pipe.delete_softrepa("on")
    pipe.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).get_softrepa_adapters() == {"off": None}


def test_a_pipeline_that_never_had_adapters_is_saved_and_loaded_as_ever(tmp_path: Path, caplog: Any):
    pipe = tiny.sd3_pipeline()
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "softrepa").exists()
    with caplog.at_level(logging.WARNING, "diffusers_softrepa"):
        assert DiffusionPipeline.from_pretrained(tmp_path).get_softrepa_adapters() == {}
    assert not caplog.records


@pytest.mark.parametrize("name", ["a/b", "..", "../../out", "with space", "v1.5", "ä", "a\\b", "CON%2E"])
def test_any_adapter_name_comes_back_and_stays_inside_the_folder(tmp_path: Path, name: str):
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(adapter_name=name)
    pipe.save_pretrained(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert len(list((tmp_path / "saved" / "softrepa" / "transformer").iterdir())) == 1
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert_same_adapters(again, pipe)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_compiled_denoisers_adapters_are_saved_too(tmp_path: Path):
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa()
    pipe.transformer = torch.compile(pipe.transformer)  # nothing is compiled before the first call
    pipe.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).get_softrepa_adapters() == {"softrepa": 1.0}


# What cannot come back is named, and the pipeline loads


def test_an_adapter_that_does_not_fit_a_replaced_denoiser_is_named_and_left_out(
    pipe: Any, tmp_path: Path, caplog: Any
):
    pipe.save_pretrained(tmp_path)
    other = tiny.unet() if component_of(pipe) == "unet" else tiny.sd3_transformer()
    other.register_to_config(cross_attention_dim=16, caption_projection_dim=16)  # what the width is read from
    again = DiffusionPipeline.from_pretrained(tmp_path, **{component_of(pipe): other})
    assert again.get_softrepa_adapters() == {}
    for name in ("on", "off"):
        assert f"was saved with soft-token adapter '{name}', which cannot be loaded: soft tokens have" in caplog.text


def test_a_pipeline_loaded_without_its_denoiser_loads_without_adapters(pipe: Any, tmp_path: Path, caplog: Any):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, **{component_of(pipe): None})
    assert denoiser_of(again) is None
    assert f"cannot be loaded: the pipeline has no {component_of(pipe)}" in caplog.text


def test_one_damaged_adapter_does_not_keep_the_other_from_coming_back(pipe: Any, tmp_path: Path, caplog: Any):
    pipe.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "softrepa" / component_of(pipe) / "off")
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.get_softrepa_adapters() == {"on": 0.5}
    assert "adapter 'off', which cannot be loaded: there is no" in caplog.text
    assert torch.equal(tiny.generate(again), tiny.generate(pipe))


def test_a_denoiser_that_is_passed_in_with_its_own_adapter_keeps_it(pipe: Any, tmp_path: Path, caplog: Any):
    pipe.save_pretrained(tmp_path)
    pipe.delete_softrepa("off")
    mine = values(pipe)
    again = DiffusionPipeline.from_pretrained(tmp_path, **{component_of(pipe): denoiser_of(pipe)})
    assert again.get_softrepa_adapters().keys() == {"on", "off"}
    assert torch.equal(values(again)["on.tokens"], mine["on.tokens"])
    assert "'on' is already loaded" in caplog.text


# Shared denoisers


def test_a_pipeline_made_from_another_shares_its_adapters(pipe: Any, tmp_path: Path):
    image = {"unet": StableDiffusionImg2ImgPipeline, "transformer": StableDiffusion3Img2ImgPipeline}
    second = image[component_of(pipe)].from_pipe(pipe)
    assert second.get_softrepa_adapters() == {"on": 0.5, "off": None}
    second.set_softrepa("off")
    assert pipe.get_softrepa_adapters() == {"on": None, "off": 1.0}
    second.save_pretrained(tmp_path)
    assert_same_adapters(type(second).from_pretrained(tmp_path), pipe)
    second.unload_softrepa()
    assert pipe.get_softrepa_adapters() == {}


# The Hub


def test_a_pipeline_pushed_with_adapters_on_comes_back_with_them_online_and_offline(
    hub: Any, pipe: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
):
    drawn = tiny.generate(pipe)
    pipe.save_pretrained(
        str(tmp_path / "pipe"), push_to_hub=True, repo_id="alice/pipe", token="hf_alice", private=True
    )
    assert f"softrepa/{component_of(pipe)}/off/adapter_model.safetensors" in hub.files("alice/pipe")
    again = DiffusionPipeline.from_pretrained("alice/pipe", token="hf_alice")
    assert_same_adapters(again, pipe)
    assert torch.equal(tiny.generate(again), drawn)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert_same_adapters(DiffusionPipeline.from_pretrained("alice/pipe", local_files_only=True), pipe)
    assert hub.requests == []
    assert "soft-token" not in caplog.text


def test_each_revision_of_a_pipeline_brings_its_own_adapters(hub: Any, tmp_path: Path):
    pipe = tiny.sd15_pipeline()
    pipe.push_to_hub("alice/pipe", token="hf_alice")
    bare = hub.repos["alice/pipe"].branches["main"]
    pipe.add_softrepa(adapter_name="late")
    pipe.push_to_hub("alice/pipe", token="hf_alice")
    found = {
        revision: DiffusionPipeline.from_pretrained(
            "alice/pipe", revision=revision, cache_dir=tmp_path / "cache"
        ).get_softrepa_adapters()
        for revision in (None, bare, "main")
    }
    assert found == {None: {"late": 1.0}, bare: {}, "main": {"late": 1.0}}


def test_an_adapter_trained_on_a_pipeline_of_the_hub_names_it_as_its_base(hub: Any, tmp_path: Path):
    tiny.sd15_pipeline().push_to_hub("alice/pipe", token="hf_alice")
    pipe = DiffusionPipeline.from_pretrained("alice/pipe")
    pipe.add_softrepa()
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token="hf_alice")
    assert b"base_model: alice/pipe" in hub.files("alice/tokens")["README.md"]
    assert b'from_pretrained("alice/pipe")' in hub.files("alice/tokens")["README.md"]


# Modular pipelines keep no adapters, and say so


def test_a_modular_pipeline_says_that_its_adapters_are_not_saved(tmp_path: Path, caplog: Any):
    modular_pipelines = pytest.importorskip("diffusers.modular_pipelines", reason="diffusers 0.35 brought them")
    modular = modular_pipelines.StableDiffusionXLAutoBlocks().init_pipeline()
    unet = tiny.unet(xl=True)
    modular.update_components(unet=unet)
    modular.save_pretrained(str(tmp_path / "without"), overwrite_modular_index=False)
    assert "soft-token" not in caplog.text
    tensors, config = adapter_for(unet)
    load_softrepa(unet, tensors, config=config)
    modular.save_pretrained(str(tmp_path / "with"), overwrite_modular_index=False)
    assert "a modular pipeline is saved without its soft-token adapters; use save_softrepa for them" in caplog.text


def adapter_for(denoiser: Any) -> tuple[dict[str, torch.Tensor], SoftREPAConfig]:
    config = SoftREPAConfig.for_denoiser(denoiser)
    return {name: torch.randn(shape) for name, shape in config.shapes.items()}, config
