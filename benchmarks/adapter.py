"""What an adapter costs: time of a denoiser call, of loading, of importing. Everything is a ratio within one run.

    python benchmarks/adapter.py [--quick | --full] [--repeats N]

A sampling step is one denoiser call and nothing else is touched, so the ratio of calls is the ratio of sampling times.
The denoisers have the widths and token counts of SD3 and SDXL at 1024 x 1024 px. To run on a CPU they have fewer
layers, which changes how large a share of a call the blocks with tokens are: larger for SD3, smaller for SDXL. So
operations are counted as well, exactly and at full depth (on the meta device, which computes nothing), and the
measured extra time is scaled by how the share of added operations changes from the cut denoiser to the full one.
`--full` measures at full depth instead.
"""

import argparse
import functools
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_softrepa import (
    SoftREPAConfig,
    add_softrepa,
    disable_softrepa,
    enable_softrepa,
    load_softrepa,
    save_softrepa,
    set_softrepa,
    softrepa_parameters,
    unload_softrepa,
)
from diffusers_softrepa.checkpoint import WEIGHTS_NAME

IMPORTS = """
from time import {clock} as clock
start = clock()
import diffusers
from diffusers import DiffusionPipeline
plain = clock()
import diffusers_softrepa
print(plain - start, clock() - plain)
"""
NAME = "softrepa"


@dataclass(frozen=True)
class Workload:
    """One denoiser call at 1024 px.

    Attributes:
        name: What it stands for.
        cut: How the denoiser is cut, in words.
        make: From whether it has full depth to a random denoiser.
        inputs: From the side of the latents to the arguments of one call.
    """

    name: str
    cut: str
    make: Callable[[bool], Any]
    inputs: Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Times:
    """Seconds of each call, in order; the calls of one repeat stand at the same index.

    Attributes:
        without: With the adapter off, twice in each repeat: how much they differ is the noise.
        at: By weight, with the adapter on.
    """

    without: tuple[list[float], list[float]]
    at: dict[float, list[float]]

    def ratios(self, weight: float) -> list[float]:
        """Returns time with the adapter over mean time without it, one for each repeat."""
        return [
            with_adapter / statistics.mean(pair)
            for with_adapter, *pair in zip(self.at[weight], *self.without, strict=True)
        ]

    def noise(self) -> list[float]:
        """Returns the ratio of the two equal calls of each repeat."""
        return [second / first for first, second in zip(*self.without, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    repeats = given.repeats or (1 if given.quick else 5)
    side, weights = (32, (1.0,)) if given.quick else (128, (1.0, 0.5))
    clock = time.process_time if given.cpu_time else time.perf_counter
    torch.manual_seed(0)
    rows: list[str] = []
    for workload in WORKLOADS:
        _say(f"{workload.name}: counting operations")
        inputs = functools.partial(workload.inputs, side)
        counted = {full: _operation_ratios(workload.make, inputs, full, weights) for full in {given.full, True}}
        _say(f"{workload.name}: timing calls")
        times = _time_calls(workload.make(given.full), inputs(), weights, repeats, clock)
        rows += _rows(workload, times, counted[given.full], counted[True])
        gc.collect()  # a denoiser and its adapters refer to each other
    cuts = "; ".join(f"{workload.name}: {workload.cut}" for workload in WORKLOADS)
    print(f"{torch.get_num_threads()} threads, {repeats} repeats, {'full depth' if given.full else cuts}\n")
    print(
        f"| denoiser call at {8 * side} px | time ratio, median (spread) | at full depth | operations at full depth |"
    )
    print("| --- | --- | --- | --- |")
    print("\n".join(rows))
    _say("loading and importing")
    print("\n| once | time | ratio |")
    print("| --- | --- | --- |")
    print(_load_row(20 * repeats, clock))
    print(_import_row(3 if given.quick else 9, clock))


def _sd3(full: bool) -> Any:  # diffusers' classes carry no types
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24 if full else 6,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )


def _sd3_inputs(side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, side, side),
        "encoder_hidden_states": torch.randn(1, 333, 4096),
        "pooled_projections": torch.randn(1, 2048),
        "timestep": torch.tensor([500.0]),
    }


def _sdxl(full: bool) -> Any:
    return UNet2DConditionModel(
        sample_size=128,
        layers_per_block=2 if full else 1,
        transformer_layers_per_block=(1, 2, 10) if full else (1, 1, 2),
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sdxl_inputs(side: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, 4, side, side),
        "encoder_hidden_states": torch.randn(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)},
        "timestep": torch.tensor([500.0]),
    }


WORKLOADS = (
    Workload("SD3", "6 of 24 blocks, 5 with tokens", _sd3, _sd3_inputs),
    Workload("SDXL", "1 of 2 layers a stage, of 1 and 2 transformer blocks instead of 2 and 10", _sdxl, _sdxl_inputs),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What an adapter costs, as ratios.")
    parser.add_argument("--repeats", type=int, help="how often each call is timed (5; 1 with --quick)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for machines that others use as well")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="256 px, weight 1, once: shows that it runs, not more")
    depth.add_argument("--full", action="store_true", help="full depth: 8 and 10 GB, minutes a call on a CPU")
    return parser


