"""LoRA and soft tokens on one denoiser: every call of either leaves the other alone, in every order."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
from diffusers_softrepa import SoftREPAConfig, softrepa_parameters

# PEFT says so of every second LoRA that diffusers loads.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")

every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)


@dataclass
class Bench:
    """A pipeline, its denoiser, one fixed denoiser call, and the LoRAs and soft tokens that go on it.

    Benches of one family are equal: made from the same random state.
    """

    family: tiny.Family
    pipe: DiffusionPipeline
    denoiser: nn.Module
    component: str
    inputs: dict[str, Any]
    config: SoftREPAConfig
    tokens: dict[str, Tensor]
    loras: dict[str, dict[str, Tensor]]

    def load_tokens(self, **kwargs: Any) -> str:
        return self.pipe.load_softrepa(self.tokens, config=self.config, **kwargs)

    def load_lora(self, name: str, adapter_name: str | None = None, **kwargs: Any) -> None:
        lora = {key: tensor.clone() for key, tensor in self.loras[name].items()}  # PEFT keeps the tensors themselves
        self.pipe.load_lora_weights(lora, adapter_name=adapter_name or name, **kwargs)

    @torch.no_grad()
    def output(self) -> Tensor:
        return self.family.call(self.denoiser, self.inputs, 500)


def bench(family: tiny.Family) -> Bench:
    torch.manual_seed(0)
    pipe = family.pipeline()
    component = "unet" if "unet" in pipe.components else "transformer"
    denoiser = pipe.components[component]
    config = SoftREPAConfig.for_denoiser(denoiser)
    tokens = {name: torch.randn(shape) for name, shape in config.shapes.items()}
    loras = {name: lora_for(denoiser, component) for name in ("a", "b", "c")}
    return Bench(family, pipe, denoiser, component, family.inputs(2), config, tokens, loras)


def lora_for(denoiser: nn.Module, component: str, rank: int = 2) -> dict[str, Tensor]:
    """A random LoRA on the attention, as a file of one holds it."""
    lora = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "add_k_proj")):
            lora[f"{component}.{name}.lora_A.weight"] = torch.randn(rank, module.in_features) * 0.3
            lora[f"{component}.{name}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.3
    assert lora
    return lora


# Every native call that changes something, one after the other.
LORA_CALLS: dict[str, Callable[[Bench], Any]] = {
    "load a": lambda b: b.load_lora("a"),
    "load b": lambda b: b.load_lora("b"),
    "set_adapters both": lambda b: b.pipe.set_adapters(["a", "b"], [0.7, 0.3]),
    "set_adapters one": lambda b: b.pipe.set_adapters("a"),
    "disable_lora": lambda b: b.pipe.disable_lora(),
    "enable_lora": lambda b: b.pipe.enable_lora(),
    "fuse_lora": lambda b: b.pipe.fuse_lora(components=[b.component], adapter_names=["a"], lora_scale=0.5),
    "unfuse_lora": lambda b: b.pipe.unfuse_lora(components=[b.component]),
    "hotswap": lambda b: b.load_lora("c", "a", hotswap=True),
    "delete_adapters": lambda b: b.pipe.delete_adapters("b"),
    "unload_lora_weights": lambda b: b.pipe.unload_lora_weights(),
    "load again": lambda b: b.load_lora("c"),
}


def outputs_along_the_way(family: tiny.Family, attached: range) -> list[Tensor]:
    """Returns the outputs before and after each LoRA call, tokens being loaded after those calls in `attached`."""
    b = bench(family)
    outputs = []
    for index, call in enumerate([lambda _: None, *LORA_CALLS.values()]):
        call(b)
        if index == attached.start:
            b.load_tokens()
        if index == attached.stop:
            b.pipe.unload_softrepa()
        outputs.append(b.output())
    return outputs


@every_family
def test_tokens_come_and_go_between_any_two_lora_calls(family: tiny.Family):
    end = len(LORA_CALLS) + 1
    without, with_tokens = outputs_along_the_way(family, range(end, end)), outputs_along_the_way(family, range(end))
    for before, after in zip(without, with_tokens, strict=True):
        assert (before - after).abs().max() > 1e-3
    changes = [not torch.equal(x, y) for x, y in itertools.pairwise(with_tokens)]
    # Each call must show, or the rest would hold for nothing; what is deleted was not active.
    assert [call for call, changed in zip(LORA_CALLS, changes, strict=True) if not changed] == ["delete_adapters"]
    for attached in (range(1, 3), range(3, 8), range(6, 10), range(5, end)):
        outputs = outputs_along_the_way(family, attached)
        for step, output in enumerate(outputs):
            assert torch.equal(output, (with_tokens if step in attached else without)[step]), (attached, step)
    b = bench(family)
    for step, call in enumerate([lambda _: None, *LORA_CALLS.values()]):
        call(b)
        b.load_tokens()
        assert torch.equal(b.output(), with_tokens[step]), step
        b.pipe.unload_softrepa()
        assert torch.equal(b.output(), without[step]), step


@every_family
def test_lora_and_tokens_add_up_whichever_came_first(family: tiny.Family):
    first, second = bench(family), bench(family)
    first.load_lora("a")
    lora_alone = first.output()
    first.load_tokens()
    second.load_tokens()
    tokens_alone = second.output()
    second.load_lora("a")
    assert torch.equal(first.output(), second.output())
    first.pipe.unload_softrepa()
    assert torch.equal(first.output(), lora_alone)
    second.pipe.unload_lora_weights()
    assert torch.equal(second.output(), tokens_alone)


@every_family
def test_a_fused_lora_with_tokens_equals_one_that_is_not_fused(family: tiny.Family):
    b = bench(family)
    b.load_tokens()
    b.load_lora("a")
    before = b.output()
    b.pipe.fuse_lora(components=[b.component])
    assert_close(b.output(), before)
    b.pipe.unload_lora_weights()  # the documented recipe: fuse, then drop the LoRA itself
    assert_close(b.output(), before)
    assert b.pipe.get_softrepa_adapters() == {"softrepa": 1.0}


@every_family
@pytest.mark.parametrize("trainable", [False, True], ids=["loaded", "in training"])
def test_no_lora_call_changes_a_soft_token_adapter(family: tiny.Family, trainable: bool):
    b = bench(family)
    b.load_tokens(adapter_name="other")
    b.load_tokens(adapter_name="mine", is_trainable=trainable)
    b.pipe.set_softrepa(["mine", "other"], [1.0, 0.5])
    parameters = softrepa_parameters(b.denoiser, "mine")
    for name, call in LORA_CALLS.items():
        call(b)
        assert b.pipe.get_softrepa_adapters() == {"other": 0.5, "mine": 1.0}, name
        assert softrepa_parameters(b.denoiser, "mine") == parameters, name
        for key, parameter in parameters.items():
            assert parameter.requires_grad is trainable, name
            assert torch.equal(parameter, b.tokens[key]), name


def lora_state(b: Bench) -> dict[str, Any]:
    """All that is to be known of the LoRAs and of the base weights."""
    layers = {name: m for name, m in b.denoiser.named_modules() if isinstance(m, BaseTunerLayer)}
    return {
        "listed": b.pipe.get_list_adapters(),
        "active": b.pipe.get_active_adapters(),
        "configs": dict(b.denoiser.peft_config),
        "layers": {name: (list(m.active_adapters), m.disable_adapters, m.merged) for name, m in layers.items()},
        "scaling": {name: dict(m.scaling) for name, m in layers.items()},
        "requires_grad": {name: p.requires_grad for name, p in b.denoiser.named_parameters()},
        "values": {name: (p.data_ptr(), p._version) for name, p in b.denoiser.state_dict().items()},
        "training": {name: m.training for name, m in b.denoiser.named_modules()},
    }


@every_family
@pytest.mark.parametrize("state", ["active", "disabled", "fused", "in training"])
def test_no_verb_changes_a_lora(family: tiny.Family, state: str, tmp_path: Path):
    b = bench(family)
    b.load_lora("a")
    b.load_lora("b")
    b.pipe.set_adapters(["b"], [0.5])
    if state == "disabled":
        b.pipe.disable_lora()
    elif state == "fused":
        b.pipe.fuse_lora(components=[b.component])
    elif state == "in training":
        b.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "new")
    before, verbs = lora_state(b), b.pipe
    for verb in (
        b.load_tokens,
        lambda: verbs.add_softrepa(adapter_name="more"),
        lambda: verbs.set_softrepa(["softrepa", "more"], [0.5, 1.0]),
        b.output,
        verbs.disable_softrepa,
        verbs.enable_softrepa,
        lambda: verbs.save_softrepa(tmp_path, "more"),
        lambda: b.load_tokens(adapter_name="softrepa", hotswap=True),
        lambda: verbs.delete_softrepa("more"),
        verbs.unload_softrepa,
    ):
        verb()
        assert lora_state(b) == before


@every_family
def test_a_saved_lora_holds_no_soft_tokens(family: tiny.Family, tmp_path: Path):
    b = bench(family)
    b.load_tokens(is_trainable=True)
    b.load_lora("a", "native")  # PEFT 0.17 takes ".a" out of module names too
    state_dict = get_peft_model_state_dict(b.denoiser, adapter_name="native")
    assert len(state_dict) == len(b.loras["a"])
    layers = convert_state_dict_to_diffusers(state_dict) if b.component == "unet" else state_dict
    b.pipe.save_lora_weights(tmp_path / "pipeline", **{f"{b.component}_lora_layers": layers})
    b.denoiser.save_lora_adapter(tmp_path / "denoiser", adapter_name="native")
    for file in tmp_path.glob("*/*.safetensors"):
        saved = load_file(file)
        assert {tuple(tensor.shape) for tensor in saved.values()} == {tuple(t.shape) for t in b.loras["a"].values()}
        assert len(saved) == len(b.loras["a"])
        assert all("lora" in key for key in saved)
    other = bench(family)
    other.load_tokens()
    other.pipe.load_lora_weights(tmp_path / "pipeline", adapter_name="native")
    assert torch.equal(other.output(), b.output())


@every_family
def test_a_lora_trains_over_tokens_as_it_does_under_them(family: tiny.Family):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    gradients = []
    for tokens_first in (True, False):
        b = bench(family)
        b.denoiser.requires_grad_(False)
        if tokens_first:
            b.load_tokens()
        torch.manual_seed(1)
        b.denoiser.add_adapter(lora)
        if not tokens_first:
            b.load_tokens()
        b.family.call(b.denoiser, b.inputs, 500).square().mean().backward()
        trained = {name: p.grad for name, p in b.denoiser.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        assert all(gradient is not None for gradient in trained.values())
        assert all(p.grad is None for p in softrepa_parameters(b.denoiser).values())
        gradients.append(trained)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@every_family
def test_tokens_train_over_a_frozen_lora(family: tiny.Family):
    b = bench(family)
    b.denoiser.requires_grad_(False)
    b.load_lora("a")
    b.denoiser.requires_grad_(False)  # diffusers loads LoRAs trainable
    b.load_tokens(is_trainable=True)
    b.family.call(b.denoiser, b.inputs, 500).square().mean().backward()
    assert all(p.grad is not None for p in softrepa_parameters(b.denoiser).values())
    assert all(p.grad is None for p in b.denoiser.parameters())


@every_family
def test_hotswap_of_loras_with_other_ranks_can_be_prepared_with_tokens_on(family: tiny.Family):
    outputs = []
    for tokens_first in (True, False):
        b = bench(family)
        if tokens_first:
            b.load_tokens()
        b.loras["wide"] = lora_for(b.denoiser, b.component, rank=4)
        b.pipe.enable_lora_hotswap(target_rank=4)
        b.load_lora("a")
        b.load_lora("wide", "a", hotswap=True)
        if not tokens_first:
            b.load_tokens()
        outputs.append(b.output())
    assert torch.equal(*outputs)


@every_family
def test_the_strength_of_a_lora_at_call_time_is_not_the_strength_of_the_tokens(family: tiny.Family):
    b = bench(family)
    b.load_tokens()
    expected = tiny.generate(b.pipe)
    b.load_lora("a")
    keyword = "cross_attention_kwargs" if b.component == "unet" else "joint_attention_kwargs"
    assert_close(tiny.generate(b.pipe, **{keyword: {"scale": 0.0}}), expected)
    assert not torch.allclose(tiny.generate(b.pipe), expected, atol=1e-3)


@every_family
def test_a_peft_model_around_the_denoiser_keeps_the_tokens(family: tiny.Family):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    outputs = []
    for tokens_first in (True, False):
        b = bench(family)
        if tokens_first:
            b.load_tokens()
        torch.manual_seed(1)
        wrapped = get_peft_model(b.denoiser, lora)
        if not tokens_first:
            b.load_tokens()
        with torch.no_grad():
            outputs.append(b.family.call(wrapped, b.inputs, 500))
        merged = wrapped.merge_and_unload()
        assert merged is b.denoiser
        assert_close(b.output(), outputs[-1])
    assert torch.equal(*outputs)


def test_weights_by_block_reach_the_lora_and_leave_the_tokens():
    outputs = []
    for tokens_first in (True, False):
        b = bench(tiny.FAMILIES[0])
        if tokens_first:
            b.load_tokens()
        b.load_lora("a")
        b.pipe.set_adapters("a", {"unet": {"down": 0.2, "mid": 0.0, "up": {"block_0": [0.5, 1.0]}}})
        if not tokens_first:
            b.load_tokens()
        outputs.append(b.output())
    assert torch.equal(*outputs)
