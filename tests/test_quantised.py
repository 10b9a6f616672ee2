"""Denoisers with quantised weights: sampling with tokens, and training where gradients pass.

The packages are not among the test requirements; each test says which one it misses.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from diffusers_softrepa import SoftREPAConfig, add_softrepa, set_softrepa, softrepa_parameters, unload_softrepa
from diffusers_softrepa.denoisers import check_passes_gradients

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages themselves
families = pytest.mark.parametrize("family", tiny.FAMILIES[1:], ids=lambda family: family.name)


def torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(denoiser: nn.Module) -> None:
        package = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        package.quantize_(denoiser, getattr(package, config)())

    return quantise


def quanto(denoiser: nn.Module) -> None:
    package = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    package.quantize(denoiser, weights=package.qint8)
    package.freeze(denoiser)


def _replace_linears(denoiser: nn.Module, make: Callable[[nn.Linear], nn.Linear]) -> None:
    for module in list(denoiser.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer.in_features % 32 == 0:
                made = make(layer)
                made.bias = layer.bias
                setattr(module, name, made.to("cpu"))


def bitsandbytes(kind: str) -> Callable[[nn.Module], None]:
    def quantise(denoiser: nn.Module) -> None:
        package = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn

        def make(layer: nn.Linear) -> Any:
            shape = (layer.in_features, layer.out_features, layer.bias is not None)
            if kind == "nf4":
                made = package.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
                made.weight = package.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            else:
                made = package.Linear8bitLt(*shape, has_fp16_weights=False)
                made.weight = package.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            return made

        _replace_linears(denoiser, make)

    return quantise


def gguf(denoiser: nn.Module) -> None:
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = package.GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> Any:
        made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        numbers = torch.from_numpy(package.quantize(layer.weight.detach().numpy(), kind))
        made.weight = GGUFParameter(numbers, quant_type=kind)
        return made

    _replace_linears(denoiser, make)


# How far the effect of tokens may turn from that on the unquantised model: cosine.
WEIGHT_ONLY: dict[str, tuple[Callable[[nn.Module], None], float]] = {
    "torchao int8 weight-only": (torchao("Int8WeightOnlyConfig"), 0.99),
    "torchao float8 weight-only": (torchao("Float8WeightOnlyConfig"), 0.97),
    "bitsandbytes int8": (bitsandbytes("int8"), 0.99),
    "bitsandbytes nf4": (bitsandbytes("nf4"), 0.85),
    "gguf Q8_0": (gguf, 0.99),
}
SAMPLES_ONLY = {
    "quanto int8": (quanto, 0.99),
    "torchao int8 dynamic": (torchao("Int8DynamicActivationInt8WeightConfig"), 0.8),
}


def pair(family: tiny.Family, quantise: Callable[[nn.Module], None]) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Returns a denoiser and its quantised copy, without adapters, and inputs."""
    torch.manual_seed(0)
    plain = family.denoiser().requires_grad_(False)
    quantised = copy.deepcopy(plain)
    quantise(quantised)
    return plain, quantised, family.inputs(2)


def give_tokens(denoiser: nn.Module) -> None:
    config = SoftREPAConfig.for_denoiser(denoiser, init_std=1.0)
    add_softrepa(denoiser, config, generator=torch.Generator().manual_seed(1))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


@families
@pytest.mark.parametrize("kind", WEIGHT_ONLY | SAMPLES_ONLY)
@torch.no_grad()
def test_tokens_do_to_a_quantised_denoiser_what_they_do_to_it_unquantised(family: tiny.Family, kind: str):
    quantise, least = (WEIGHT_ONLY | SAMPLES_ONLY)[kind]
    plain, quantised, inputs = pair(family, quantise)
    effects = []
    for denoiser in (plain, quantised):
        base = family.call(denoiser, inputs, 500.0)
        give_tokens(denoiser)
        effects.append(family.call(denoiser, inputs, 500.0) - base)
        assert softrepa_parameters(denoiser)["tokens"].dtype == torch.float32
    assert cosine(*effects) > least
    set_softrepa(quantised, "softrepa", 0.0)
    assert torch.equal(family.call(quantised, inputs, 500.0), base)
    set_softrepa(quantised, "softrepa", 0.5)
    assert not torch.equal(family.call(quantised, inputs, 500.0), base)
    unload_softrepa(quantised)
    assert torch.equal(family.call(quantised, inputs, 500.0), base)


@families
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_gradients_pass_weights_that_are_quantised_alone(family: tiny.Family, kind: str):
    quantise, least = WEIGHT_ONLY[kind]
    plain, quantised, inputs = pair(family, quantise)
    check_passes_gradients(quantised)
    gradients = []
    for denoiser in (plain, quantised):
        give_tokens(denoiser)
        family.call(denoiser, inputs, 500.0).square().mean().backward()
        gradients.append(softrepa_parameters(denoiser)["tokens"].grad)
    assert cosine(*gradients) > least


@families
def test_training_on_quantised_activations_is_refused(family: tiny.Family):
    _, quantised, _ = pair(family, SAMPLES_ONLY["torchao int8 dynamic"][0])
    with pytest.raises(ValueError, match=r"passes none; quantise the weights alone"):
        check_passes_gradients(quantised)


class _Rounded(nn.Parameter):
    """A weight of a kind of its own."""


class _Stops(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).detach()


@pytest.mark.parametrize("stops", [True, False])
def test_a_layer_that_stops_gradients_is_named(stops: bool):
    denoiser = tiny.sd3_transformer()
    check_passes_gradients(denoiser)
    layer = (_Stops if stops else nn.Linear)(48, 48)
    layer.weight = _Rounded(layer.weight.data, requires_grad=False)
    denoiser.transformer_blocks[1].attn.to_q = layer
    if not stops:
        return check_passes_gradients(denoiser)
    with pytest.raises(ValueError, match=r"but transformer_blocks.1.attn.to_q of SD3Transformer2DModel, whose weight"):
        check_passes_gradients(denoiser)
