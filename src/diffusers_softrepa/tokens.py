"""Soft text tokens: learned vectors for each layer and timestep bin.

The tokens of layer l at timestep t are `tokens[l, k] + timestep_tokens[bin(t), l]` for k < K, where
`bin(t) = min(int(t), 999) * B // 1000` on the 0..1000 timestep scale.

Source: SoftREPA, arXiv 2503.08250, section 3.
"""

import torch
from torch import Tensor, nn

from .config import SoftREPAConfig


def timestep_bin(timestep: Tensor, num_bins: int, scale: float = 1.0) -> Tensor:
    """Returns the bin of each timestep.

    A timestep that a pipeline rounded to half precision (as FLUX.1 does with t/1000) may lie just below the edge of
    its bin. So the rounding error of its dtype is added first.

    Args:
        timestep: Timesteps as the denoiser gets them, any shape, integer or floating.
        num_bins: Number B of equal bins over 0..1000.
        scale: Factor that brings `timestep` to the 0..1000 scale.

    Returns:
        Bins in [0, num_bins), int64, of the same shape. Values outside 0..1000 belong to the first or the last bin.
    """
    level = timestep.to(torch.float32) * scale
    if timestep.is_floating_point():
        rounding = max(torch.finfo(timestep.dtype).eps / 2, 2 * torch.finfo(torch.float32).eps)
        level = level * (1 + rounding)
    return level.to(torch.int64).clamp(0, 999) * num_bins // 1000


class SoftTokens(nn.Module):
    """The learned tokens of one adapter.

    They are float32 and trainable, also under `torch.set_default_dtype` and `torch.inference_mode`.

    Attributes:
        tokens: `(L, K, D)`.
        timestep_tokens: `(B, L, D)`, or None without bins. With several banks both have a leading bank dimension.

    Args:
        config: Shapes and initialisation.
        text_embeddings: For `init="text"`: embeddings to start from, `(S, D)`, in the width the blocks read. Token k
            starts from row k modulo S.
        generator: Random generator for the initial noise.

    Raises:
        ValueError: `text_embeddings` is missing, is given without `init="text"`, has another width, or is not finite.
        TypeError: `text_embeddings` is no floating-point tensor, or `generator` is no generator.
    """

    def __init__(
        self,
        config: SoftREPAConfig,
        *,
        text_embeddings: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_bins = config.num_timestep_bins
        self.num_banks = config.num_banks
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, but is a {type(generator).__name__}")
        device = torch.device("cpu") if generator is None else generator.device
        with torch.inference_mode(False), torch.no_grad():
            start = _starting_rows(config, text_embeddings).to(device)
            values = {
                name: torch.empty(shape, dtype=torch.float32, device=device).normal_(
                    0.0, config.init_std, generator=generator
                )
                for name, shape in config.shapes.items()
            }
            self.tokens = nn.Parameter(values["tokens"] + start)
            self.timestep_tokens = nn.Parameter(values["timestep_tokens"]) if "timestep_tokens" in values else None

    def forward(self, timestep: Tensor, *, scale: float = 1.0, bank: Tensor | int = 0) -> Tensor:
        """Returns the tokens of every layer.

        Args:
            timestep: Timesteps `(batch,)` as the denoiser gets them.
            scale: Factor that brings `timestep` to the 0..1000 scale.
            bank: Index of the bank, one for the whole batch or int64 `(batch,)`.

        Returns:
            `(batch, L, K, D)`, float32; batch is 1 if the tokens are the same for all rows.
        """
        tokens = self.tokens if self.num_banks == 1 else self.tokens[bank]
        if tokens.ndim == 3:
            tokens = tokens[None]  # (1, L, K, D)
        if self.num_bins is None or self.timestep_tokens is None:
            return tokens
        bins = timestep_bin(timestep, self.num_bins, scale)
        offsets = self.timestep_tokens[bins] if self.num_banks == 1 else self.timestep_tokens[bank, bins]
        return tokens + offsets[:, :, None]  # (batch, L, K, D)


def _starting_rows(config: SoftREPAConfig, text_embeddings: Tensor | None) -> Tensor:
    """Returns the mean of the initial tokens, `(K, D)` or a scalar zero."""
    if config.init == "normal":
        if text_embeddings is not None:
            raise ValueError('text_embeddings are only used with init="text"; set it, or leave them out')
        return torch.zeros((), dtype=torch.float32, device="cpu")
    if text_embeddings is None:
        raise ValueError('init="text" needs text_embeddings of shape (S, D) to start from')
    if not isinstance(text_embeddings, Tensor) or not text_embeddings.is_floating_point():
        kind = getattr(text_embeddings, "dtype", type(text_embeddings).__name__)
        raise TypeError(f"text_embeddings must be a floating-point tensor, but are of type {kind}")
    if text_embeddings.ndim != 2 or text_embeddings.shape[1] != config.token_dim or not len(text_embeddings):
        raise ValueError(
            f"text_embeddings must have shape (S, {config.token_dim}), but have {tuple(text_embeddings.shape)}; "
            "give them as the blocks read them, behind the denoiser's own text projection"
        )
    if not bool(text_embeddings.isfinite().all()):
        raise ValueError("text_embeddings must be finite, but hold NaN or infinite values")
    rows = torch.arange(config.num_tokens, device="cpu") % text_embeddings.shape[0]
    return text_embeddings.detach().float().cpu()[rows]  # (K, D)
