"""The reference implementation's numbers on small seeded models, and the models and adapters they belong to."""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
from safetensors import safe_open
from torch import Tensor, nn

from diffusers_softrepa import SoftREPAConfig, load_softrepa

NAMES = ("sd15", "sdxl", "sd3")


@dataclass(frozen=True)
class Golden:
    """One golden file.

    Attributes:
        tensors: Inputs and outputs by name.
        denoiser: The seeded model, frozen.
        config: What its adapter is.
    """

    name: str
    tensors: dict[str, Tensor]
    denoiser: nn.Module
    config: SoftREPAConfig

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors in our shapes."""
        return {name: self.tensors[name].reshape(shape) for name, shape in self.config.shapes.items()}

    def load_adapter(self) -> None:
        load_softrepa(self.denoiser, self.adapter, config=self.config)


def golden(name: str) -> Golden:
    """Reads `tests/golden/<name>.safetensors`."""
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    denoiser = getattr(diffusers, metadata["denoiser"]).from_config(json.loads(metadata["config"])).eval()
    base = {key.removeprefix("base."): value for key, value in tensors.items() if key.startswith("base.")}
    denoiser.load_state_dict(base)
    denoiser.requires_grad_(False)
    table = tensors.get("timestep_tokens")
    stages = [stage for stage, chosen in json.loads(metadata.get("stages", "{}")).items() if chosen]
    config = SoftREPAConfig.for_denoiser(
        denoiser,
        num_tokens=int(metadata["num_tokens"]),
        num_layers=int(metadata["num_layers"]) if "num_layers" in metadata else None,
        stages=stages or None,
        num_timestep_bins=None if table is None else table.shape[0],
    )
    return Golden(name, tensors, denoiser, config)
