"""What lies beside a pipeline, malformed in any way, never keeps the pipeline itself from being loaded."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import tiny
from diffusers_softrepa.adapter import adapters_of

WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "model_index.json"
ADAPTER = Path("softrepa") / "transformer" / "on"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(adapter_name="on")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy whose large files are links, so that each case may spoil what is small."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder, copy_function=os.link)
    for path in [folder / INDEX, *(folder / ADAPTER).iterdir()]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    yield folder


def deep(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


ON = {"enabled": True, "weights": {"on": 1.0}}
ENTRIES: dict[str, Any] = {
    "null": None,
    "number": 5,
    "huge number": 10**300,
    "text": "transformer",
    "list": ["transformer"],
    "true": True,
    "empty": {},
    "component null": {"transformer": None},
    "component number": {"transformer": 1},
    "component list": {"transformer": [1, 2]},
    "component text": {"transformer": "on"},
    "no weights": {"transformer": {"enabled": True}},
    "no enabled": {"transformer": {"weights": {"on": 1.0}}},
    "enabled text": {"transformer": {"enabled": "yes", "weights": {"on": 1.0}}},
    "enabled list": {"transformer": {"enabled": [], "weights": {"on": 1.0}}},
    "weights null": {"transformer": {"enabled": True, "weights": None}},
    "weights list": {"transformer": {"enabled": True, "weights": ["on"]}},
    "weights number": {"transformer": {"enabled": True, "weights": 1}},
    "weight text": {"transformer": {"enabled": True, "weights": {"on": "1"}}},
    "weight true": {"transformer": {"enabled": True, "weights": {"on": True}}},
    "weight list": {"transformer": {"enabled": True, "weights": {"on": [1.0]}}},
    "weight huge": {"transformer": {"enabled": True, "weights": {"on": 1e308}}},
    "weight of many digits": {"transformer": {"enabled": True, "weights": {"on": 10**60}}},
    "unknown adapter": {"transformer": {"enabled": True, "weights": {"absent": 1.0}}},
    "nameless adapter": {"transformer": {"enabled": True, "weights": {"": 1.0}}},
    "adapter name of a path": {"transformer": {"enabled": True, "weights": {"../../../etc": 1.0}}},
    "adapter name absolute": {"transformer": {"enabled": True, "weights": {"/etc/passwd": 1.0}}},
    "adapter name with NUL": {"transformer": {"enabled": True, "weights": {"a\0b": 1.0}}},
    "adapter name too long": {"transformer": {"enabled": True, "weights": {"x" * 5000: 1.0}}},
    "adapter name of half a character": {"transformer": {"enabled": True, "weights": {"\ud83d": 1.0}}},
    "a thousand adapters": {"transformer": {"enabled": True, "weights": {str(i): 1.0 for i in range(1000)}}},
    "a thousand components": {str(i): ON for i in range(1000)},
    "unknown component": {"unet": ON},
    "component without tokens": {"vae": ON, "text_encoder": ON},
    "component that is no module": {"scheduler": ON, "tokenizer": ON},
    "component of Python": {"__class__": ON, "_internal_dict": ON, "": ON},
    "component of a path": {"../transformer": ON, "/etc": ON, "a/b": ON},
    "nested": deep(30),
    "nested too deep": deep(80),
}


def spoil_weights(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / ADAPTER / WEIGHTS).write_bytes(content)


def without_metadata(folder: Path, config: bytes | None) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / ADAPTER / WEIGHTS
    save_file(load_file(path), path)
    (folder / ADAPTER / CONFIG).unlink()
    if config is not None:
        (folder / ADAPTER / CONFIG).write_bytes(config)


def replaced_by_link(folder: Path, target: str) -> None:
    path = folder / ADAPTER / WEIGHTS
    path.unlink()
    path.symlink_to(target)


def replaced_by_folder(folder: Path) -> None:
    path = folder / ADAPTER / WEIGHTS
    path.unlink()
    path.mkdir()


HEADER = b'{"tokens":{"dtype":"F32","shape":[4,4,48],"data_offsets":[0,%d]}}'
FILES: dict[str, Callable[[Path], Any]] = {
    "no adapter folder": lambda folder: shutil.rmtree(folder / "softrepa"),
    "adapter folder is a file": lambda folder: (shutil.rmtree(folder / ADAPTER), (folder / ADAPTER).touch()),
    "no weights": lambda folder: (folder / ADAPTER / WEIGHTS).unlink(),
    "weights are a folder": replaced_by_folder,
    "weights are a broken link": lambda folder: replaced_by_link(folder, "nowhere"),
    "weights are a circle of links": lambda folder: replaced_by_link(folder, WEIGHTS),
    "weights link to another file": lambda folder: replaced_by_link(folder, "/etc/passwd"),
    "weights empty": spoil_weights(b""),
    "weights text": spoil_weights(b"<html>404</html>" * 9),
    "weights a pickle": spoil_weights(b"\x80\x04."),
    "header that lies of its length": spoil_weights(b"\xff" * 8 + b"{}"),
    "header that lies of the numbers": spoil_weights(len(HEADER % 999).to_bytes(8, "little") + HEADER % 999),
    "header that is no JSON": spoil_weights((8).to_bytes(8, "little") + b"{{{{{{{{"),
    "header nested deep": spoil_weights((20000).to_bytes(8, "little") + b"[" * 20000),
    "no config": lambda folder: without_metadata(folder, None),
    "config no JSON": lambda folder: without_metadata(folder, b"{"),
    "config nested deep": lambda folder: without_metadata(folder, b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "config of many digits": lambda folder: without_metadata(folder, b'{"token_dim": ' + b"9" * 5000 + b"}"),
}


def loaded(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


def assert_plain(pipe: Any, saved: Path, tmp_path: Path) -> None:
    """The pipeline is what a load without anything beside it gives."""
    plain_folder = tmp_path / "plain"
    shutil.copytree(saved, plain_folder, copy_function=os.link)
    shutil.rmtree(plain_folder / "softrepa")
    index = json.loads((plain_folder / INDEX).read_text())
    del index["_softrepa"]
    (plain_folder / INDEX).unlink()
    (plain_folder / INDEX).write_text(json.dumps(index))
    plain = loaded(plain_folder)
    assert pipe.components.keys() == plain.components.keys()
    assert adapters_of(pipe.transformer) is None
    for name, part in plain.components.items():
        other = pipe.components[name]
        assert type(other) is type(part)
        if isinstance(part, torch.nn.Module):
            assert vars(other).keys() == vars(part).keys() and repr(other) == repr(part)
            pairs = zip(other.state_dict().items(), part.state_dict().items(), strict=True)
            assert all(key == key2 and torch.equal(one, two) for (key, one), (key2, two) in pairs)


def check(folder: Path, saved: Path, tmp_path: Path, caplog: Any, *, silent: bool = False) -> None:
    with caplog.at_level(logging.WARNING, "diffusers_softrepa"):
        pipe = loaded(folder)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_softrepa")]
    assert bool(said) != silent
    assert all(text.isprintable() and len(text) < 1200 for text in said)
    assert_plain(pipe, saved, tmp_path)


@pytest.mark.parametrize("case", ENTRIES)
def test_a_malformed_entry_is_warned_of_and_the_pipeline_is_the_base(
    saved: Path, copy: Path, tmp_path: Path, caplog: Any, case: str
):
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "_softrepa": ENTRIES[case]}))
    check(copy, saved, tmp_path, caplog, silent=case in ("null", "empty"))


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_adapter_is_warned_of_and_the_pipeline_is_the_base(
    saved: Path, copy: Path, tmp_path: Path, caplog: Any, case: str
):
    FILES[case](copy)
    check(copy, saved, tmp_path, caplog)


def test_a_sound_adapter_beside_a_malformed_entry_of_another_component_comes_back(copy: Path, caplog: Any):
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "_softrepa": {"vae": 5, "transformer": ON}}))
    assert loaded(copy).get_softrepa_adapters() == {"on": 1.0}
    assert "adapters for 'vae', which cannot be loaded" in caplog.text
