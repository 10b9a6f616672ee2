"""Each word of a family spec, on denoisers small enough to say what must come out."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close

import diffusers_softrepa.families as families
from diffusers_softrepa import (
    FamilySpec,
    SoftREPAConfig,
    add_softrepa,
    register_family,
    set_softrepa,
    softrepa_parameters,
    unload_softrepa,
)
from diffusers_softrepa.families import BlockGroup, ExtendedArgument, TimestepArgument, text_blocks
from diffusers_softrepa.insertion import cut_tokens, insert_tokens

WIDTH, K = 8, 2


class Counting(nn.Module):
    """A block that reads an image's tokens and text apart, told apart by a fixed number of text rows."""

    def __init__(self) -> None:
        super().__init__()
        self.attn2 = nn.ModuleDict(
            {"to_k": nn.Linear(WIDTH, 4), "to_v": nn.Linear(WIDTH, 4), "add_k": nn.Linear(WIDTH, 4)}
        )

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        seen, words = context[:, :-5], context[:, -5:]
        weights = (hidden @ self.attn2["to_k"](words).transpose(1, 2)).softmax(dim=-1)
        return hidden + weights @ self.attn2["to_v"](words) + self.attn2["add_k"](seen).mean(dim=1, keepdim=True)


class CountingDenoiser(ModelMixin, ConfigMixin):
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.stages = nn.ModuleList(nn.ModuleList(Counting() for _ in range(depth)) for _ in range(2))

    def forward(self, hidden: Tensor, context: Tensor, t: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    hidden = self._gradient_checkpointing_func(block, hidden, context)
                else:
                    hidden = block(hidden, context)
        return hidden


COUNTING = FamilySpec(
    name="counting",
    denoiser="CountingDenoiser",
    groups=(BlockGroup("stages", text="context", level="kv"),),
    width=lambda config: WIDTH,
    defaults=lambda config: {"num_tokens": K, "num_layers": 2 * config["depth"], "num_timestep_bins": 10},
    timestep=TimestepArgument("t"),
)


@pytest.fixture
def denoiser(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    register_family(COUNTING)
    yield CountingDenoiser().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, generator=generator), torch.randn(2, 4 + 5, WIDTH, generator=generator)


def config(denoiser: Any) -> SoftREPAConfig:
    return SoftREPAConfig.for_denoiser(denoiser, init_std=1.0)


def by_hand(denoiser: Any, hidden: Tensor, context: Tensor, weight: float = 1.0, bin_: int = 5) -> Tensor:
    """What the denoiser gives when tokens are keys and values of text, and none of the image's."""
    parameters = softrepa_parameters(denoiser)
    layer = 0
    for stage in denoiser.stages:
        for block in stage:
            seen, words = context[:, :-5], context[:, -5:]
            tokens = (parameters["tokens"][layer] + parameters["timestep_tokens"][bin_, layer]).expand(2, -1, -1)
            outputs = []
            for rows in (words, torch.cat([tokens, words], dim=1)):
                attn = block.attn2
                weights = (hidden @ (_plain(attn["to_k"], rows)).transpose(1, 2)).softmax(dim=-1)
                read = weights @ _plain(attn["to_v"], rows)
                outputs.append(hidden + read + _plain(attn["add_k"], seen).mean(dim=1, keepdim=True))
            hidden = (1 - weight) * outputs[0] + weight * outputs[1]
            layer += 1
    return hidden


def _plain(linear: Any, rows: Tensor) -> Tensor:
    """Returns a projection, with LoRA if it has it, calculated from its weights."""
    if hasattr(linear, "base_layer"):
        low, high = linear.lora_A["default"].weight, linear.lora_B["default"].weight
        scaling = linear.scaling["default"]
        return _plain(linear.base_layer, rows) + scaling * rows @ low.T @ high.T
    return nn.functional.linear(rows, linear.weight, linear.bias)


def test_tokens_at_the_projections_leave_the_blocks_count_of_its_text_alone(denoiser: Any):
    hidden, context = inputs()
    base = denoiser(hidden, context, torch.tensor(500.0))
    name = add_softrepa(denoiser, config(denoiser))
    for weight in (1.0, 0.25):
        set_softrepa(denoiser, name, weight)
        assert_close(denoiser(hidden, context, torch.tensor(500.0)), by_hand(denoiser, hidden, context, weight))
    unload_softrepa(denoiser)
    assert torch.equal(denoiser(hidden, context, torch.tensor(500.0)), base)
    assert not any("forward" in vars(module) for module in denoiser.modules())


def test_tokens_at_the_projections_survive_gradient_checkpointing(denoiser: Any):
    add_softrepa(denoiser, config(denoiser))
    parameters = list(softrepa_parameters(denoiser).values())
    expected: list[Tensor] = []
    for checkpointed in (False, True):
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        outputs = [denoiser(*inputs(), torch.tensor([level])) for level in (50.0, 950.0)]
        got = list(torch.autograd.grad(outputs[0].square().sum() + 2 * outputs[1].square().sum(), parameters))
        assert_close(got, expected or got)
        expected = got


@pytest.mark.parametrize("lora_first", [True, False])
def test_tokens_follow_a_projection_that_lora_replaces(denoiser: Any, lora_first: bool):
    def lora() -> None:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), denoiser)

    if lora_first:
        lora()
    add_softrepa(denoiser, config(denoiser))
    if not lora_first:
        lora()
    hidden, context = inputs()
    assert_close(denoiser(hidden, context, torch.tensor(500.0)), by_hand(denoiser, hidden, context))