def _operation_ratios(
    make: Callable[[bool], Any], inputs: Callable[[], dict[str, Any]], full: bool, weights: Sequence[float]
) -> dict[float, float]:
    """Returns multiplications with the adapter over those without, by weight."""
    with torch.device("meta"):
        denoiser, arguments = make(full), inputs()
    without = _operations(denoiser, arguments)
    add_softrepa(denoiser, adapter_name=NAME)
    for parameter in softrepa_parameters(denoiser).values():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    ratios = {}
    for weight in weights:
        set_softrepa(denoiser, NAME, weight)
        ratios[weight] = _operations(denoiser, arguments) / without
    return ratios


@torch.no_grad()
def _operations(denoiser: nn.Module, inputs: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        denoiser(**inputs)
    return counter.get_total_flops()


def _time_calls(
    denoiser: nn.Module,
    inputs: dict[str, Any],
    weights: Sequence[float],
    repeats: int,
    clock: Callable[[], float],
) -> Times:
    """Times calls with and without a fresh adapter in turns, in another order each time."""
    add_softrepa(denoiser, adapter_name=NAME)
    times = Times(without=([], []), at={weight: [] for weight in weights})
    turns: list[tuple[float | None, list[float]]] = [(None, times.without[0]), (None, times.without[1])]
    for weight in weights:
        turns.insert(1, (weight, times.at[weight]))
    for warm_up, _ in turns[:2]:  # nothing is done for the first time while the clock runs
        _timed_call(denoiser, inputs, warm_up, clock)
    for repeat in range(repeats):
        first = repeat % len(turns)
        for setting, seconds in turns[first:] + turns[:first]:
            seconds.append(_timed_call(denoiser, inputs, setting, clock))
            _say(f"  weight {setting}: {seconds[-1]:.2f} s")
    return times


@torch.no_grad()
def _timed_call(
    denoiser: nn.Module, inputs: dict[str, Any], weight: float | None, clock: Callable[[], float]
) -> float:
    if weight is None:
        disable_softrepa(denoiser)
    else:
        enable_softrepa(denoiser)
        set_softrepa(denoiser, NAME, weight)
    start = clock()
    denoiser(**inputs)
    return clock() - start


def _rows(workload: Workload, times: Times, counted: dict[float, float], full: dict[float, float]) -> list[str]:
    rows = [f"| {workload.name}, without over without: the noise | {_spread(times.noise())} | | |"]
    for weight in times.at:
        ratios = times.ratios(weight)
        scale = (full[weight] - 1) / (counted[weight] - 1)
        scaled = 1 + (statistics.median(ratios) - 1) * scale
        name = f"{workload.name}, with the adapter at weight {weight:g} over without"
        rows.append(f"| {name} | {_spread(ratios)} | {scaled:.3f} | {full[weight]:.5f} |")
    return rows


def _load_row(repeats: int, clock: Callable[[], float]) -> str:
    """Times loading an adapter of SD3's published size, and only reading its numbers."""
    denoiser = _sd3(full=False)
    config = SoftREPAConfig.for_denoiser(denoiser)
    add_softrepa(denoiser, config)
    loading, reading = [], []
    with tempfile.TemporaryDirectory() as folder:
        save_softrepa(denoiser, folder)
        for _ in range(repeats):
            unload_softrepa(denoiser)
            start = clock()
            load_softrepa(denoiser, folder)
            middle = clock()
            copies = [tensor.clone() for tensor in load_file(f"{folder}/{WEIGHTS_NAME}").values()]
            reading.append(clock() - middle)
            loading.append(middle - start)
            del copies
    seconds, plain = statistics.median(loading), statistics.median(reading)
    return (
        f"| load_softrepa from a folder, {config.num_parameters:,} numbers, over reading them from the file "
        f"| {1000 * seconds:.1f} ms | {seconds / plain:.1f} |"
    )


def _import_row(repeats: int, clock: Callable[[], float]) -> str:
    """Times importing diffusers and its pipeline class in fresh processes, and then this package as well."""
    code = IMPORTS.format(clock=clock.__name__)
    plain, added = [], []
    for _ in range(repeats + 1):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        before, ours = map(float, done.stdout.split())
        plain.append(before)
        added.append(ours)
    ratios = [1 + ours / before for before, ours in zip(plain[1:], added[1:], strict=True)]  # the first fills caches
    return (
        f"| import diffusers, DiffusionPipeline and diffusers_softrepa, over the first two "
        f"| +{1000 * statistics.median(added[1:]):.0f} ms | {_spread(ratios)} |"
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _say(sentence: str) -> None:
    """Tells how far it is, beside the table."""
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
