"""The tests' tokenizers for transformers 4, whose classes take files; those of transformers 5 take a vocabulary."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import CLIPTokenizer, T5TokenizerFast


def clip_tokenizer(vocab: dict[str, int], max_length: int) -> Any:
    """Returns a CLIP tokenizer without merges."""
    with tempfile.TemporaryDirectory() as folder:
        words, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        words.write_text(json.dumps(vocab))
        merges.write_text("#version: 0.2\n\n")
        return CLIPTokenizer(str(words), str(merges), model_max_length=max_length)


def t5_tokenizer(pieces: Sequence[tuple[str, float]], max_length: int) -> Any:
    """Returns a T5 tokenizer of these pieces, the end of a text being the second and unknown text the third."""
    tokenizer = Tokenizer(Unigram(list(pieces), unk_id=2, byte_fallback=False))
    spaces = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    tokenizer.decoder = decoders.Metaspace(**spaces)
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=max_length)


def readable_pipeline(source: Path, folder: Path) -> Path:
    """Returns a copy of a pipeline that transformers 5 saved, with tokenizers that transformers 4 reads as well.

    Args:
        source: The pipeline's folder.
        folder: Where the copy goes.
    """
    shutil.copytree(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name, (_, kind) in ((name, entry) for name, entry in index.items() if name.startswith("tokenizer")):
        settings = json.loads((folder / name / "tokenizer_config.json").read_text())
        settings.pop("extra_special_tokens", None)  # a list in transformers 5, a mapping before
        if kind == "CLIPTokenizer":
            model = json.loads((folder / name / "tokenizer.json").read_text())["model"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            (folder / name / "vocab.json").write_text(json.dumps(model["vocab"]))
            (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        elif kind == "T5Tokenizer":
            index[name] = ["transformers", "T5TokenizerFast"]
            settings["tokenizer_class"] = "T5TokenizerFast"
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
