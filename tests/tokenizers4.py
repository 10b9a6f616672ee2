"""The tests' tokenizers for transformers 4, whose classes take files; those of transformers 5 take a vocabulary."""

import json
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
