"""Cards and configs: foreign text is only text, no path of this machine is told, every field has a bound."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

import tiny
from diffusers_softrepa import SoftREPAConfig, load_softrepa
from diffusers_softrepa.adapter import adapters_of
from diffusers_softrepa.card import (
    images_of,
    metadata_of,
    model_card,
    refreshed,
    section,
    words_by_hand,
)
from diffusers_softrepa.checkpoint import save_checkpoint
from diffusers_softrepa.hub_ids import hub_id
from diffusers_softrepa.quoting import in_markdown

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
SNAPSHOT = "/home/me/.cache/hub/models--alice--base/snapshots/0123abc"


def config(**fields: Any) -> SoftREPAConfig:
    return SoftREPAConfig(**{"family": "sd3", "token_dim": 8, "num_layers": 2, **fields})


CARD_TEXT = str(model_card(config(), "user/tokens"))
SECTIONS = CARD_TEXT.split("---\n", 2)[2]

# Paths


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("alice/base", "alice/base"),
        (None, None),
        ("", None),
        *((path, None) for path in ("/home/me/base", "./base", "../me/base", "~/base", "~me/base", "a/b/c", "base")),
        *(
            (path, None)
            for path in (r"C:\models\base", "C:/base", r".\base", r"\\server\share\base", "file:///home/me")
        ),
        (Path("/home/me/base"), None),
        (Path("alice/base"), "alice/base"),
        (SNAPSHOT, "alice/base"),
        (SNAPSHOT + "/transformer", "alice/base"),
        (Path(SNAPSHOT), "alice/base"),
        (SNAPSHOT.replace("/", "\\"), "alice/base"),
        ("/home/me/models--nothing/snapshots/1", None),
    ],
)
def test_a_base_is_told_by_its_hub_id_or_not_at_all(tmp_path: Path, name: Any, told: str | None):
    assert hub_id(name) == told
    made = config(base_model_name_or_path=name, num_timestep_bins=None)
    tensors = {key: torch.zeros(shape) for key, shape in made.shapes.items()}
    save_checkpoint(tmp_path / "a", made, tensors)
    made.save_pretrained(str(tmp_path / "b"))
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        written = [file.metadata()["softrepa_config"]]
    written += [(tmp_path / folder / CONFIG).read_text() for folder in "ab"]
    assert [json.loads(text)["base_model_name_or_path"] for text in written] == [told] * 3
    for path in (tmp_path / "a").iterdir():
        assert b"/home/me" not in path.read_bytes() and b"models\\" not in path.read_bytes()


@pytest.mark.parametrize("relative", [False, True])
def test_a_pipeline_of_a_local_folder_leaves_no_path_in_an_adapters_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
):
    monkeypatch.chdir(tmp_path)
    tiny.sd3_pipeline().save_pretrained("private/base")
    pipe = DiffusionPipeline.from_pretrained("private/base" if relative else tmp_path / "private" / "base")
    pipe.add_softrepa()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the relative path is no longer a folder
    pipe.save_softrepa("out")
    pipe.save_pretrained("pipe")
    for path in [*Path("out").iterdir(), *Path("pipe", "softrepa").rglob("*")]:
        if path.is_file():
            assert b"private" not in path.read_bytes(), path


# Fields

JUNK = [-1, 0, True, 1.5, float("nan"), float("inf"), 10**400, "x" * 10_000, "a\nb", [], [1], {}, {"a": {}}, object()]


@pytest.mark.parametrize("name", list(config().to_dict()))
def test_every_field_of_a_config_refuses_junk_in_one_line(name: str):
    sound = {
        "init_std": [1.5],
        "peft_type": [],
        "inference_mode": [True],
        "auto_mapping": [{}],
        "stages": [[]],
    }
    for value in JUNK:
        if any(type(value) is type(good) and value == good for good in sound.get(name, [])):
            continue
        with pytest.raises(ValueError) as caught:
            config(**{name: value})
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_config_that_asks_for_too_many_numbers_is_refused():
    with pytest.raises(ValueError, match=r"may hold 4,294,967,296 numbers, but this config asks for"):
        config(token_dim=1 << 20, num_tokens=1 << 16, num_layers=1 << 12)


def test_a_field_that_was_spoiled_afterwards_is_not_written(tmp_path: Path):
    made = config()
    made.init_std = float("nan")
    with pytest.raises(ValueError, match="init_std must be"):
        save_checkpoint(tmp_path, made, {key: torch.zeros(shape) for key, shape in made.shapes.items()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [3e38, -3e38, 2.0**127, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_value_whose_square_overflows_is_refused_like_infinity(value: float, dtype: torch.dtype):
    denoiser = tiny.sd3_transformer()
    made = SoftREPAConfig.for_denoiser(denoiser)
    tensors = {key: torch.zeros(shape, dtype=dtype) for key, shape in made.shapes.items()}
    tensors["tokens"].view(-1)[3] = value
    with pytest.raises(ValueError, match=r"tokens in the state dict holds the value .* the result is infinite"):
        load_softrepa(denoiser, tensors, config=made)
    assert adapters_of(denoiser) is None


# Adapters of other kinds

KINDS = {
    "load_lora_weights": [
        "transformer.blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_down_lora_down.weight",
        "x.lora.up",
    ],
    "load_ip_adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "load_textual_inversion": ["emb_params", "<cat-toy>", "clip_l"],
}
FILES = {
    "load_lora_weights": "pytorch_lora_weights.safetensors",
    "load_ip_adapter": "ip-adapter_sd15.safetensors",
    "load_textual_inversion": "learned_embeds.safetensors",
}


@pytest.mark.parametrize("call", KINDS)
def test_an_adapter_of_another_kind_says_which_call_loads_it(tmp_path: Path, call: str):
    denoiser = tiny.sd3_transformer()
    for name in KINDS[call]:
        folder = tmp_path / str(abs(hash(name)))
        folder.mkdir()
        for file in (WEIGHTS, FILES[call]):
            save_file({name: torch.zeros(2, 2)}, folder / file)
        sources: list[Any] = [folder, folder / WEIGHTS, folder / FILES[call], {name: torch.zeros(2, 2)}]
        (tmp_path / f"only-{folder.name}").mkdir()
        save_file({name: torch.zeros(2, 2)}, tmp_path / f"only-{folder.name}" / FILES[call])
        for source in [*sources, tmp_path / f"only-{folder.name}"]:
            with pytest.raises((ValueError, OSError), match=rf"a[n]? .*; load it with pipe\.{call}\(\.\.\.\)"):
                load_softrepa(denoiser, source)
    assert adapters_of(denoiser) is None


# Cards

HOSTILE = [
    "<!-- /softrepa:adapter -->",
    "<!-- softrepa:training x -->\n",
    "-->",
    "a | b | c",
    "a\nb\n\n# heading",
    "# heading",
    "- item",
    "1. item",
    "```python\nimport os\n```",
    "`code`",
    "![a](secret.png)",
    "[click](https://evil.example)",
    "https://evil.example www.evil.example",
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "**bold** _em_ ~~gone~~",
    "&lt;b&gt;",
    "\\",
    "\x1b[31m\u202e",
    "x" * 10_000,
    "---",
    "===",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_in_markdown_is_nothing_but_text(text: str):
    shown = in_markdown(text)
    assert shown.isprintable() and len(shown) < 2500
    for sign in "`*[]|~<>":
        assert not re.search(rf"(?<!\\)(?:\\\\)*{re.escape(sign)}", shown)
    assert "://" not in shown and "www." not in shown
    assert not re.match(r"[-+#=]($|[\s-])|\d+[.)](\s|$)|#|=", shown)
    card = CARD_TEXT + section("training", f"- {shown}\n\n| {shown} |") + "\n"
    assert words_by_hand(card) == "" and images_of(card) == []
    assert refreshed(card, CARD_TEXT) == card


@pytest.mark.parametrize("text", ["a red cat", "learning_rate", "softrepa=0.5", "3.5", "-0.25", "it's 50% (half)"])
def test_ordinary_text_in_markdown_is_as_it_is(text: str):
    assert in_markdown(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_weight_name_cannot_leave_the_cards_example(text: str):
    card = str(model_card(config(), "user/tokens", weight_name=text))
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "the card's example", "exec")
    assert words_by_hand(card) == ""


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


METADATA = {
    "bomb": bomb(9),
    "bomb in tags": bomb(8) + "\ntags: *a7",
    "recursive": "a: &a [*a]",
    "merge": "a: &a {x: 1}\nb: {<<: [*a, *a]}",
    "python": "a: !!python/object/apply:os.system ['true']",
    "list": "- a\n- b",
    "text": "just text",
    "number": "5",
    "tab": "\tx: 1",
    "broken": "{: broken",
    "dates": "d: 2020-01-01\nn: .nan\ni: .inf",
    "no date": "d: 2020-99-99",
    "twice": "tags: [a]\ntags: [b]",
    "model-index text": "model-index: x",
    "model-index nested": "model-index: [{name: x, results: [{task: 5}]}]",
    "widget text": "widget: x",
    "widget odd": "widget: [1, {output: 5}, {output: {url: 7}}, null]",
    "tags mapping": "tags: {a: 1}\nbase_model: [1]\nlicense: {}",
    "tags odd": "tags: [[a], {b: 1}]",
    "keys odd": "? [1, 2]\n: 3\n1: 2\nnull: 3",
    "deep": "a: " + "[" * 3000 + "]" * 3000,
    "long": "a: " + "x" * 1_000_000,
    "NUL": "a: \0",
}


@pytest.mark.filterwarnings("ignore")  # huggingface_hub's own about metadata
@pytest.mark.parametrize("case", METADATA)
def test_any_metadata_are_survived_and_the_sections_still_brought_up_to_date(case: str):
    card = f"---\n{METADATA[case]}\n---\n{SECTIONS}"
    start = time.perf_counter()
    again = refreshed(card, str(model_card(config(num_tokens=7), "user/tokens")))
    assert time.perf_counter() - start < 10
    assert "| tokens per layer | 7 |" in again
    assert isinstance(metadata_of(card), dict) and images_of(card) == []


HUGE = {
    "opened": CARD_TEXT + "<!-- softrepa:adapter x -->\n" * 30_000,
    "opened as another": CARD_TEXT + "<!-- softrepa:other x -->\n" * 30_000,
    "closed": CARD_TEXT + "<!-- /softrepa:adapter -->\n" * 30_000,
    "begun": CARD_TEXT + "<!-- softrepa:" * 100_000,
    "pictures begun": CARD_TEXT + "![" * 300_000,
    "pictures named": CARD_TEXT + "![](" * 300_000,
    "dashes": "---\n" * 200_000 + CARD_TEXT,
    "long": CARD_TEXT + "x" * 10_000_000,
}


@pytest.mark.parametrize("case", HUGE)
def test_a_card_is_read_in_time_proportional_to_its_size(case: str):
    start = time.perf_counter()
    refreshed(HUGE[case], CARD_TEXT)
    words_by_hand(HUGE[case])
    images_of(HUGE[case])
    assert time.perf_counter() - start < 10  # a quadratic pattern takes minutes


def test_a_fresh_card_is_one_that_the_hub_can_read():
    assert ModelCard(CARD_TEXT).data.library_name == "diffusers"
