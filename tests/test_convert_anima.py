"""The file of ComfyUI's Anima node: read, written, and drawn with as the node draws."""

import inspect
import itertools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import CosmosTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import diffusers_softrepa
from diffusers_softrepa import SoftREPAConfig
from diffusers_softrepa.checkpoint import load_checkpoint, save_checkpoint
from diffusers_softrepa.convert import export_anima, import_anima, main, read_anima, write_anima

K, L, D, BLOCKS = 4, 2, 12, 3
CONTEXT, WORDS = 16, 5  # rows of the padded context, and those of them that hold text


def anima() -> CosmosTransformer3DModel:
    """Returns a tiny frozen denoiser in Anima's form: the timestep is sigma, text is read as it comes."""
    torch.manual_seed(0)
    denoiser = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=BLOCKS,
        mlp_ratio=2.0,
        text_embed_dim=D,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    for parameter in denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return denoiser.eval().requires_grad_(False)


def file_of(bins: int = 10, banks: int | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a file, as large as text."""
    lead = () if banks is None else (banks,)
    columns = (banks or 1) * L * D
    return {"tokens": torch.randn(*lead, L, K, D), "t_offsets.weight": torch.randn(bins, columns)}


def inputs(rows: int) -> dict[str, Tensor]:
    """Returns what a denoiser reads beside sigma: two captions, padded with zeros to `rows`."""
    generator = torch.Generator().manual_seed(1)
    context = torch.zeros(2, rows, D)
    context[:, :WORDS] = torch.randn(2, WORDS, D, generator=generator)
    return {
        "hidden_states": torch.randn(2, 4, 1, 8, 8, generator=generator),
        "encoder_hidden_states": context,
    }


def as_the_node_does(denoiser: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, str], sigma: Tensor) -> Any:
    """Returns the prediction with tokens written over rows of a padded context, from the file's numbers alone."""
    tokens, table = tensors["tokens"].float(), tensors["t_offsets.weight"].float()
    if tokens.ndim == 4:
        tokens, table = tokens[0], table[:, : L * D]
    row = (sigma * table.shape[0]).floor().long().clamp(0, table.shape[0] - 1)
    shown = tokens + table[row].unflatten(1, (L, 1, D))  # (batch, L, K, D)
    first = CONTEXT - K if metadata["ss_splice_position"] == "end_of_sequence" else WORDS

    def overwrite(layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = inspect.signature(block.forward).bind(*args, **kwargs)
            context = call.arguments["encoder_hidden_states"].clone()
            context[:, first : first + K] = shown[:, layer]
            call.arguments["encoder_hidden_states"] = context
            return call.args, call.kwargs

        return hook

    hooks = [
        denoiser.transformer_blocks[layer].register_forward_pre_hook(overwrite(layer), with_kwargs=True)
        for layer in range(L)
    ]
    try:
        return denoiser(**inputs(CONTEXT), timestep=sigma).sample
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("splice_position", ["end_of_sequence", "front_of_padding"])
@pytest.mark.parametrize("banks", [None, 2])
@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.1, 0.35, 0.7, 0.999, 1.0])
def test_an_imported_file_draws_what_the_node_draws(sigma: float, banks: int | None, splice_position: str):
    """Each block then reads as many rows as the node's: a context K rows shorter, and K tokens or K zeros."""
    tensors, levels = file_of(banks=banks), torch.tensor([sigma, 0.5])
    denoiser = anima()
    expected = as_the_node_does(denoiser, tensors, {"ss_splice_position": splice_position}, levels)
    plain = denoiser(**inputs(CONTEXT), timestep=levels).sample
    config, ours = import_anima(tensors, num_blocks=BLOCKS)
    diffusers_softrepa.load_softrepa(denoiser, ours, config=config)
    drawn = denoiser(**inputs(CONTEXT - K), timestep=levels).sample
    torch.testing.assert_close(drawn, expected)
    assert (drawn - plain).abs().max() > 0.01


