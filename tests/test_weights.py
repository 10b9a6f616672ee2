"""Weights as people give them, on adapters, layers, stages and single calls."""

import logging
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from diffusers_softrepa import SoftREPAConfig, add_softrepa, load_softrepa, set_softrepa, softrepa_parameters

SD15, SDXL, SD3, FLUX = tiny.FAMILIES
every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)


def adapted(family: tiny.Family = SD3, *names: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    denoiser = family.denoiser().requires_grad_(False)
    for name in names or ("a",):
        add_softrepa(
            denoiser, SoftREPAConfig.for_denoiser(denoiser, init_std=1.0, num_timestep_bins=None, **fields), name
        )
    return denoiser


NUMBERS = [
    0.25,
    Fraction(1, 4),
    np.float32(0.25),
    np.float64(0.25),
    np.array(0.25),
    np.array([0.25], dtype=np.float16),
    torch.tensor(0.25),
    torch.tensor(0.25, dtype=torch.bfloat16, requires_grad=True),
    torch.tensor([0.25]),
    [0.25],
    (torch.tensor(0.25),),
    {"a": 0.25},
]


@pytest.mark.parametrize("weight", NUMBERS, ids=repr)
def test_a_weight_is_a_number_of_any_library(weight: Any):
    denoiser = adapted()
    set_softrepa(denoiser, "a", weight)
    assert denoiser.get_softrepa_adapters() == {"a": 0.25}
    assert type(denoiser.get_softrepa_adapters()["a"]) is float


@pytest.mark.parametrize("whole", [1, np.int64(1), np.array(1), torch.tensor(1)], ids=repr)
def test_whole_numbers_are_numbers(whole: Any):
    denoiser = adapted()
    set_softrepa(denoiser, {"a": whole})
    assert denoiser.get_softrepa_adapters() == {"a": 1.0}


def test_the_names_of_a_mapping_are_names():
    denoiser = adapted(SD3, "a", "b")
    set_softrepa(denoiser, denoiser.get_softrepa_adapters().keys(), [0.5, 0.25])
    assert denoiser.get_softrepa_adapters() == {"a": 0.5, "b": 0.25}


@pytest.mark.parametrize("weights", [np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), (0.5, 0.25), iter([0.5, 0.25])])
def test_arrays_hold_a_weight_for_each_name(weights: Any):
    denoiser = adapted(SD3, "a", "b", "c")
    set_softrepa(denoiser, np.array(["a", "c"]).tolist(), weights)
    assert denoiser.get_softrepa_adapters() == {"a": 0.5, "b": None, "c": 0.25}


