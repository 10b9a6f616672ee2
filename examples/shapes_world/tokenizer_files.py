"""Tokenizers of small vocabularies, made from files that transformers 4 and transformers 5 both read."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import CLIPTokenizer, T5TokenizerFast

START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(
    folder: str | Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], max_length: int
) -> None:
    """Writes the files of a CLIP tokenizer into a folder, in the form of Stable Diffusion's own tokenizers.

    Args:
        folder: The folder, which is made.
        vocab: The index of each token, `START` and `END` included.
        merges: The pairs of tokens that are joined, the first pair first.
        max_length: The most tokens of a text, `START` and `END` included.
    """
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_settings(Path(folder), "CLIPTokenizer", max_length, **special)
    (Path(folder) / "vocab.json").write_text(json.dumps(vocab, indent=0) + "\n")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges), ""]
    (Path(folder) / "merges.txt").write_text("\n".join(lines))


def write_t5_tokenizer(folder: str | Path, pieces: Sequence[tuple[str, float]], max_length: int) -> None:
    """Writes the files of a T5 tokenizer into a folder.

    Args:
        folder: The folder, which is made.
        pieces: Each token with its logarithmic probability; the first three are `<pad>`, `</s>` and `<unk>`.
        max_length: The most tokens of a text, `</s>` included.
    """
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_settings(Path(folder), "T5TokenizerFast", max_length, **special, extra_ids=0)
    tokenizer = Tokenizer(Unigram(list(pieces), unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(list(special.values()))
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(Path(folder) / "tokenizer.json"))


def clip_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    """Returns a CLIP tokenizer; the arguments are those of `write_clip_tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(folder, vocab, merges, max_length)
        return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(pieces: Sequence[tuple[str, float]], max_length: int) -> T5TokenizerFast:
    """Returns a T5 tokenizer; the arguments are those of `write_t5_tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        write_t5_tokenizer(folder, pieces, max_length)
        return T5TokenizerFast.from_pretrained(folder)


def _write_settings(folder: Path, kind: str, max_length: int, **settings: str | int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings |= {"model_max_length": max_length, "tokenizer_class": kind}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