@pytest.mark.parametrize("bins", [None, 1, 20])
def test_an_exported_adapter_draws_the_same_in_the_node(bins: int | None, tmp_path: Path):
    denoiser, levels = anima(), torch.tensor([0.2, 0.9])
    config = SoftREPAConfig.for_denoiser(denoiser, num_layers=BLOCKS, num_timestep_bins=bins, init_std=1.0)
    diffusers_softrepa.add_softrepa(denoiser, config)
    for name, held in diffusers_softrepa.softrepa_parameters(denoiser).items():
        held.data[..., L:, :, :] *= 0 if name == "tokens" else 1
        held.data[..., L:, :] *= 0 if name == "timestep_tokens" else 1
    drawn = denoiser(**inputs(CONTEXT - K), timestep=levels).sample
    held = {name: value.data for name, value in diffusers_softrepa.softrepa_parameters(denoiser).items()}
    write_anima(tmp_path / "loras" / "mine.safetensors", *export_anima(config, held))
    diffusers_softrepa.unload_softrepa(denoiser)
    file = read_anima(tmp_path / "loras" / "mine.safetensors")
    assert file[0]["tokens"].shape == (L, K, D)
    torch.testing.assert_close(as_the_node_does(denoiser, *file, levels), drawn)


@pytest.mark.parametrize("bins", [1, 2, 10, 50, 100, 250, 1000])
def test_bins_that_divide_a_thousand_have_the_nodes_edges(bins: int):
    from diffusers_softrepa.tokens import timestep_bin

    sigma = torch.arange(4000) / 4000 + 1e-5
    node = (sigma * bins).floor().long().clamp(0, bins - 1)
    assert torch.equal(timestep_bin(sigma, bins, scale=1000.0), node)


def test_a_longer_context_is_not_what_the_node_does():
    """Each further row of zeros takes attention too: what a page says must be so."""
    tensors, levels = file_of(), torch.tensor([0.5, 0.5])
    denoiser = anima()
    expected = as_the_node_does(denoiser, tensors, {"ss_splice_position": "end_of_sequence"}, levels)
    config, ours = import_anima(tensors)
    diffusers_softrepa.load_softrepa(denoiser, ours, config=config)
    assert not torch.allclose(denoiser(**inputs(CONTEXT), timestep=levels).sample, expected, atol=1e-4)


@pytest.mark.skipif(
    not hasattr(diffusers, "AnimaTextConditioner"), reason="this diffusers has no AnimaTextConditioner"
)
def test_the_conditioner_of_diffusers_pads_to_the_rows_that_it_is_told():
    from diffusers import AnimaTextConditioner

    sizes = {"num_attention_heads": 2, "source_dim": 8, "target_dim": 8, "model_dim": 8, "num_layers": 1}
    known = inspect.signature(AnimaTextConditioner.__init__).parameters
    conditioner = AnimaTextConditioner(**{name: size for name, size in sizes.items() if name in known}).eval()
    assert conditioner.config.min_sequence_length == 512
    conditioner.register_to_config(min_sequence_length=512 - K)
    text = torch.randn(1, 3, 8)
    with torch.no_grad():
        context = conditioner(source_hidden_states=text, target_input_ids=torch.ones(1, 5, dtype=torch.long))
    assert context.shape[1] == 512 - K
    assert not context[:, 5:].any()


@pytest.mark.parametrize(("bins", "banks"), list(itertools.product([2, 10], [None, 2])))
def test_importing_what_was_exported_is_the_identity(bins: int, banks: int | None):
    tensors = file_of(bins, banks)
    again, metadata = export_anima(*import_anima(tensors))
    torch.testing.assert_close(again, tensors, rtol=0, atol=0)
    assert metadata["ss_n_banks"] == str(banks or 1)


