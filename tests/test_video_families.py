"""Where text goes astray in video denoisers, and that tokens do not: each case on the real class."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import diffusers_softrepa.families as families
import zoo
from diffusers_softrepa import (
    FamilySpec,
    add_softrepa,
    disable_softrepa,
    enable_softrepa,
    family_of,
    softrepa_parameters,
)
from diffusers_softrepa.families import BlockGroup
from zoo import LENGTH, K, Specimen

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's own positions, on a CPU

SPECIMENS = {specimen.name: specimen for specimen in zoo.everything()}
SEEING = ["wan-image", "wan-vace-image", "wan-animate", "chrono-edit", "skyreels-v2-image"]


def rows_into(denoiser: nn.Module, ending: str) -> list[int]:
    """Returns a list of how many rows went into each run of the layers whose names end so."""
    rows: list[int] = []
    for name, module in denoiser.named_modules():
        if name.endswith(ending):
            module.register_forward_hook(lambda layer, args, output: rows.append(output.shape[1]))
    return rows


@pytest.mark.parametrize("name", SEEING)
def test_tokens_are_text_and_the_image_keeps_its_rows(name: str):
    """Wan counts the last 512 rows as text: in the sequence of both, tokens would push text to the image."""
    specimen = SPECIMENS[name]
    denoiser = zoo.with_tokens(specimen)
    image, text = rows_into(denoiser, "attn2.add_k_proj"), rows_into(denoiser, "attn2.to_k")
    specimen.call(denoiser, specimen.inputs(2, LENGTH))
    assert set(image) == {5} and set(text) == {512 + K}
    assert {block.group.level for block in zoo.blocks_of(denoiser)} == {"kv"}


def test_tokens_of_the_block_would_be_taken_for_the_image(monkeypatch: Any):
    """And nothing would say so: this is why the spec has them at the projections."""
    specimen = SPECIMENS["wan-image"]
    naive = replace(family_of(specimen.denoiser()), groups=(BlockGroup("blocks", "encoder_hidden_states"),))
    monkeypatch.setitem(families._FAMILIES, specimen.kind, naive)
    denoiser = zoo.with_tokens(specimen)
    image, text = rows_into(denoiser, "attn2.add_k_proj"), rows_into(denoiser, "attn2.to_k")
    specimen.call(denoiser, specimen.inputs(2, LENGTH))
    assert set(image) == {5 + K} and set(text) == {512}


@pytest.mark.parametrize("name", ["wan", "wan-vace", "skyreels-v2"])
def test_without_an_image_tokens_at_the_projections_are_tokens_of_the_block(name: str, monkeypatch: Any):
    specimen = SPECIMENS[name]
    inputs = specimen.inputs(2, LENGTH)
    denoiser = zoo.with_tokens(specimen)
    assert {block.group.level for block in zoo.blocks_of(denoiser)} == {"block"}
    expected = specimen.call(denoiser, inputs)
    spec = family_of(denoiser)
    paths = list(dict.fromkeys(group.path for group in spec.groups))
    groups = tuple(BlockGroup(path, "encoder_hidden_states", level="kv") for path in paths)
    monkeypatch.setitem(families._FAMILIES, specimen.kind, replace(spec, groups=groups))
    assert torch.equal(specimen.call(zoo.with_tokens(specimen), inputs), expected)


def skip_unless_fusible(specimen: zoo.Specimen) -> None:
    try:
        specimen.denoiser().fuse_qkv_projections()
    except AttributeError as error:
        pytest.skip(f"this diffusers cannot fuse them: {error}")


@pytest.mark.parametrize("name", SEEING)
def test_fused_projections_are_refused_where_tokens_go_into_them(name: str):
    specimen = SPECIMENS[name]
    skip_unless_fusible(specimen)
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    expected = specimen.call(denoiser, inputs)
    denoiser.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"its projections are fused, .* call unfuse_qkv_projections\(\)"):
        specimen.call(denoiser, inputs)
    disable_softrepa(denoiser)
    specimen.call(denoiser, inputs)
    enable_softrepa(denoiser)
    denoiser.unfuse_qkv_projections()
    assert torch.equal(specimen.call(denoiser, inputs), expected)


@pytest.mark.parametrize("name", ["wan", "skyreels-v2", "helios"])
def test_fused_projections_change_nothing_where_blocks_get_the_tokens(name: str):
    specimen = SPECIMENS[name]
    skip_unless_fusible(specimen)
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    expected = specimen.call(denoiser, inputs)
    denoiser.fuse_qkv_projections()
    assert_close(specimen.call(denoiser, inputs), expected, rtol=1e-5, atol=1e-5)


def with_groups(change: Callable[[BlockGroup], BlockGroup]) -> Callable[[FamilySpec], FamilySpec]:
    return lambda spec: replace(spec, groups=tuple(change(group) for group in spec.groups))


def with_side(**fields: Any) -> Callable[[FamilySpec], FamilySpec]:
    return with_groups(
        lambda group: replace(group, extended=tuple(replace(side, **fields) for side in group.extended))
    )


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hunyuan-video", with_side(where="end")),
        ("hunyuan-video-1.5", with_side(where="end")),
        ("mochi", with_side(where="end")),
        ("mochi", with_side(fill=0.0)),
        ("motif-video-image", with_groups(lambda group: replace(group, at=0))),
        ("cogvideox", with_groups(lambda group: replace(group, returns=None))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spec_that_is_wrong_in_one_word_breaks_the_law(
    name: str, wrong: Callable[[FamilySpec], FamilySpec], monkeypatch: Any
):
    """With tokens that are hidden from attention a right spec gives the native prediction, a wrong one does not."""
    specimen = SPECIMENS[name]
    inputs = specimen.masked() if specimen.mask is not None else specimen.inputs(2, LENGTH)
    spec = families._FAMILIES[specimen.kind]
    assert hidden_tokens_are_not_felt(specimen, inputs)
    monkeypatch.setitem(families._FAMILIES, specimen.kind, wrong(spec))
    assert not hidden_tokens_are_not_felt(specimen, inputs)


def hidden_tokens_are_not_felt(specimen: Specimen, inputs: zoo.Inputs) -> bool:
    denoiser = zoo.with_tokens(specimen, num_timestep_bins=None).requires_grad_(False)
    disable_softrepa(denoiser)
    native = specimen.call(denoiser, inputs)
    enable_softrepa(denoiser)
    zoo.fill_tokens(denoiser, float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        hidden = zoo.hide_keys_that_are_not_numbers(patch)
        try:
            got = specimen.call(denoiser, inputs)
        except RuntimeError:
            return False
    return set(hidden) <= {K} and torch.allclose(got, native, rtol=1e-5, atol=1e-5)


RAGGED = ["hunyuan-video", "hunyuan-video-framepack", "hunyuan-video-1.5-image", "mochi", "motif-video-image", "ltx"]


@pytest.mark.parametrize("name", RAGGED)
def test_a_caption_does_not_feel_how_long_the_others_are(name: str):
    """Masks with a length of their own for each sample, and each sample with a timestep of its own."""
    specimen = SPECIMENS[name]
    denoiser, levels = zoo.with_tokens(specimen), torch.tensor([150.0, 950.0])
    masks = [specimen.mask(1, LENGTH, valid) for valid in (3, 6)]
    ragged = {key: torch.cat([mask[key] for mask in masks]) for key in masks[0]}
    inputs = {**specimen.inputs(2, LENGTH), **ragged}
    together = specimen.call(denoiser, inputs, levels).chunk(2)
    for index, got in enumerate(together):
        alone = {key: one_of(value, index) for key, value in inputs.items()}
        expected = specimen.call(denoiser, {**alone, "batch": 1}, levels[index])
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


def one_of(value: Any, index: int, rows: int = 1) -> Any:
    """Returns the part of an input that is one sample's, `rows` of a batch of two."""
    of_batch = isinstance(value, Tensor) and value.shape[:1] == (2 * rows,) and value.ndim > 1
    if isinstance(value, Tensor) and value.shape == (2,) and value.is_floating_point():
        return value[index : index + 1]
    return value[index * rows : (index + 1) * rows] if of_batch else value


