"""Conversion of open_clip's CLIP checkpoints to the parameter names of transformers' `CLIPModel`.

The numbers are the same. open_clip stores the three attention projections as one matrix (3D, D), and the transposes of
the two projections into the shared space.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_TOWERS = {"visual.transformer.": "vision_model.encoder.", "transformer.": "text_model.encoder."}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SINGLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IGNORED = ("attn_mask",)  # a constant that some releases store among the weights
_RESBLOCK = re.compile(r"((?:visual\.)?transformer\.)resblocks\.(\d+)\.(.+)\.(weight|bias)")
_IN_PROJECTION = re.compile(r"((?:visual\.)?transformer\.)resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def to_transformers(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the state dict of a `CLIPModel`, float32.

    Args:
        state: State dict of open_clip's `CLIP`.
        where: What the checkpoint is, for messages.

    Raises:
        ValueError: The checkpoint has a parameter that a CLIP with two transformers does not have.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, value = key.removeprefix("module."), tensor.float()
        split, block = _IN_PROJECTION.fullmatch(name), _RESBLOCK.fullmatch(name)
        if name in _IGNORED:
            continue
        if name in _SINGLE:
            found[_SINGLE[name]] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T.contiguous()
        elif split is not None:
            tower, layer, kind = split.groups()
            for part, projection in zip(value.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                found[f"{_TOWERS[tower]}layers.{layer}.self_attn.{projection}.{kind}"] = part.contiguous()
        elif block is not None and block.group(3) in _BLOCK:
            tower, layer, part_name, kind = block.groups()
            found[f"{_TOWERS[tower]}layers.{layer}.{_BLOCK[part_name]}.{kind}"] = value
        else:
            raise ValueError(f"{where} must be an open_clip CLIP, but holds {key!r}; is it another file?")
    return found
