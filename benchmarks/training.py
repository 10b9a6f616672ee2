"""What a contrastive step costs: ours against the published algorithm, which keeps all b x b pairs in one graph.

    python benchmarks/training.py [--batches 4 8 16 32] [--repeats N]
    python benchmarks/training.py --sd3-medium          # SD3-medium's shape, for a GPU

All steps train the same random denoiser of SD3's class on the same pairs, in turns, in one process. Times are ratios
within a round, on a CPU of processor time. Memory is counted, not sampled: of every tensor that comes to be during a
step, from its first operation until it is freed (`PeakMemory`), and of those that wait for the backward pass
(`SavedMemory`).
"""

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_softrepa import SoftREPAConfig, add_softrepa, softrepa_parameters
from diffusers_softrepa.objectives import Contrastive
from diffusers_softrepa.pairs import pair_errors
from diffusers_softrepa.training.step.engine import PairBatch, PairEngine

CHUNK = 3
NEGATIVES = 3
CHECKPOINTED_BATCH = 16
GPU_GB = 24

Step = Callable[[PairBatch], Sequence[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of the denoiser and of what it reads; the text stream is 64 * heads wide."""

    layers: int = 8
    heads: int = 2
    latents: int = 16
    text_tokens: int = 32
    text_dim: int = 128
    pooled_dim: int = 128
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Cost:
    """What one kind of step costs at one batch size.

    Attributes:
        name: The step.
        batch_size: b.
        saved: Peak of the bytes that wait for the backward pass; 0 where checkpointing hides them.
        peak: Peak of the bytes of all tensors that the step makes.
        difference: Of the gradients from the naive ones: largest, as a share of the largest gradient.
        seconds: Of each round.
        ratios: Time over the naive step's, of each round.
    """

    name: str
    batch_size: int
    saved: int
    peak: int
    difference: float
    seconds: list[float]
    ratios: list[float]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be while it is active, from then until they are freed.

    Attributes:
        peak: The most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), new=False)
        output = func(*args, **(kwargs or {}))
        self._see(output, new=True)
        return output

    def _see(self, values: Any, *, new: bool) -> None:
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = (
                    storage.nbytes() if new else 0
                )  # what an operation reads was there before
                self._now += self._sizes[storage._cdata]
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class _Saved:
    """One tensor kept for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedMemory(saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass, each storage once.

    Attributes:
        peak: The most there were at once.

    Args:
        apart_from: Tensors that are there anyway.
    """

    def __init__(self, apart_from: Sequence[Tensor]) -> None:
        super().__init__(self._pack, lambda saved: saved.tensor)
        self.peak = self._now = 0
        self._present = {tensor.untyped_storage()._cdata for tensor in apart_from}
        self._users: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> _Saved:
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._present:
            self._users[key] = self._users.get(key, 0) + 1
            self._now += size if self._users[key] == 1 else 0
            self.peak = max(self.peak, self._now)
            weakref.finalize(saved, self._release, key, size)
        return saved

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self._now -= size


class Subject:
    """A random denoiser with fresh soft tokens, and the steps that train them.

    Args:
        shape: Its sizes.
        checkpointing: Whether its blocks run again in the backward pass.
    """

    def __init__(self, shape: Shape, *, checkpointing: bool = False) -> None:
        torch.manual_seed(0)
        self.shape = shape
        torch.set_default_dtype(shape.dtype)
        with torch.device(shape.device):
            denoiser: Any = SD3Transformer2DModel(
                sample_size=shape.latents,
                num_layers=shape.layers,
                num_attention_heads=shape.heads,
                caption_projection_dim=64 * shape.heads,
                joint_attention_dim=shape.text_dim,
                pooled_projection_dim=shape.pooled_dim,
                pos_embed_max_size=shape.latents,
            )
        torch.set_default_dtype(torch.float32)
        self.denoiser = denoiser.eval().requires_grad_(False)
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.checkpointing = checkpointing
        add_softrepa(self.denoiser, SoftREPAConfig.for_denoiser(self.denoiser, num_layers=min(5, shape.layers)))
        self.tokens = list(softrepa_parameters(self.denoiser).values())
        for parameter in self.tokens:
            parameter.requires_grad_()

    def predict(self, noisy_latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return self.denoiser(noisy_latents, **conditions, timestep=timestep, return_dict=False)[0]

    @torch.no_grad()
    def batch(self, size: int) -> PairBatch:
        """Returns b images and captions.

        Targets lie near the matched predictions, so that errors have the size of a trained model's.
        """
        torch.manual_seed(size)
        shape = self.shape
        like: dict[str, Any] = {"device": shape.device, "dtype": shape.dtype}
        noisy_latents = torch.randn(size, 16, shape.latents, shape.latents, **like)
        timestep = 1000 * torch.rand(size, device=shape.device)
        conditions = {
            "encoder_hidden_states": torch.randn(size, shape.text_tokens, shape.text_dim, **like),
            "pooled_projections": torch.randn(size, shape.pooled_dim, **like),
        }
        matched = [
            self.predict(
                noisy_latents[i : i + 1], timestep[i : i + 1], {k: v[i : i + 1] for k, v in conditions.items()}
            )
            for i in range(size)
        ]
        return PairBatch(
            noisy_latents=noisy_latents,
            target=torch.cat(matched) + 0.3 * torch.randn_like(noisy_latents),
            timestep=timestep,
            conditions=conditions,
            positive=torch.arange(size, device=shape.device),
            candidates=torch.ones(size, size, dtype=torch.bool, device=shape.device),
        )

    def steps(self) -> dict[str, Step]:
        """Returns the steps to compare, the naive one first."""
        return {
            "naive": self.naive,
            "ours": self.engine(),
            f"ours, {CHUNK} pairs at a time": self.engine(pair_chunk_size=CHUNK),
            f"ours, {NEGATIVES} negatives trained": self.engine(num_backward_negatives=NEGATIVES),
        }

    def naive(self, batch: PairBatch) -> Sequence[Tensor]:
        """The published algorithm: all errors, their loss, one backward pass."""
        row, column = batch.candidates.nonzero().T
        conditions = {name: value[column] for name, value in batch.conditions.items()}
        prediction = self.predict(batch.noisy_latents[row], batch.timestep[row], conditions)
        errors = pair_errors(prediction, batch.target[row]).reshape(batch.candidates.shape)
        return torch.autograd.grad(Contrastive().loss(errors, batch.positive, batch.candidates), self.tokens)

    def engine(self, **settings: Any) -> Step:
        """Ours, with settings of `PairEngine`."""
        engine = PairEngine(self.predict, Contrastive(), self.tokens, **settings)

        def step(batch: PairBatch) -> Sequence[Tensor]:
            return engine.step(batch, generator=torch.Generator().manual_seed(0)).gradients

        return step


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    if given.sd3_medium:
        _sd3_medium(given)
        return
    shape = Shape()
    print(
        f"SD3Transformer2DModel, {shape.layers} layers (5 with tokens) of width {64 * shape.heads}, "
        f"{shape.latents**2 // 4} image and {shape.text_tokens} text tokens, {torch.get_num_threads()} threads\n"
    )
    costs = [cost for b in given.batches for cost in measure(Subject(shape), b, given.repeats, given.seconds)]
    print(table(costs))
    if CHECKPOINTED_BATCH in given.batches:
        print(f"\nWith gradient checkpointing, b = {CHECKPOINTED_BATCH}:\n")
        print(table(measure(Subject(shape, checkpointing=True), CHECKPOINTED_BATCH, given.repeats, given.seconds)))


def measure(subject: Subject, batch_size: int, repeats: int, seconds: float = float("inf")) -> list[Cost]:
    """Measures all steps at one batch size, in turns, for `repeats` rounds, or until `seconds` have passed."""
    batch, steps = subject.batch(batch_size), subject.steps()
    costs, expected = [], None
    for name, step in steps.items():
        gradients, saved, peak = _watch(subject, step, batch)
        expected = gradients if expected is None else expected
        costs.append(Cost(name, batch_size, saved, peak, _difference(gradients, expected), [], []))
        _say(f"b = {batch_size}, {name}: {peak / 1e6:.1f} MB")
    end = time.perf_counter() + seconds
    for repeat in range(repeats):
        for turn in range(len(costs)):
            cost = costs[(turn + repeat) % len(costs)]
            cost.seconds.append(_seconds(steps[cost.name], batch))
        for cost in costs:
            cost.ratios.append(cost.seconds[-1] / costs[0].seconds[-1])
        _say(f"b = {batch_size}: " + ", ".join(f"{cost.seconds[-1]:.2f} s ({cost.ratios[-1]:.2f})" for cost in costs))
        if time.perf_counter() > end:
            break
    return costs


def table(costs: Sequence[Cost]) -> str:
    """Returns the costs as Markdown, each batch size against its naive step."""
    naive = {cost.batch_size: cost.peak for cost in reversed(costs)}  # the first of each batch size
    lines = [
        "| b | step | s | time / naive, median (spread) | waiting for backward, MB | all tensors, MB | memory / naive "
        "| gradients differ by |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for cost in costs:
        saved = f"{cost.saved / 1e6:.1f}" if cost.saved else ""
        lines.append(
            f"| {cost.batch_size} | {cost.name} | {statistics.median(cost.seconds):.2f} | {_spread(cost.ratios)} "
            f"| {saved} | {cost.peak / 1e6:.1f} | 1/{naive[cost.batch_size] / cost.peak:.1f} | {cost.difference:.0e} |"
        )
    return "\n".join(lines)


def _watch(subject: Subject, step: Step, batch: PairBatch) -> tuple[Sequence[Tensor], int, int]:
    """Returns the gradients of one step, the peak of what it saved, and of all that it made.

    Checkpointing saves by hooks of its own, beneath which `SavedMemory` would see next to nothing.
    """
    saved = SavedMemory([*subject.denoiser.parameters(), *subject.denoiser.buffers(), *subject.tokens])
    with PeakMemory() as made, nullcontext() if subject.checkpointing else saved:
        gradients = step(batch)
    return gradients, saved.peak, made.peak


def _seconds(step: Step, batch: PairBatch) -> float:
    """Times a step: on a CPU the processor time of all threads, which other processes disturb least."""
    if not batch.target.is_cuda:
        start = time.process_time()
        step(batch)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(batch)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _difference(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    largest = max(e.abs().max() for e in expected)
    return float(max((g - e).abs().max() for g, e in zip(gradients, expected, strict=True)) / largest)


def _sd3_medium(given: argparse.Namespace) -> None:
    """Grows b until memory runs out: SD3-medium's shape, 512 px, random weights in bfloat16."""
    shape = Shape(
        layers=given.layers,
        heads=24,
        latents=64,
        text_tokens=333,
        text_dim=4096,
        pooled_dim=2048,
        device=given.device,
        dtype=torch.bfloat16,
    )
    on_gpu = shape.device.startswith("cuda")
    if on_gpu:
        share = GPU_GB * 1e9 / torch.cuda.get_device_properties(shape.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), shape.device)
    print(f"SD3-medium with {shape.layers} of 24 layers on {shape.device}, at most {GPU_GB} GB on a GPU\n")
    print("| step | checkpointing | b | peak memory, GB | s |\n| --- | --- | ---: | ---: | ---: |")
    for checkpointing in (False, True):
        subject = Subject(shape, checkpointing=checkpointing)
        for name in ("naive", "ours"):
            for batch_size in given.batches:
                cost = _cost_that_fits(subject, subject.steps()[name], batch_size, on_gpu=on_gpu)
                kind = f"| {name} | {'yes' if checkpointing else 'no'} | {batch_size} |"
                print(f"{kind} does not fit | |" if cost is None else f"{kind} {cost[0] / 1e9:.1f} | {cost[1]:.2f} |")
                if cost is None:
                    break
        del subject  # before the next one is made


def _cost_that_fits(subject: Subject, step: Step, batch_size: int, *, on_gpu: bool) -> tuple[int, float] | None:
    """Returns peak memory, on a GPU with the denoiser, and seconds of a step; None if memory runs out."""
    try:
        batch = subject.batch(batch_size)
        if not on_gpu:
            return _watch(subject, step, batch)[2], _seconds(step, batch)
        step(batch)
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_seconds(step, batch) for _ in range(3))
        return torch.cuda.max_memory_reserved(), seconds
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # only here are the tensors of the failed step let go
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What a contrastive step costs, against the naive one.")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32], help="batch sizes b, ascending")
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which every step is timed once")
    parser.add_argument("--seconds", type=float, default=150, help="no new round of a batch size begins after these")
    parser.add_argument("--sd3-medium", action="store_true", help="SD3-medium's shape instead, for a GPU")
    parser.add_argument("--layers", type=int, default=24, help="layers, with --sd3-medium")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where, with --sd3-medium")
    return parser


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _say(sentence: str) -> None:
    """Tells how far it is, beside the table."""
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
