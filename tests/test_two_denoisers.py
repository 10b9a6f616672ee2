"""A pipeline with two denoisers: one adapter for each, under one name, in one call."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
import zoo_pipelines
from diffusers_softrepa import (
    SoftREPAConfig,
    evaluate,
    load_softrepa,
    save_softrepa,
    softrepa_disabled,
    softrepa_parameters,
)

pytest_plugins = ["hub_server"]


def transformer(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def pipeline() -> WanPipeline:
    """The noisier half of the steps belongs to `transformer`, the other to `transformer_2`."""
    return WanPipeline(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=tiny.t5_encoder(32),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=transformer(0),
        transformer_2=transformer(1),
        boundary_ratio=0.875,
    )


def generate(pipe: WanPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 4}
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", output_type="latent", max_sequence_length=16, generator=generator, **settings).frames


def config(pipe: WanPipeline) -> SoftREPAConfig:
    return SoftREPAConfig.for_denoiser(pipe.transformer, init_std=1.0, num_timestep_bins=None)


def test_one_verb_gives_each_denoiser_an_adapter_of_its_own():
    pipe = pipeline()
    base = generate(pipe)
    assert pipe.add_softrepa(config(pipe)) == "softrepa"
    parameters = pipe.softrepa_parameters()
    assert list(parameters) == ["transformer.tokens", "transformer_2.tokens"]
    assert not torch.equal(*parameters.values())
    both = generate(pipe)
    assert pipe.get_softrepa_adapters() == {"softrepa": 1.0}
    pipe.transformer_2.disable_softrepa()
    first = generate(pipe)
    pipe.enable_softrepa()
    assert torch.equal(generate(pipe), both)
    pipe.set_softrepa("softrepa", 0.0)
    assert torch.equal(generate(pipe), base)
    pipe.set_softrepa("softrepa")
    pipe.disable_softrepa()
    assert torch.equal(generate(pipe), base)
    assert len({tuple(picture.flatten().tolist()) for picture in (base, first, both)}) == 3
    pipe.unload_softrepa()
    assert pipe.get_softrepa_adapters() == {}
    assert torch.equal(generate(pipe), base)


def test_a_folder_has_a_subfolder_for_each_denoiser(tmp_path: Path):
    pipe = pipeline()
    pipe.add_softrepa(config(pipe))
    expected = generate(pipe)
    pipe.save_softrepa(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")} == {
        "transformer/adapter_model.safetensors",
        "transformer_2/adapter_model.safetensors",
    }
    pipe.unload_softrepa()
    assert pipe.load_softrepa(tmp_path, "again") == "again"
    assert torch.equal(generate(pipe), expected)
    pipe.load_softrepa(tmp_path, "again", hotswap=True)
    assert torch.equal(generate(pipe), expected)
    pipe.delete_softrepa("again")
    assert pipe.get_softrepa_adapters() == {}
    load_softrepa(pipe.transformer, tmp_path, subfolder="transformer")
    load_softrepa(pipe.transformer_2, tmp_path / "transformer_2")
    assert torch.equal(generate(pipe), expected)


def test_an_adapter_of_one_denoiser_alone_is_one_too(tmp_path: Path):
    pipe = pipeline()
    pipe.transformer_2.add_softrepa(config(pipe), "late")
    expected = generate(pipe)
    save_softrepa(pipe, tmp_path)
    pipe.unload_softrepa()
    pipe.load_softrepa(tmp_path)
    assert torch.equal(generate(pipe), expected)
    assert pipe.transformer.get_softrepa_adapters() == {}
    pipe.transformer.add_softrepa(config(pipe), "early")
    pipe.set_softrepa(["early", "softrepa"], [0.5, 1.0])
    assert pipe.get_softrepa_adapters() == {"early": 0.5, "softrepa": 1.0}
    with pytest.raises(ValueError, match="weight"):
        pipe.set_softrepa("softrepa", float("nan"))
    assert pipe.get_softrepa_adapters() == {"early": 0.5, "softrepa": 1.0}
    pipe.set_softrepa("early")
    assert pipe.get_softrepa_adapters() == {"early": 1.0, "softrepa": None}
    pipe.set_softrepa("softrepa")
    assert torch.equal(generate(pipe), expected)
    with pytest.raises(
        ValueError, match=r"no soft-token adapter is named \['never'\]; loaded are \['early', 'softrepa'\]"
    ):
        pipe.set_softrepa("never")


def test_state_dicts_come_by_component():
    pipe = pipeline()
    pipe.add_softrepa(config(pipe))
    expected, settings = generate(pipe), config(pipe)
    tensors = {
        name: {"tokens": softrepa_parameters(getattr(pipe, name))["tokens"].detach().clone()}
        for name in ("transformer", "transformer_2")
    }
    pipe.unload_softrepa()
    pipe.load_softrepa(tensors, config=settings)
    assert torch.equal(generate(pipe), expected)


def test_nothing_is_loaded_unless_all_of_it_fits(tmp_path: Path):
    pipe = pipeline()
    pipe.add_softrepa(config(pipe))
    pipe.save_softrepa(tmp_path)
    pipe.unload_softrepa()
    (tmp_path / "transformer_2" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"transformer_2.adapter_model.safetensors"):
        pipe.load_softrepa(tmp_path)
    assert pipe.get_softrepa_adapters() == {}


def test_an_adapter_of_one_denoiser_is_refused_by_the_pipeline(tmp_path: Path):
    pipe = pipeline()
    pipe.transformer.add_softrepa(config(pipe))
    pipe.transformer.save_softrepa(tmp_path)
    pipe.unload_softrepa()
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(
            ValueError, match=r"several denoisers, so an adapter needs a subfolder .* load an adapter of one"
        ):
            pipe.load_softrepa(source)


def test_a_saved_pipeline_gets_both_back(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pipe = pipeline()
    pipe.add_softrepa(config(pipe), "a")
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "model_index.json").read_text())["_softrepa"]) == {
        "transformer",
        "transformer_2",
    }
    with caplog.at_level(logging.WARNING, logger="diffusers_softrepa"):
        again = WanPipeline.from_pretrained(tmp_path)
    assert not [record for record in caplog.records if "softrepa" in record.name]
    assert_close(generate(again), expected)


def test_both_are_pushed_to_the_hub_and_come_back(hub: Any, tmp_path: Path):
    pipe = pipeline()
    pipe.add_softrepa(config(pipe))
    expected = generate(pipe)
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, repo_id="alice/both", token="hf_alice")
    assert {name for name in hub.files("alice/both") if name.endswith(".safetensors")} == {
        "transformer/adapter_model.safetensors",
        "transformer_2/adapter_model.safetensors",
    }
    pipe.unload_softrepa()
    pipe.load_softrepa("alice/both")
    assert torch.equal(generate(pipe), expected)


def ideogram(monkeypatch: pytest.MonkeyPatch) -> Ideogram4Pipeline:
    """The guided and the unguided prediction come from models of their own; the language model is left out."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=8,
            llm_features_dim=10,
            mrope_section=(2, 2, 2),
        ).eval()

    def features(encoder: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> list[Tensor]:
        return [torch.randn(*ids.shape, 10, generator=torch.Generator().manual_seed(3))]

    monkeypatch.setattr(Ideogram4Pipeline, "_get_text_encoder_hidden_states", staticmethod(features))
    words = tiny.clip_tokenizer()
    words.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=zoo_pipelines.flux2_vae(),
        text_encoder=tiny.clip_text_encoder(),
        tokenizer=words,
        transformer=model(0),
        unconditional_transformer=model(1),
    )


