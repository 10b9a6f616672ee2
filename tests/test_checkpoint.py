"""Folders and files of an adapter: what is saved is what is loaded, and a file is whole or not there."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from diffusers_softrepa import SoftREPAConfig, load_softrepa, softrepa_parameters
from diffusers_softrepa.checkpoint import load_checkpoint, save_checkpoint
from diffusers_softrepa.hub import HubOptions

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@pytest.fixture
def config() -> SoftREPAConfig:
    return SoftREPAConfig.for_denoiser(tiny.sd3_transformer(), num_timestep_bins=5, base_model_name_or_path="a/base")


@pytest.fixture
def tensors(config: SoftREPAConfig) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in config.shapes.items()}


def assert_same(found: tuple[SoftREPAConfig, dict[str, Tensor]], config: SoftREPAConfig, tensors: Any) -> None:
    assert found[0] == config
    assert found[1].keys() == tensors.keys()
    assert all(torch.equal(found[1][name], tensors[name]) for name in tensors)


def test_a_saved_folder_holds_weights_config_and_card(tmp_path: Path, config: Any, tensors: Any):
    assert save_checkpoint(tmp_path / "new" / "folder", config, tensors) == [WEIGHTS, CONFIG, CARD]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == sorted([WEIGHTS, CONFIG, CARD])


def test_folder_file_and_state_dict_give_the_same_adapter(tmp_path: Path, config: Any, tensors: Any):
    save_checkpoint(tmp_path, config, tensors)
    for source in (tmp_path, str(tmp_path), tmp_path / WEIGHTS):
        assert_same(load_checkpoint(source), config, tensors)
    assert_same(load_checkpoint(tensors, config), config, tensors)


def test_a_file_alone_is_enough(tmp_path: Path, config: Any, tensors: Any):
    save_checkpoint(tmp_path, config, tensors)
    alone = tmp_path / "elsewhere.safetensors"
    (tmp_path / WEIGHTS).rename(alone)
    (tmp_path / CONFIG).unlink()
    assert_same(load_checkpoint(alone), config, tensors)


def test_a_file_without_metadata_has_its_config_from_the_json_beside_it(tmp_path: Path, config: Any, tensors: Any):
    save_checkpoint(tmp_path, config, tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    for source in (tmp_path, tmp_path / WEIGHTS):
        assert_same(load_checkpoint(source), config, tensors)


def test_a_given_config_replaces_the_stored_one(tmp_path: Path, config: Any, tensors: Any):
    save_checkpoint(tmp_path, config, tensors)
    given = SoftREPAConfig.from_dict({**config.to_dict(), "base_model_name_or_path": "another/base"})
    assert load_checkpoint(tmp_path, given)[0].base_model_name_or_path == "another/base"


def test_subfolder_and_weight_name_are_found_in_a_folder(tmp_path: Path, config: Any, tensors: Any):
    files = save_checkpoint(tmp_path / "sub", config, tensors, weight_name="mine.safetensors")
    assert files == ["mine.safetensors", CONFIG, CARD]
    options = HubOptions(subfolder="sub", weight_name="mine.safetensors")
    assert_same(load_checkpoint(tmp_path, options=options), config, tensors)
    assert_same(load_checkpoint(tmp_path, options=HubOptions(weight_name="sub/mine.safetensors")), config, tensors)


def test_a_state_dict_is_not_changed(config: Any, tensors: Any):
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    denoiser = tiny.sd3_transformer()
    load_softrepa(denoiser, tensors, config=config, is_trainable=True)
    with torch.no_grad():
        softrepa_parameters(denoiser)["tokens"].add_(1)
    assert_same((config, tensors), config, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_floating_dtype_is_kept_in_the_file_and_used_as_float32(
    tmp_path: Path, config: Any, tensors: Any, dtype: torch.dtype
):
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_checkpoint(tmp_path, config, stored)
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path)[1].values()} == {dtype}
    denoiser = tiny.sd3_transformer()
    load_softrepa(denoiser, tmp_path)
    assert torch.equal(softrepa_parameters(denoiser)["tokens"], stored["tokens"].to(torch.float32))


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
def test_save_then_load_gives_the_same_pictures(tmp_path: Path, family: tiny.Family):
    pipe = family.pipeline()
    pipe.add_softrepa()
    drawn = tiny.generate(pipe)
    pipe.save_softrepa(tmp_path)
    pipe.unload_softrepa()
    assert not torch.equal(tiny.generate(pipe), drawn)
    pipe.load_softrepa(tmp_path)
    assert torch.equal(tiny.generate(pipe), drawn)


def test_the_json_is_plain_and_speaks_pefts_names(tmp_path: Path, config: Any, tensors: Any):
    save_checkpoint(tmp_path, config, tensors)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["peft_type"] == "SOFTREPA"
    assert values["base_model_name_or_path"] == "a/base"
    assert values["inference_mode"] is False
    assert values.keys() >= {"revision", "task_type", "family", "token_dim", "num_tokens", "num_layers"}


def test_pefts_own_classmethod_reads_the_config_and_its_own_method_writes_one(
    tmp_path: Path, config: Any, tensors: Any
):
    save_checkpoint(tmp_path, config, tensors)
    assert SoftREPAConfig.from_pretrained(str(tmp_path)) == config
    save_file(tensors, tmp_path / WEIGHTS)
    config.save_pretrained(str(tmp_path))
    assert load_checkpoint(tmp_path)[0].shapes == config.shapes


def test_the_file_says_what_it_is_to_those_who_know_safetensors_only(tmp_path: Path, config: Any, tensors: Any):
    save_checkpoint(tmp_path, config, tensors)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "sd3/softrepa"
    assert json.loads(metadata["softrepa_config"]) == config.to_dict()
    assert load_file(tmp_path / WEIGHTS).keys() == {"tokens", "timestep_tokens"}


def test_equal_adapters_are_equal_files(tmp_path: Path, config: Any, tensors: Any):
    contents = set()
    for index in range(8):
        save_checkpoint(tmp_path / str(index), config, dict(sorted(tensors.items(), reverse=index % 2 == 0)))
        contents.add((tmp_path / str(index) / WEIGHTS).read_bytes())
    assert len(contents) == 1


def test_a_save_that_breaks_off_leaves_the_old_files_and_no_partial_ones(
    tmp_path: Path, config: Any, tensors: Any, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint(tmp_path, config, tensors)
    names = sorted(os.listdir(tmp_path))

    def half(handle: int) -> None:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, config, {name: tensor + 1 for name, tensor in tensors.items()})
    assert sorted(os.listdir(tmp_path)) == names
    assert_same(load_checkpoint(tmp_path), config, tensors)


def test_saving_again_replaces_the_values_but_not_a_card_that_is_there(tmp_path: Path, config: Any, tensors: Any):
    (tmp_path / CARD).write_text("by hand")
    for shift in (0, 1):
        shifted = {name: tensor + shift for name, tensor in tensors.items()}
        save_checkpoint(tmp_path, config, shifted)
        assert_same(load_checkpoint(tmp_path), config, shifted)
    assert (tmp_path / CARD).read_text() == "by hand"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_files_are_as_readable_as_any_other_new_file(tmp_path: Path, config: Any, tensors: Any):
    save_checkpoint(tmp_path, config, tensors)
    (tmp_path / "ordinary").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", WEIGHTS, CONFIG, CARD)}
    assert len(modes) == 1


@pytest.mark.parametrize("weight_name", ["mine.bin", "mine", "../mine.safetensors", "sub/mine.safetensors"])
def test_a_weight_name_that_could_not_be_loaded_is_refused(
    tmp_path: Path, config: Any, tensors: Any, weight_name: str
):
    with pytest.raises(ValueError, match=r"weight_name must be a plain file name that ends in \.safetensors"):
        save_checkpoint(tmp_path / "new", config, tensors, weight_name=weight_name)
    assert not (tmp_path / "new").exists()


def test_saving_over_a_file_is_refused(tmp_path: Path, config: Any, tensors: Any):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"the place of an adapter must be a folder, but .*file is a file"):
        save_checkpoint(tmp_path / "file", config, tensors)
    assert (tmp_path / "file").read_text() == "mine"


def test_tensors_that_do_not_fit_the_config_are_not_saved(tmp_path: Path, config: Any, tensors: Any):
    with pytest.raises(ValueError, match="tokens in the adapter to save must be finite"):
        save_checkpoint(tmp_path / "new", config, {**tensors, "tokens": tensors["tokens"] * float("nan")})
    assert not (tmp_path / "new").exists()
