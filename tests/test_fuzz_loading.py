"""Files drawn at random: each is loaded or refused with one sentence of ours, and the denoiser stays as it was."""

import json
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import diffusers_softrepa
import tiny
from diffusers_softrepa import SoftREPAConfig, load_softrepa, unload_softrepa
from diffusers_softrepa.adapter import adapters_of
from diffusers_softrepa.checkpoint import save_checkpoint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OURS = str(Path(diffusers_softrepa.__file__).parent)

JUNK: list[str] = [
    *("null", "true", "false", "0", "-1", "1", "3", "4.0", "1e308", "1e999", "-0.0", "NaN", "Infinity", "9" * 5000),
    *('""', '"x"', '"sd3"', '"normal"', '"down"', '"/etc/passwd"', '"../.."', '"a/b"', '"\\u0000"', '"\\ud83d"'),
    *(r'"a\nb"', '"' + "x" * 100_000 + '"', "[]", "[1]", '["down"]', '[["down"]]', "{}", '{"a": 1}', '{"a": "b"}'),
    *("[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "1" + "0" * 100, "9007199254740993", "1e5"),
    *('"\x7f"', "'x'", "", "{", "}", ",", '{"a": 1, "a": 2}', '"CAUSAL_LM"', '"\U0001f600"', '"SOFTREPA"'),
]
HEADER_JUNK: list[Any] = [
    *(None, -1, 0, 1, 2**63, 2**64, "x", [], {}, [0], [0, 0], [-1, 4], [4, 0], [0, 2**63], [0, 2**40], ["a", "b"]),
    *("F32", "F64", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "U16", "f32", "F128", [2**32, 2**32]),
]
VALUES = [0.0, -0.0, 1e-45, 1e19, 3e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 1e300, 65504.0, 2.0**127]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]