def test_blocks_are_found_in_lists_of_lists_below_dots_and_up_to_a_limit(denoiser: Any):
    def paths(group: BlockGroup) -> list[str]:
        return [block.path for block in text_blocks(denoiser, replace(COUNTING, groups=(group,)))]

    assert paths(BlockGroup("stages", text="context")) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    assert paths(BlockGroup("stages.1", text="context")) == ["stages.1.0", "stages.1.1"]
    assert paths(BlockGroup("stages.0.1", text="context")) == ["stages.0.1"]
    assert (
        paths(BlockGroup("stages", text="context", limit=lambda denoiser: 3))
        == paths(BlockGroup("stages", "context"))[:3]
    )
    first = denoiser.stages[0][0]
    assert (
        paths(BlockGroup("stages", text="context", needs=lambda block: block is not first))
        == paths(BlockGroup("stages", "context"))[1:]
    )


def test_a_guard_refuses_before_anything_is_touched(denoiser: Any, monkeypatch: pytest.MonkeyPatch):
    def guard(model: nn.Module, arguments: Any) -> str | None:
        assert model is denoiser
        return "too long a text" if arguments["context"].shape[1] > 9 else None

    families._FAMILIES["CountingDenoiser"] = replace(COUNTING, guards=(guard,))
    add_softrepa(denoiser, config(denoiser))
    hidden, context = inputs()
    before = denoiser(hidden, context, t=torch.tensor(1.0))
    calls: list[int] = []
    denoiser.stages[0][0].register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="too long a text"):
        denoiser(hidden, torch.cat([context, context], dim=1), t=torch.tensor(1.0))
    assert not calls
    assert torch.equal(denoiser(hidden, context, t=torch.tensor(1.0)), before)


def test_a_guard_for_timed_tokens_lets_constant_ones_pass(denoiser: Any):
    families._FAMILIES["CountingDenoiser"] = replace(COUNTING, timed_guards=(lambda model, arguments: "no clock",))
    constant = SoftREPAConfig.for_denoiser(denoiser, num_timestep_bins=None)
    add_softrepa(denoiser, constant, "constant")
    denoiser(*inputs(), torch.tensor(1.0))
    add_softrepa(denoiser, config(denoiser), "timed")
    with pytest.raises(ValueError, match="no clock"):
        denoiser(*inputs(), torch.tensor(1.0))


