"""The verbs, as methods of pipelines and denoisers and as functions."""

import inspect
import os
import pydoc
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin

import diffusers_softrepa
import tiny
from diffusers_softrepa import SoftREPAConfig, SoftREPAMethods, softrepa_parameters
from diffusers_softrepa.compat import ModularPipeline

VERBS = [name for name in diffusers_softrepa.__all__ if "softrepa" in name]


def tensors_for(config: SoftREPAConfig) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in config.shapes.items()}


@pytest.mark.parametrize("cls", list(filter(None, [DiffusionPipeline, ModularPipeline, ModelMixin])))
def test_every_verb_is_a_method_of_pipelines_and_models(cls: type):
    for verb in VERBS:
        assert getattr(cls, verb) is getattr(SoftREPAMethods, verb)
    assert issubclass(cls, SoftREPAMethods)


@pytest.mark.parametrize("verb", VERBS)
def test_a_method_is_the_function_with_self_in_place_of_the_target(verb: str):
    function, method = getattr(diffusers_softrepa, verb), getattr(tiny.sd3_pipeline(), verb)
    target, *rest = inspect.signature(function).parameters.values()
    assert target.name == "target"
    assert list(inspect.signature(method).parameters.values()) == rest
    first, *others = inspect.signature(getattr(SoftREPAMethods, verb)).parameters.values()
    assert (first.name, others) == ("self", rest)
    assert inspect.signature(method).return_annotation == inspect.signature(function).return_annotation


@pytest.mark.parametrize("verb", VERBS)
def test_the_docstring_of_a_method_explains_its_own_arguments_and_no_target(verb: str):
    of_function, of_method = inspect.getdoc(getattr(diffusers_softrepa, verb)), getattr(SoftREPAMethods, verb).__doc__
    without = of_function.replace("    target: A pipeline or a denoiser.\n", "").replace(
        "    target: A pipeline or a denoiser.", ""
    )
    assert of_method in (without, without.replace("Args:\n\n", ""), without.replace("\n\nArgs:\n", ""))
    assert "target" not in of_method and "\n\n\n" not in of_method
    explained = re.findall(r"^    (\w+): ", of_method.partition("Args:\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert explained == list(inspect.signature(getattr(tiny.sd3_pipeline(), verb)).parameters)


def test_help_of_a_method_shows_its_arguments():
    text = re.sub(r"\s+", " ", pydoc.plain(pydoc.render_doc(tiny.sd3_pipeline().load_softrepa)))
    assert "load_softrepa(source: str" in text and "adapter_name: str | None = None, *, config: " in text
    assert "adapter_name: Name of the adapter in this pipeline." in text and "target" not in text


TYPED = """\
from typing import Any

from diffusers_softrepa import SoftREPAMethods, load_softrepa

class Pipeline:
    def __call__(self, prompt: str) -> list[str]:
        return [prompt]

def use(pipe: Pipeline, unknown: Any) -> None:
    reveal_type(load_softrepa(pipe, "folder"))
    load_softrepa(pipe, "folder", nonsense=1)
    pipe.load_softrepa("folder")
    assert isinstance(pipe, SoftREPAMethods) and isinstance(unknown, SoftREPAMethods)
    reveal_type(pipe.load_softrepa("folder", "mine", hotswap=True))
    pipe.load_softrepa("folder", nonsense=1)
    unknown.load_softrepa("folder", hotswap="yes")
    reveal_type(pipe("a cat"))
    reveal_type(unknown.enable_model_cpu_offload())
    with pipe.softrepa_disabled():
        pipe.set_softrepa("mine", 0.5)
"""


def test_a_type_checker_knows_the_functions_and_after_an_isinstance_check_the_methods(tmp_path: Path):
    pytest.importorskip("mypy", reason="mypy is an extra of development")
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = true\n"
        "[mypy-torch.*,diffusers.*,transformers.*,huggingface_hub.*,peft.*,numpy.*,PIL.*,safetensors.*]\n"
        "follow_imports = skip\n"  # their types take minutes and change nothing here
    )
    source = str(Path(diffusers_softrepa.__file__).parents[1])
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            "mypy.ini",
            "--cache-dir",
            str(tmp_path / "cache"),
            "typed.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^typed.py:(\d+): (?:note: Revealed type is|error:) (.*)$", ran.stdout, re.MULTILINE)
    expected = [
        (10, '"str"'),
        (11, 'Unexpected keyword argument "nonsense"'),
        (12, '"Pipeline" has no attribute "load_softrepa"'),
        (14, '"str"'),
        (15, 'Unexpected keyword argument "nonsense"'),
        (16, 'Argument "hotswap" has incompatible type "str"; expected "bool"'),
        (17, '"list[str]"'),
        (18, '"Any"'),
    ]
    assert [int(line) for line, _ in found] == [line for line, _ in expected], ran.stdout + ran.stderr
    for (_, told), (_, sentence) in zip(found, expected, strict=True):
        assert told.startswith(sentence)