@pytest.mark.parametrize(("name", "repeats"), [("latte", 1), ("animate-diff", 2)])
def test_frames_share_the_tokens_of_their_video(name: str, repeats: int):
    """Text comes once for each frame; tokens, of a timestep for each video, come as often."""
    specimen = SPECIMENS[name]
    denoiser, levels = zoo.with_tokens(specimen), torch.tensor([150.0, 950.0])
    inputs = specimen.inputs(2, LENGTH)
    text = inputs.pop("encoder_hidden_states")
    seen: list[int] = []
    zoo.blocks_of(denoiser)[0].module.register_forward_pre_hook(
        lambda block, args, kwargs: seen.append([*args, *kwargs.values()][0].shape[0]), with_kwargs=True
    )
    together = specimen.call(denoiser, {**inputs, "encoder_hidden_states": text}, levels).chunk(2)
    assert seen == [4], "two videos of two frames"
    for index, got in enumerate(together):
        alone = {key: one_of(value, index) for key, value in inputs.items()}
        alone["encoder_hidden_states"] = one_of(text, index, repeats)
        expected = specimen.call(denoiser, {**alone, "batch": 1}, levels[index])
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "ltx", "skyreels-v2-diffusion-forcing"])
def test_of_timesteps_for_each_part_of_a_video_the_noisiest_counts(name: str):
    """As for a first frame that is given: its rows are clean, the timestep of the video is that of the others."""
    SPECIMENS["wan-timestep-of-each-token" if name == "wan" else name].denoiser()  # skips where it takes only one
    specimen = replace(SPECIMENS[name], levels=None)
    denoiser = zoo.with_tokens(specimen)
    inputs = specimen.inputs(1, LENGTH)
    forcing = inputs.pop("enable_diffusion_forcing", None)
    parts = 8 if forcing is None else 2
    several = {} if forcing is None else {"enable_diffusion_forcing": True}
    same = denoiser(**inputs, timestep=torch.full((1,), 730.0)).sample
    assert_close(denoiser(**inputs, **several, timestep=torch.full((1, parts), 730.0)).sample, same)

    parameters = softrepa_parameters(denoiser)
    given = torch.full((1, parts), 730.0)
    given[:, : parts // 2] = 0.0
    denoiser(**inputs, **several, timestep=given).sample.square().mean().backward()
    reached = parameters["timestep_tokens"].grad.abs().amax(dim=(1, 2)) > 0
    assert reached.nonzero().flatten().tolist() == [7]


def test_decoding_blocks_of_motif_video_get_no_tokens():
    """They get video where the others get text."""
    denoiser = SPECIMENS["motif-video"].denoiser()
    assert [block.path for block in zoo.blocks_of(denoiser)] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]