@pytest.mark.parametrize(
    "clock",
    [
        TimestepArgument(),
        TimestepArgument(scale=1000.0),
        TimestepArgument(scale=1000.0, reverse=True),
        TimestepArgument(offset=1.0),
        TimestepArgument(scale=1e3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_level_comes_back_from_the_denoisers_clock(clock: TimestepArgument, dtype: torch.dtype):
    levels = torch.arange(0.0, 1001.0, 10.0)
    back = clock.level(clock.of_level(levels).to(dtype))
    assert_close(back, levels, rtol=2 * torch.finfo(dtype).eps, atol=1001 * 1.01 * torch.finfo(dtype).eps)
    assert (back >= levels - 1e-3).all(), "a level that was rounded down is lifted"


def test_the_noisiest_of_several_levels_counts():
    frames = torch.tensor([[0.0, 0.3, 0.1], [0.9, 0.0, 0.2]])
    assert_close(TimestepArgument(scale=1000.0).level(frames), torch.tensor([300.0, 900.0]))
    assert_close(TimestepArgument(scale=1000.0, reverse=True).level(frames), torch.tensor([1000.0, 1000.0]))
    assert_close(TimestepArgument(scale=1000.0).level(frames[:, None, :, None, None]), torch.tensor([300.0, 900.0]))
    assert_close(TimestepArgument(scale=1000.0, per_sample=False).level(frames), torch.tensor([900.0]))
    assert_close(TimestepArgument().level(torch.tensor(7)), torch.tensor([7.0]))


TOKENS = torch.full((1, K, WIDTH), 9.0)


def grown(group: BlockGroup, **arguments: Any) -> dict[str, Any]:
    changed = insert_tokens(group, arguments, TOKENS)
    assert changed is not None
    return changed


def test_the_row_may_be_named_by_an_argument_and_the_sequence_may_come_first():
    text = torch.arange(3.0)[None, :, None].expand(2, 3, WIDTH)
    group = BlockGroup("blocks", text="x", at="start", returns="self")
    rows = grown(group, x=text, start=2)["x"]
    assert rows[0, :, 0].tolist() == [0.0, 1.0, 9.0, 9.0, 2.0]
    assert torch.equal(cut_tokens(group, {"x": text, "start": 2}, rows, K), text)
    first = BlockGroup("blocks", text="x", seq_dim=0, returns="self")
    rows = grown(first, x=text.transpose(0, 1))["x"]
    assert rows[:, 1, 0].tolist() == [9.0, 9.0, 0.0, 1.0, 2.0]
    assert torch.equal(cut_tokens(first, {}, rows, K), text.transpose(0, 1))
    assert grown(first, x=text[0])["x"].shape == (5, WIDTH)  # no batch at all


def test_several_streams_share_each_token():
    group = BlockGroup("blocks", text=("video", "audio"), extended=(ExtendedArgument("mask", dim=1, fill=1.0),))
    video, audio = torch.zeros(2, 3, 6), torch.zeros(2, 5, 2)
    changed = insert_tokens(group, {"video": video, "audio": audio, "mask": torch.zeros(2, 3)}, TOKENS)
    assert changed is not None
    assert (changed["video"].shape, changed["audio"].shape, changed["mask"].shape) == ((2, 5, 6), (2, 7, 2), (2, 5))


def test_text_of_no_rows_gets_no_tokens():
    assert insert_tokens(BlockGroup("blocks", text="x"), {"x": torch.zeros(2, 0, WIDTH)}, TOKENS) is None
    assert insert_tokens(BlockGroup("blocks", text="x"), {"x": None}, TOKENS) is None
    assert insert_tokens(BlockGroup("blocks", text="x"), {}, TOKENS) is None


TEXT = torch.zeros(2, 3, WIDTH)


@pytest.mark.parametrize(
    ("extended", "before", "after"),
    [
        (ExtendedArgument("m", dim=1), [[5.0, 6.0, 7.0]], [[5.0, 5.0, 5.0, 6.0, 7.0]]),
        (ExtendedArgument("m", dim=1, fill=1.0), [[5.0, 6.0, 7.0]], [[1.0, 1.0, 5.0, 6.0, 7.0]]),
        (
            ExtendedArgument("m", dim=1, fill=1.0, where="text_last"),
            [[4.0, 5.0, 6.0, 7.0]],
            [[4.0, 1.0, 1.0, 5.0, 6.0, 7.0]],
        ),
        (ExtendedArgument("m", dim=1, where="text_last"), [[4.0, 5.0, 6.0, 7.0]], [[4.0, 5.0, 5.0, 5.0, 6.0, 7.0]]),
        (ExtendedArgument("m", dim=1, fill=0.0, where="end"), [[5.0, 6.0]], [[5.0, 6.0, 0.0, 0.0]]),
        (ExtendedArgument("m", dim=2, fill=0.0, full=True), [[[5.0]]], [[[0.0] * 3, [0.0] * 3, [0.0, 0.0, 5.0]]]),
        (ExtendedArgument("m", dim=1, per_token=True), [[5.0, 6.0, 7.0]], [[5.0, 6.0, 7.0]]),
        (ExtendedArgument("m", dim=1, per_token=True), [[[5.0], [6.0], [7.0]]], [[[5.0], [5.0], [5.0], [6.0], [7.0]]]),
        (ExtendedArgument("m", dim=1, per_token=True), [[[5.0]]], [[[5.0]]]),
    ],
)
def test_an_argument_is_extended_where_it_says(extended: ExtendedArgument, before: Any, after: Any):
    value = torch.tensor(before)
    kept = value.clone()
    assert grown(BlockGroup("blocks", text="x", extended=(extended,)), x=TEXT, m=value)["m"].tolist() == after
    assert torch.equal(value, kept)


def test_parts_grow_in_new_tuples_lists_and_dicts():
    row = torch.tensor([[5.0]])
    pair, settings = (row, (row, row)), {"mask": row, "other": row}
    extended = (
        ExtendedArgument("pair", dim=0, select=1, each=True),
        ExtendedArgument("settings", dim=0, select="mask", fill=0.0),
        ExtendedArgument("settings", dim=0, select="absent"),
        ExtendedArgument("several", dim=0, each=True),
        ExtendedArgument("nothing", dim=0),
    )
    changed = grown(
        BlockGroup("blocks", text="x", extended=extended), x=TEXT, pair=pair, settings=settings, several=[row, row]
    )
    assert [changed["pair"][0].shape[0], *(part.shape[0] for part in changed["pair"][1])] == [1, 1 + K, 1 + K]
    assert {name: value.shape[0] for name, value in changed["settings"].items()} == {"mask": 1 + K, "other": 1}
    assert [part.shape[0] for part in changed["several"]] == [1 + K, 1 + K]
    assert "nothing" not in changed
    assert pair == (row, (row, row)) and settings == {"mask": row, "other": row}


def test_the_identity_turns_nothing():
    turns = torch.polar(torch.ones(2, 3, 4), torch.rand(2, 3, 4))
    extended = ExtendedArgument("m", dim=1, fill="identity")
    assert (grown(BlockGroup("blocks", text="x", extended=(extended,)), x=TEXT, m=turns)["m"][:, :K] == 1).all()
    matrices = torch.rand(2, 3, 1, 4, 2, 2)
    rows = grown(BlockGroup("blocks", text="x", extended=(extended,)), x=TEXT, m=matrices)["m"]
    assert torch.equal(rows[:, :K], torch.eye(2).expand(2, K, 1, 4, 2, 2))
    assert torch.equal(rows[:, K:], matrices)


def test_the_last_resort_sees_what_has_grown_and_has_the_last_word():
    def adjust(arguments: Any, count: int) -> dict[str, Any]:
        return {"number": arguments["number"] + count, "seen": arguments["x"].shape[1]}

    changed = grown(BlockGroup("blocks", text="x", adjust=adjust), x=TEXT, number=3)
    assert (changed["number"], changed["seen"]) == (3 + K, 3 + K)