def test_the_second_positional_argument_of_load_is_the_adapter_name_as_with_lora():
    pipe = tiny.sd3_pipeline()
    config = SoftREPAConfig.for_denoiser(pipe.transformer)
    assert pipe.load_softrepa(tensors_for(config), "mine", config=config) == "mine"
    assert pipe.get_softrepa_adapters() == {"mine": 1.0}


def test_a_config_given_by_position_is_told_to_come_by_keyword():
    pipe = tiny.sd3_pipeline()
    config = SoftREPAConfig.for_denoiser(pipe.transformer)
    for load in (pipe.load_softrepa, partial(diffusers_softrepa.load_softrepa, pipe)):
        with pytest.raises(TypeError, match="give the config by keyword: config="):
            load(tensors_for(config), config)
        with pytest.raises(TypeError, match="config must be a SoftREPAConfig, but is 'mine'"):
            load(tensors_for(config), config="mine")


def test_an_unknown_keyword_is_a_type_error():
    pipe = tiny.sd3_pipeline()
    with pytest.raises(TypeError, match="weights_file"):
        pipe.load_softrepa("user/repo", weights_file="x.safetensors")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"use_safetensors": False}, "safetensors files only"), ({"proxies": {"https": "x"}}, "HTTPS_PROXY")],
)
def test_an_outdated_keyword_says_what_to_do(keywords: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny.sd3_pipeline().load_softrepa("user/repo", **keywords)


def test_names_are_found_and_the_last_one_loaded_is_active():
    pipe = tiny.sd3_pipeline()
    assert [pipe.add_softrepa() for _ in range(3)] == ["softrepa", "softrepa_1", "softrepa_2"]
    assert pipe.get_softrepa_adapters() == {"softrepa": None, "softrepa_1": None, "softrepa_2": 1.0}
    pipe.delete_softrepa("softrepa_1")
    assert pipe.add_softrepa() == "softrepa_1"


def test_set_activates_exactly_the_named_adapters():
    pipe = tiny.sd3_pipeline()
    for name in "abc":
        pipe.add_softrepa(adapter_name=name)
    pipe.set_softrepa(["a", "c"], [0.25, 1])
    assert pipe.get_softrepa_adapters() == {"a": 0.25, "b": None, "c": 1.0}
    pipe.set_softrepa("b", 0.5)
    assert pipe.get_softrepa_adapters() == {"a": None, "b": 0.5, "c": None}
    pipe.set_softrepa([])
    assert set(pipe.get_softrepa_adapters().values()) == {None}


def test_disable_hides_and_enable_brings_back_the_weights():
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa()
    pipe.set_softrepa("softrepa", 0.5)
    pipe.disable_softrepa()
    assert pipe.get_softrepa_adapters() == {"softrepa": None}
    pipe.enable_softrepa()
    assert pipe.get_softrepa_adapters() == {"softrepa": 0.5}


def test_deleting_the_active_adapter_activates_no_other():
    pipe = tiny.sd3_pipeline()
    base = tiny.generate(pipe)
    pipe.add_softrepa(adapter_name="a")
    pipe.add_softrepa(adapter_name="b")
    pipe.delete_softrepa("b")
    assert pipe.get_softrepa_adapters() == {"a": None}
    assert torch.equal(tiny.generate(pipe), base)


def test_unload_and_get_are_fine_without_adapters():
    pipe = tiny.sd3_pipeline()
    pipe.unload_softrepa()
    assert pipe.get_softrepa_adapters() == {}


@pytest.mark.parametrize(
    "verb", ["enable_softrepa", "disable_softrepa", "save_softrepa", "set_softrepa", "delete_softrepa"]
)
def test_other_verbs_without_adapters_say_what_to_do_first(verb: str, tmp_path: Any):
    arguments = {"save_softrepa": [tmp_path], "set_softrepa": ["x"], "delete_softrepa": ["x"]}.get(verb, [])
    with pytest.raises(ValueError, match="has no soft-token adapter; load_softrepa or add_softrepa one first"):
        getattr(tiny.sd3_pipeline(), verb)(*arguments)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["a", "x"], 1.0, "no soft-token adapter is named ['x']; loaded are ['a', 'b']"),
        (["a", "b"], [1.0], "each adapter needs one weight"),
        (["a", "a"], 1.0, "each adapter needs one weight"),
        (["a"], [float("nan")], "a weight must be a finite number"),
        (["a"], ["1"], "a weight must be a finite number"),
    ],
)
def test_wrong_names_and_weights_change_nothing(names: list[str], weights: Any, message: str):
    pipe = tiny.sd3_pipeline()
    for name in "ab":
        pipe.add_softrepa(adapter_name=name)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.set_softrepa(names, weights)
    assert pipe.get_softrepa_adapters() == {"a": None, "b": 1.0}