class Drawn:
    """A sound adapter, and cases drawn from it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.denoiser = tiny.sd3_transformer()
        self.config = SoftREPAConfig.for_denoiser(self.denoiser, num_timestep_bins=3)
        self.tensors = {name: torch.randn(shape) for name, shape in self.config.shapes.items()}
        self.sound, self.folder = folder / "sound", folder / "drawn"
        save_checkpoint(self.sound, self.config, self.tensors)
        self.content = (self.sound / WEIGHTS).read_bytes()

    def config_text(self) -> str:
        """The config with a few fields replaced, dropped or added."""
        fields = {name: json.dumps(value) for name, value in self.config.to_dict().items()}
        for _ in range(self.random.randint(1, 3)):
            name = self.random.choice([*fields, "extra", "rank", "", "runtime_config"])
            if self.random.random() < 0.2:
                fields.pop(name, None)
            else:
                fields[name] = self.random.choice(JUNK)
        return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items()) + "}"

    def bytes_of(self, content: bytes) -> bytes:
        """The bytes cut, flipped, doubled or overwritten."""
        data, draw = bytearray(content), self.random
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(max(1, min(len(data), 900 if draw.random() < 0.7 else len(data))))
            kind = draw.randrange(5)
            if kind == 0:
                data = data[:place]
            elif kind == 1 and data:
                data[place % len(data)] ^= 1 << draw.randrange(8)
            elif kind == 2:
                data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 20)))
            elif kind == 3:
                data[0:8] = draw.choice([0, 1, 7, len(data), len(data) - 8, 10**8, 2**63, 2**64 - 1]).to_bytes(
                    8, "little"
                )
            else:
                data[place : place + 8] = bytes(8)
        return bytes(data)

    def header(self) -> bytes:
        """A file whose header says something else than what follows."""
        end = 8 + int.from_bytes(self.content[:8], "little")
        header, draw = json.loads(self.content[8:end]), self.random
        for _ in range(draw.randint(1, 3)):
            name = draw.choice(["tokens", "timestep_tokens", "extra", "__metadata__"])
            if draw.random() < 0.3:
                header[name] = draw.choice(HEADER_JUNK)
            elif isinstance(header.get(name), dict):
                header[name][draw.choice(["dtype", "shape", "data_offsets", "format", "x"])] = draw.choice(HEADER_JUNK)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + self.content[end:]

    def values(self) -> dict[str, Any]:
        """A state dict with odd values, shapes, types or names."""
        tensors: dict[Any, Any] = {name: tensor.clone() for name, tensor in self.tensors.items()}
        draw = self.random
        for _ in range(draw.randint(1, 2)):
            name = draw.choice([*tensors, "extra"])
            tensor = self.tensors.get(name, self.tensors["tokens"]).clone()
            dtype = draw.choice(DTYPES)
            makers: list[Callable[[], Any]] = [
                lambda tensor=tensor, dtype=dtype: tensor.double().index_put(
                    (torch.tensor([0]),), torch.tensor(draw.choice(VALUES), dtype=torch.float64)
                ),
                lambda tensor=tensor, dtype=dtype: tensor.to(dtype),
                lambda tensor=tensor: tensor[..., :1],
                lambda tensor=tensor: tensor[None],
                lambda tensor=tensor: tensor[:0],
                lambda tensor=tensor: tensor.to("meta"),
                lambda tensor=tensor: tensor.to_sparse(),
                lambda tensor=tensor: tensor.mT,
                lambda tensor=tensor: tensor.numpy(),
                lambda: draw.choice([None, 1, "x", [], {}, object()]),
            ]
            made = draw.choice(makers)()
            tensors[draw.choice([name, name, name, 5, None, "lora_A", ("a",)])] = made
        return tensors

    def case(self) -> dict[str, Any]:
        """The arguments of a load."""
        kind = self.random.randrange(6)
        if kind == 0:
            return {"source": self.values(), "config": self.config}
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.sound, self.folder)
        weights, config = self.folder / WEIGHTS, self.folder / CONFIG
        if kind in (1, 2):  # without metadata, so that the JSON beside it counts
            weights.write_bytes(save(self.tensors))
            text = self.config_text().encode(errors="surrogatepass")
            config.write_bytes(text if kind == 1 else self.bytes_of(text))
        elif kind == 3:
            weights.write_bytes(save(self.tensors, {"softrepa_config": self.config_text(), "format": "pt"}))
        elif kind == 4:
            weights.write_bytes(self.bytes_of(self.content))
        else:
            weights.write_bytes(self.header())
        return {"source": self.random.choice([self.folder, weights])}


def state(denoiser: nn.Module) -> dict[str, Any]:
    return {
        "attributes": {path: set(vars(module)) for path, module in denoiser.named_modules()},
        "repr": repr(denoiser),
        "training": denoiser.training,
    }


def tensors_of(denoiser: nn.Module) -> list[Tensor]:
    return [value.clone() for value in denoiser.state_dict().values()]


def run(folder: Path, seed: int, cases: int) -> int:
    """Loads so many drawn cases and returns how many were refused."""
    drawn = Drawn(folder, seed)
    denoiser = drawn.denoiser
    before, values = state(denoiser), tensors_of(denoiser)
    refused = 0
    for number in range(cases):
        arguments = drawn.case()
        try:
            load_softrepa(denoiser, **arguments)
        except (ValueError, OSError, TypeError) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"case {number} of seed {seed}: {type(error).__name__} in {frame.filename}:{frame.lineno}: {error}"
            assert type(error) in (ValueError, OSError, TypeError), where
            assert frame.filename.startswith(OURS), where
            assert str(error).isprintable() and len(str(error)) < 1500, where
            assert adapters_of(denoiser) is None, where
            refused += 1
        else:
            unload_softrepa(denoiser)
        assert state(denoiser) == before, f"case {number} of seed {seed}"
    assert all(torch.equal(old, new) for old, new in zip(values, tensors_of(denoiser), strict=True))
    return refused


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_at_random_is_loaded_or_refused_in_one_sentence(tmp_path: Path, seed: int):
    assert 60 < run(tmp_path, seed, 100) < 100  # some of what is drawn is sound


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_much_of_what_is_drawn_at_random_is_loaded_or_refused_in_one_sentence(tmp_path: Path, seed: int):
    assert run(tmp_path, seed, 1000) > 600