@every_family
def test_what_the_adapters_are_found_to_be_can_be_set_again(family: tiny.Family):
    denoiser = adapted(family, "a", "b", "c", **({} if family in (SD15, SDXL) else {"num_layers": 3}))
    parts = {"down": 0.5} if family in (SD15, SDXL) else [0.5, -1.0, 2.0]
    for weights in ({"a": 0.3}, {}, {"c": 1, "a": 0}, {"b": parts, "c": 0.5}):
        set_softrepa(denoiser, weights)
        found = denoiser.get_softrepa_adapters()
        set_softrepa(denoiser, "a", 0.7)
        set_softrepa(denoiser, found)
        assert denoiser.get_softrepa_adapters() == found
        assert {name for name, weight in found.items() if weight is not None} == set(weights)


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ("a", float("nan"), ValueError, "must be a finite number, at most 1e.06 in size, but is nan"),
    ("a", float("inf"), ValueError, "must be a finite number"),
    ("a", torch.tensor(float("-inf")), ValueError, "must be a finite number"),
    ("a", np.array(np.nan), ValueError, "must be a finite number"),
    ("a", torch.tensor(0.5, device="meta"), ValueError, "must be a finite number"),
    ("a", "0.5", ValueError, "must be a finite number"),
    ("a", b"1", ValueError, "must be a finite number"),
    ("a", 1 + 2j, ValueError, "must be a finite number"),
    ("a", 10**400, ValueError, "must be a finite number, at most 1e.06 in size, but is a whole number of 1329 bits"),
    ("a", 1e308, ValueError, "at most 1e.06 in size, but is 1e.308"),
    ("a", [-2e6, 0, 0], ValueError, "at most 1e.06 in size"),
    ("a", Decimal("0.5"), ValueError, "must be a finite number"),
    ("a", np.array("0.5"), ValueError, "must be a finite number"),
    ("a", np.array([(1.0,)], dtype=[("x", "f4")]), ValueError, "a list of 3"),
    ("a", torch.tensor([0.1, 0.2, 0.3]).to_sparse(), ValueError, "must be a finite number"),
    ("a", torch.zeros(3, device="meta"), ValueError, "must be a finite number"),
    ("a", torch.tensor([True, False, True]), ValueError, "must be a finite number"),
    ("a", torch.tensor(1 + 0j), ValueError, "must be a finite number"),
    ("a", memoryview(b"abc"), ValueError, "must be a finite number"),
    ("a", bytearray(b"abc"), ValueError, "must be a finite number"),
    ("a", {True: 0.5}, ValueError, r"there are weights for \[True\]"),
    ("a", {-1: 0.5}, ValueError, r"there are weights for \[-1\]"),
    ({"a": {0: None}}, None, ValueError, "in size, but is None"),
    pytest.param("a", Unspeakable(), ValueError, "must be a finite number, .* but is ", id="no repr"),
    pytest.param(Unspeakable(), None, TypeError, "adapter_names must be", id="no repr of names"),
    (["a", "a"], [0.5, 0.5], ValueError, "each adapter needs one weight"),
    ({"a", "b"}, 0.5, TypeError, "adapter_names must be"),
    ("", 0.5, ValueError, "no soft-token adapter is named"),
    ("a", True, ValueError, "must be a finite number"),
    ("a", np.bool_(True), ValueError, "must be a finite number"),
    pytest.param("a", object(), ValueError, "must be a finite number", id="an object"),
    ("a", {0.5}, ValueError, "must be a finite number"),
    ("a", [None], ValueError, "must be a finite number"),
    ("a", [0.5, 0.5], ValueError, r"'a' has layers \[0, 1, 2\], so its weight is one number, or a list of 3"),
    ("a", [0.5, 0.5, "x"], ValueError, "in size, but is 'x'"),
    ("a", np.ones((3, 1)), ValueError, "must be a finite number"),
    ("a", [], ValueError, "a list of 3"),
    ("a", {"down": 0.5}, ValueError, r"some of its layers \[0, 1, 2\], but there are weights for \['down'\]"),
    ("a", {0: float("nan")}, ValueError, "must be a finite number"),
    (["a", "b"], [0.5], ValueError, "each adapter needs one weight"),
    (["a", "b"], torch.tensor([0.5, 0.5, 0.5]), ValueError, "each adapter needs one weight"),
    ({"a": 0.5}, 0.5, TypeError, "holds the weights already"),
    ({"a": 0.5, "x": None}, None, ValueError, r"no soft-token adapter is named \['x'\]"),
    ({1: 0.5}, None, TypeError, "names of adapters must be strings, but there is 1"),
    (0.5, None, TypeError, "adapter_names must be an adapter's name, several, or"),
    (None, None, TypeError, "adapter_names must be an adapter's name"),
    (["a", 3], None, TypeError, "must be strings, but there is 3"),
]


@pytest.mark.parametrize(("names", "weights", "kind", "message"), BAD, ids=range(len(BAD)))
def test_anything_else_is_refused_before_anything_changes(
    names: Any, weights: Any, kind: type[Exception], message: str
):
    denoiser = adapted(SD3, "a", "b", num_layers=3)
    set_softrepa(denoiser, ["b", "a"], [0.5, 0.75])
    expected = SD3.call(denoiser, inputs := SD3.inputs(1), 500.0)
    with pytest.raises(kind, match=message):
        set_softrepa(denoiser, names, weights)
    assert denoiser.get_softrepa_adapters() == {"a": 0.75, "b": 0.5}
    assert torch.equal(SD3.call(denoiser, inputs, 500.0), expected)