def test_layers_that_were_added_as_zeros_are_left_out_again():
    tensors = file_of(banks=2)
    config, ours = import_anima(tensors, num_blocks=7)
    assert config.num_layers == 7
    torch.testing.assert_close(export_anima(config, ours)[0], tensors, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the file has tokens for 2 blocks, but num_blocks is 1"):
        import_anima(tensors, num_blocks=1)


def test_one_row_of_zeros_is_no_bins():
    tensors = {"tokens": torch.randn(L, K, D), "t_offsets.weight": torch.zeros(1, L * D)}
    config, ours = import_anima(tensors)
    assert (config.num_timestep_bins, list(ours)) == (None, ["tokens"])
    again, metadata = export_anima(config, ours)
    torch.testing.assert_close(again, tensors, rtol=0, atol=0)
    assert metadata["ss_n_t_buckets"] == "1"


def test_a_half_precision_file_with_further_keys_is_read_as_the_node_reads_it(tmp_path: Path):
    tensors = {name: value.bfloat16() for name, value in file_of().items()}
    save_file({**tensors, "something.else": torch.ones(1)}, tmp_path / "soft.safetensors")
    read, _ = read_anima(tmp_path / "soft.safetensors")
    config, ours = import_anima(read, base_model="circle/anima")
    assert config.base_model_name_or_path == "circle/anima"
    torch.testing.assert_close(ours["tokens"], tensors["tokens"].float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_down": torch.zeros(1)}, r"holds 'tokens' and 't_offsets.weight', but this one holds \['lora_down'\]"),
        ({**file_of(), "tokens": torch.zeros(K, D)}, r"\(L, K, D\) or \(N, L, K, D\), but is .*\(4, 12\)"),
        ({**file_of(), "t_offsets.weight": torch.zeros(10, 7)}, r"1\*2\*12 = 24 numbers, .*\(10, 7\)"),
        ({**file_of(), "tokens": torch.full((L, K, D), torch.nan)}, "must be finite, but holds 96 NaN"),
    ],
)
def test_what_is_no_file_of_the_node_is_said_in_a_sentence(tensors: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        import_anima(tensors)


def test_what_the_node_cannot_read_is_refused():
    config = SoftREPAConfig(family="sd3", token_dim=D)
    tensors = {"tokens": torch.zeros(1, 4, D)}
    with pytest.raises(ValueError, match="reads adapters of family 'cosmos', but this one is of family 'sd3'"):
        export_anima(config, tensors)
    config = SoftREPAConfig(family="cosmos", token_dim=D)
    with pytest.raises(ValueError, match="splice_position must be one of"):
        export_anima(config, tensors, splice_position="front")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reads .safetensors files, but the file to write is mine.pt"):
        write_anima("mine.pt", {}, {})


def test_a_file_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(OSError, match="there is no file"):
        read_anima(tmp_path / "nothing.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"half.safetensors is no complete safetensors file"):
        read_anima(tmp_path / "half.safetensors")


def test_the_command_line_goes_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = file_of()
    save_file(tensors, tmp_path / "in.safetensors", metadata={"ss_splice_position": "front_of_padding"})
    main([str(tmp_path / "in.safetensors"), str(tmp_path / "ours"), "--from", "anima"])
    main([str(tmp_path / "ours"), str(tmp_path / "out.safetensors"), "--to", "anima"])
    assert "move the file to ComfyUI's models/loras" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "ours")[0].family == "cosmos"
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_splice_position"] == "end_of_sequence"
    torch.testing.assert_close(read_anima(tmp_path / "out.safetensors")[0], tensors, rtol=0, atol=0)


def test_the_command_line_refuses_another_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_checkpoint(tmp_path, SoftREPAConfig(family="sd3", token_dim=D), {"tokens": torch.zeros(1, 4, D)})
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path / "out.safetensors"), "--to", "anima"])
    assert "reads adapters of family 'cosmos'" in capsys.readouterr().err