def test_deleting_an_unknown_adapter_deletes_none():
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(adapter_name="a")
    with pytest.raises(ValueError, match=re.escape("named ['x']")):
        pipe.delete_softrepa(["a", "x"])
    assert pipe.get_softrepa_adapters() == {"a": 1.0}


def test_saving_needs_a_name_where_several_could_be_meant(tmp_path: Any):
    pipe = tiny.sd3_pipeline()
    for name in "ab":
        pipe.add_softrepa(adapter_name=name)
    pipe.set_softrepa(["a", "b"])
    with pytest.raises(
        ValueError, match=re.escape("adapter_name must say which adapter is meant: loaded are ['a', 'b']")
    ):
        pipe.save_softrepa(tmp_path)
    pipe.save_softrepa(tmp_path, "a")
    pipe.set_softrepa("b")
    pipe.save_softrepa(tmp_path / "b")


def test_hotswap_replaces_the_values_in_place():
    pipe = tiny.sd3_pipeline()
    config = SoftREPAConfig.for_denoiser(pipe.transformer)
    first, second = tensors_for(config), tensors_for(config)
    pipe.load_softrepa(first, config=config)
    parameters = softrepa_parameters(pipe)
    assert pipe.load_softrepa(second, config=config, hotswap=True) == "softrepa"
    assert softrepa_parameters(pipe)["tokens"] is parameters["tokens"]
    swapped = tiny.generate(pipe)
    pipe.unload_softrepa()
    pipe.load_softrepa(second, config=config)
    assert torch.equal(tiny.generate(pipe), swapped)


def test_hotswap_of_another_shape_or_name_is_refused():
    pipe = tiny.sd3_pipeline()
    config = SoftREPAConfig.for_denoiser(pipe.transformer)
    other = SoftREPAConfig.for_denoiser(pipe.transformer, num_tokens=2)
    pipe.load_softrepa(tensors_for(config), config=config)
    before = tiny.generate(pipe)
    with pytest.raises(ValueError, match="a hotswap needs equal shapes and stages"):
        pipe.load_softrepa(tensors_for(other), config=other, hotswap=True)
    with pytest.raises(
        ValueError, match=re.escape("hotswap needs the name of a loaded adapter, but 'x' is not among")
    ):
        pipe.load_softrepa(tensors_for(config), "x", config=config, hotswap=True)
    assert torch.equal(tiny.generate(pipe), before)


def test_a_weight_can_be_changed_from_a_callback_at_every_step():
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, init_std=1.0))
    full = tiny.generate(pipe, steps=3)

    def fade(pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.set_softrepa("softrepa", 1.0 - step / 2)
        return kwargs

    faded = tiny.generate(pipe, steps=3, callback_on_step_end=fade)
    assert not torch.equal(full, faded)
    assert pipe.get_softrepa_adapters() == {"softrepa": 0.0}


def test_the_base_models_name_is_kept_in_the_config_and_a_different_one_is_mentioned(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
):
    pipe = tiny.sd3_pipeline()
    pipe.register_to_config(_name_or_path="somebody/base-one")
    pipe.add_softrepa()
    pipe.save_softrepa(tmp_path)
    pipe.unload_softrepa()
    pipe.load_softrepa(tmp_path)
    assert not caplog.records
    pipe.register_to_config(_name_or_path="somebody/base-two")
    pipe.load_softrepa(tmp_path, "again")
    assert "trained on somebody/base-one and is loaded into somebody/base-two" in caplog.text


def test_an_adapter_loaded_to_train_on_requires_gradients(tmp_path: Any):
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa()
    pipe.save_softrepa(tmp_path)
    pipe.load_softrepa(tmp_path, "more", is_trainable=True)
    assert all(parameter.requires_grad for parameter in softrepa_parameters(pipe, "more").values())


def test_the_cache_of_the_hub_is_known_by_the_name_of_the_repository():
    denoiser = tiny.sd3_transformer()
    denoiser.register_to_config(
        _name_or_path="/home/me/.cache/hub/models--somebody--base-one/snapshots/0a1b/transformer"
    )
    denoiser.add_softrepa()
    assert denoiser._softrepa["softrepa"].config.base_model_name_or_path == "somebody/base-one"


def test_a_base_loaded_from_a_path_object_is_noted_as_text(tmp_path):
    tiny.sd15_pipeline().save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(Path(tmp_path))
    pipe.add_softrepa()
    assert pipe.unet._softrepa["softrepa"].config.base_model_name_or_path == str(tmp_path)