@pytest.mark.parametrize("family", [SD3, FLUX], ids=lambda family: family.name)
@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], {1: 0.0, 2: 0}, np.array([1, 0, 0])], ids=repr)
def test_layers_of_weight_zero_are_layers_that_an_adapter_has_not(family: tiny.Family, weights: Any):
    denoiser, inputs = adapted(family, num_layers=3), family.inputs(2)
    set_softrepa(denoiser, "a", weights)
    found = family.call(denoiser, inputs, 500.0)
    first = {"tokens": softrepa_parameters(denoiser, "a")["tokens"][:1].detach().clone()}
    config = SoftREPAConfig.for_denoiser(denoiser, num_layers=1, num_timestep_bins=None)
    load_softrepa(denoiser, first, "first", config=config)
    assert torch.equal(found, family.call(denoiser, inputs, 500.0))
    set_softrepa(denoiser, "a", [0.5, 0.5, 0.5])
    same = family.call(denoiser, inputs, 500.0)
    set_softrepa(denoiser, "a", 0.5)
    assert torch.equal(same, family.call(denoiser, inputs, 500.0))


@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda family: family.name)
def test_stages_of_weight_zero_are_stages_that_an_adapter_has_not(family: tiny.Family):
    denoiser, inputs = adapted(family, stages=["down", "mid", "up"]), family.inputs(2)
    set_softrepa(denoiser, "a", {"mid": 0.0})
    found = family.call(denoiser, inputs, 500.0)
    tensors = {"tokens": softrepa_parameters(denoiser, "a")["tokens"].detach().clone()}
    config = SoftREPAConfig.for_denoiser(denoiser, stages=["down", "up"], num_timestep_bins=None)
    load_softrepa(denoiser, tensors, "others", config=config)
    assert torch.equal(found, family.call(denoiser, inputs, 500.0))
    with pytest.raises(ValueError, match=r"'a' has stages \['down', 'mid', 'up'\], so its weight is one number"):
        set_softrepa(denoiser, "a", [1.0, 0.0, 1.0])


@every_family
def test_a_strength_at_call_time_is_a_factor_of_all_weights(family: tiny.Family, caplog: pytest.LogCaptureFixture):
    pipe = family.pipeline()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    for name in "ab":
        pipe.add_softrepa(SoftREPAConfig.for_denoiser(denoiser, init_std=1.0), name)
    argument = "cross_attention_kwargs" if family in (SD15, SDXL) else "joint_attention_kwargs"

    def draw(strength: Any = None, **more: Any) -> Tensor:
        given = {**more} if strength is None else {"softrepa_scale": strength, **more}
        before = dict(given)
        picture = tiny.generate(pipe, **({argument: given} if given else {}))
        assert given == before, "the caller's own is left alone"
        return picture

    with caplog.at_level(logging.WARNING, logger="diffusers"):
        for weights in ({"a": 1.0}, {"a": 0.5, "b": 1.0}):
            for strength in (0.0, 0.5, np.float32(1.0), torch.tensor(0.25)):
                pipe.set_softrepa(weights)
                found = draw(strength)
                pipe.set_softrepa({name: float(strength) * weight for name, weight in weights.items()})
                assert torch.equal(found, draw()), (weights, strength)
        pipe.set_softrepa("a")
        assert torch.equal(draw(0.5, scale=1.0), draw(0.5))
    assert not [record for record in caplog.records if "softrepa" in record.getMessage()]
    for wrong in (math.nan, "0.5", None, [0.5, 0.5]):
        with pytest.raises(ValueError, match=f"softrepa_scale in {argument} must be a finite number"):
            tiny.generate(pipe, **{argument: {"softrepa_scale": wrong}})