def test_blocks_between_frames_get_no_tokens():
    paths = [block.path for block in zoo.blocks_of(SPECIMENS["latte"].denoiser())]
    assert paths == [f"transformer_blocks.{index}" for index in range(3)]


@pytest.mark.parametrize(
    ("name", "width", "heard"), [("ltx2", 24, True), ("kandinsky6", 24, True), ("kandinsky6-silent", 24, False)]
)
def test_a_token_has_a_part_for_the_picture_and_one_for_the_sound(name: str, width: int, heard: bool):
    specimen = SPECIMENS[name]
    denoiser = zoo.with_tokens(specimen)
    specimen.call(denoiser, specimen.inputs(2, LENGTH)).square().mean().backward()
    gradient = softrepa_parameters(denoiser)["tokens"].grad
    assert (gradient[..., :width].abs().amax(dim=-1) > 0).all()
    assert ((gradient[..., width:].abs().amax(dim=-1) > 0) == heard).all()


@pytest.mark.parametrize("name", ["ltx2", "ltx2.3"])
def test_tokens_equal_longer_text_in_both_streams(name: str):
    specimen = SPECIMENS[name]
    seen: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    for length in (LENGTH + K, LENGTH):
        denoiser = specimen.denoiser()
        block = zoo.blocks_of(denoiser)[0]
        block.module.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((both_texts(kwargs), output)), with_kwargs=True
        )
        if length == LENGTH:
            add_softrepa(denoiser, zoo.everywhere(denoiser, num_timestep_bins=None, num_layers=1))
            zoo.fill_tokens(denoiser, seen[0][0][0, :K])
        specimen.call(denoiser, specimen.inputs(2, length))
    (_, native), (short, ours) = seen
    assert short.shape[1] == LENGTH
    assert_close(ours, native, rtol=1e-5, atol=1e-5)


def both_texts(arguments: dict[str, Any]) -> Tensor:
    return torch.cat([arguments["encoder_hidden_states"], arguments["audio_encoder_hidden_states"]], dim=-1)