def test_ideogram_has_an_adapter_on_each_of_its_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pipe = ideogram(monkeypatch)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8}
        guidance = {"guidance_scale": 3.0, "guidance_schedule": None}
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", generator=generator, output_type="pt", **settings, **guidance).images

    base = draw()
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, init_std=1.0))
    assert {name.split(".")[0] for name in pipe.softrepa_parameters()} == {"transformer", "unconditional_transformer"}
    both = draw()
    pipe.unconditional_transformer.disable_softrepa()
    one = draw()
    assert not torch.equal(base, both) and not torch.equal(both, one) and not torch.equal(base, one)
    pipe.enable_softrepa()
    pipe.save_softrepa(tmp_path)
    pipe.unload_softrepa()
    assert torch.equal(draw(), base)
    pipe.load_softrepa(tmp_path)
    assert torch.equal(draw(), both)


def test_evaluating_compares_the_base_model_with_the_adapters_of_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pipe = ideogram(monkeypatch)
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8}
    settings |= {"guidance_scale": 3.0, "guidance_schedule": None}

    def columns(name: str, adapters: list[Any]) -> dict[str, bytes]:
        evaluate(pipe, ["a cat"], [], adapters, output_dir=tmp_path / name, **settings)
        return {path.parent.name: path.read_bytes() for path in (tmp_path / name).rglob("images/*/*.png")}

    bare = columns("bare", [None])
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, init_std=1.0))
    pipe.unconditional_transformer.set_softrepa("softrepa", 0.5)
    pipe.transformer.disable_softrepa()
    compared = columns("compared", [None, "softrepa", {"softrepa": 0.5}])
    assert compared["base"] == bare["base"]
    assert len(set(compared.values())) == 3
    assert pipe.transformer.get_softrepa_adapters() == {"softrepa": None}
    assert pipe.unconditional_transformer.get_softrepa_adapters() == {"softrepa": 0.5}
    pipe.transformer.enable_softrepa()
    assert pipe.transformer.get_softrepa_adapters() == {"softrepa": 1.0}


def test_a_context_switches_the_adapters_of_all_denoisers_off():
    pipe = pipeline()
    base = generate(pipe)
    pipe.add_softrepa(config(pipe))
    with softrepa_disabled(pipe):
        assert torch.equal(generate(pipe), base)
        assert pipe.get_softrepa_adapters() == {"softrepa": None}
    assert not torch.equal(generate(pipe), base)
