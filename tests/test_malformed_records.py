"""Records of earlier work that are malformed say so in one sentence: a manifest, the file of the Anima node."""

import json
import random
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import diffusers_softrepa
from diffusers_softrepa.convert import export_anima, import_anima, read_anima
from diffusers_softrepa.evaluation.gallery import MANIFEST_NAME, _read_manifest

OURS = str(Path(diffusers_softrepa.__file__).parent)
SOUND = {"format": 1, "pipeline": {}, "arguments": {"a": float("inf")}, "settings": {}, "prompts": {}, "images": []}


def test_a_sound_manifest_is_read_with_values_that_json_does_not_know(tmp_path: Path):
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(SOUND))
    assert _read_manifest(tmp_path / MANIFEST_NAME) == SOUND


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "5", "null", '"x"', "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}'),
        *(json.dumps({**SOUND, part: junk}) for part in SOUND for junk in (None, 7, "x", [1])),
        *(json.dumps({name: value for name, value in SOUND.items() if name != part}) for part in SOUND),
    ],
)
def test_a_malformed_manifest_says_what_to_do(tmp_path: Path, text: str):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"give another output_dir, or delete that folder") as caught:
        _read_manifest(tmp_path / MANIFEST_NAME)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_files_of_the_anima_node_drawn_at_random_are_read_or_refused_in_one_sentence(tmp_path: Path):
    draw = random.Random(0)
    tensors = {"tokens": torch.randn(3, 4, 16), "t_offsets.weight": torch.randn(5, 48)}
    content = save(tensors)
    path = tmp_path / "soft_tokens.safetensors"
    for number in range(150):
        data = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(200)
            data[place] = draw.randrange(256)
        path.write_bytes(bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])]))
        try:
            config, ours = import_anima(read_anima(path)[0])
            export_anima(config, ours)
        except (ValueError, OSError) as error:
            where = f"case {number}: {error!r}"
            assert type(error) in (ValueError, OSError), where
            assert traceback.extract_tb(error.__traceback__)[-1].filename.startswith(OURS), where
            assert str(error).isprintable() and len(str(error)) < 900, where


@pytest.mark.parametrize("value", [3e38, float("nan"), 1e300])
def test_values_that_overflow_are_refused_in_a_foreign_format_too(value: float):
    tokens: Any = torch.zeros(3, 4, 16, dtype=torch.float64)
    tokens[0, 0, 0] = value
    with pytest.raises(ValueError, match="tokens in the file of the Anima node"):
        import_anima({"tokens": tokens, "t_offsets.weight": torch.zeros(1, 48)})
