"""The trainer: soft tokens learned by contrast on your own images, resumable at every step.

One step: load images and captions, encode them, noise each image once, let the engine run the pairs, and update the
tokens. Everything random is drawn from the seed and the number of the batch, so a run that was killed and resumed
ends bit-equal to one that was not.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from ..adapter import Adapter, Adapters, adapters_of
from ..checkpoint import load_checkpoint, save_checkpoint
from ..conditioning import conditioner_of
from ..config import SoftREPAConfig
from ..hub import check_login
from ..pipeline import denoiser_of
from .arguments import ContrastiveFlowMatchingArguments
from .batches import Draws, draw_noise, draw_timesteps, meet_captions, pair_batch, spread_timesteps
from .cache import TensorCache
from .checkpoints import Checkpoints, load_state
from .data import Examples, open_examples
from .engine import PairBatch, PairEngine
from .forecast import Forecast, forecast
from .inputs import Caches, Inputs
from .journal import Journal, Recent
from .loader import Batch, PairLoader
from .nonfinite import NonfiniteSteps
from .optimization import MovingAverage, Schedule, make_optimizer
from .preparation import choose_adapter, halve_vae, make_framing, prepared
from .report import Data, data_name, push_report, write_report
from .stopping import StopRequest
from .validation import (
    draw_side_by_side,
    image_metrics,
    save_picture,
    score_side_by_side,
    side_by_side_grid,
    summary,
    tell_apart,
    warn_if_saturated,
)

logger = logging.getLogger(__name__)

_FP16_LOSS_SCALE = 2.0**14


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: Optimizer steps done.
        finished: False when it was asked to stop (SIGTERM) before its last step.
        metrics: The last logged ones.
    """

    step: int
    finished: bool
    metrics: dict[str, float]


class ContrastiveFlowMatchingTrainer:
    """Trains the soft tokens of a pipeline by contrast; everything else of the pipeline stays frozen.

    Args:
        pipeline: A text-to-image pipeline, loaded whole. Training moves it to its device and, in mixed precision, its
            models to half precision; when it has finished, the pipeline samples with the tokens that were saved.
        args: The settings.
        train_dataset: Images with captions, in any form that `open_examples` takes.
        eval_dataset: Held-out ones; with them the best adapter, by top-1, is kept in `output_dir/best`.
        adapter_config: What to train; the family's published settings unless given. An active adapter that requires
            gradients (`add_softrepa`, or `load_softrepa(..., is_trainable=True)`) is trained on where neither this
            nor a name is given.
        adapter_name: The adapter to train, or the name of the new one.
        validation_metrics: Metrics of single pictures that score the validation pictures, as `evaluate` takes them.

    Raises:
        ValueError: The data, the settings and the pipeline do not fit together; nothing has been trained by then.
    """

    def __init__(
        self,
        pipeline: Any,
        args: ContrastiveFlowMatchingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        adapter_config: SoftREPAConfig | None = None,
        adapter_name: str | None = None,
        validation_metrics: Sequence[Any] = (),
    ) -> None:
        self.pipeline, self.args = pipeline, args
        self._validation_metrics = image_metrics(validation_metrics)
        tracker = None if args.report_to == "none" else args.report_to
        self.accelerator = Accelerator(log_with=tracker, project_dir=args.output_dir)
        self.conditioner = conditioner_of(pipeline, max_sequence_length=args.max_sequence_length)
        if args.gradient_checkpointing:
            self.conditioner.check_checkpointing()
        self.objective = args.make_objective(self.conditioner.noising.prediction)
        self.framing = make_framing(args, self.conditioner)
        self._train_examples = self._open(train_dataset)
        self._data = Data(self._train_examples.count, data_name(train_dataset), data_name(eval_dataset))
        self._held_out_examples = None if eval_dataset is None else self._open(eval_dataset)
        if self._held_out_examples is not None:
            self._make_loader(self._held_out_examples, shuffle=False)  # too few of them show now, not after hours
        self._caches = Caches.open(args, self.conditioner, self.framing)
        self.loader = self._make_loader(self._train_examples, latents=self._caches.latents)
        self.max_steps = self._count_steps()
        self.adapter_name = choose_adapter(
            pipeline, args, adapter_config, adapter_name, num_banks=self.objective.num_banks
        )
        self.engine = PairEngine(
            self.conditioner.predict,
            self.objective,
            self.parameters,
            use_bank=self._adapters.use_bank,
            ema=self._in_average,
            pair_chunk_size=args.pair_chunk_size,
            num_backward_negatives=args.num_backward_negatives,
            loss_scale=_FP16_LOSS_SCALE if args.mixed_precision == "fp16" else 1.0,
        )
        self.optimizer = make_optimizer(args, self.parameters)
        self.schedule = Schedule(args, self.optimizer, self.max_steps)
        self.average = MovingAverage(self.parameters, args.ema_decay) if args.ema_decay else None
        self.inputs = Inputs(self.conditioner, self.accelerator.device, self._caches.text)
        self.checkpoints = Checkpoints(args.output_dir, args.checkpoints_total_limit)
        self.journal = Journal(self.accelerator, args.output_dir, args.to_dict())
        self.step, self.best = 0, -math.inf
        self._recent, self._stop_request = Recent(), StopRequest()
        self._nonfinite = NonfiniteSteps(args.output_dir, args.max_nonfinite_steps, self.accelerator.process_index)
        self._step_began = 0.0

    @property
    def adapter(self) -> Adapter:
        """The adapter in training."""
        return self._adapters[self.adapter_name]

    @property
    def parameters(self) -> list[Parameter]:
        """Its tokens."""
        return list(self.adapter.tokens.parameters())

    def train(self) -> TrainingResult:
        """Trains to the last step, or until SIGTERM, which saves a checkpoint first.

        Raises:
            FloatingPointError: The loss was NaN or infinite for `max_nonfinite_steps` steps in a row.
            OSError: A checkpoint could not be written; the earlier ones are untouched.
            ValueError: The checkpoint to resume from is of other settings, or output_dir has later ones.
        """
        if self.args.push_to_hub and not self.args.dry_run and self.accelerator.is_main_process:
            check_login(self.args.hub_token)
        self._place_tokens()
        if self.args.dry_run:
            self.accelerator.print(self.forecast())
            return TrainingResult(0, False, {})
        self._resume()
        self.journal.open(self.step)
        with self._stop_request, prepared(self.pipeline, self.args, self.accelerator.device):
            self._caches.fill(self.args, self.conditioner, self._train_examples, self.framing, self.accelerator)
            metrics = self._train_on()
        finished = self.step >= self.max_steps
        if finished:
            halve_vae(self.pipeline)
            if self.average is not None:
                self.average.settle()
            if self.accelerator.is_main_process:
                self.save_model()
                self.write_report()
        self.journal.close()
        if finished and self.args.push_to_hub and self.accelerator.is_main_process:
            self.push_to_hub()
        return TrainingResult(self.step, finished, metrics)

    def evaluate(self) -> dict[str, float]:
        """Returns how well held-out captions are told apart: fixed images, noise and timesteps, so that runs compare.

        Raises:
            ValueError: There is no eval_dataset.
        """
        if self._held_out_examples is None:
            raise ValueError("evaluate needs an eval_dataset; give the trainer one")
        loader = self._make_loader(self._held_out_examples, shuffle=False)
        rows = []
        with self._in_average():
            for number, batch in zip(range(self.args.num_evaluation_batches), loader, strict=False):
                total = self.accelerator.num_processes * len(batch)
                timestep = spread_timesteps(number, self._first_row, len(batch), total)
                pairs = self._pairs(batch, Draws(self.args.validation_seed, number, self._first_row), timestep)
                rows.append(self._gathered(tell_apart(self.engine.errors(pairs), pairs)))
        return summary(rows)

    def save_model(self, directory: str | Path | None = None) -> None:
        """Saves the trained adapter, its moving average if there is one, as `load_softrepa` reads it.

        Args:
            directory: The folder; `output_dir` unless given.
        """
        config = replace(self.adapter.config, num_banks=1, inference_mode=True)
        with self._in_average():
            tensors = dict(self.adapter.tokens.state_dict())
            if self.adapter.config.num_banks > 1:  # sampling reads the first bank alone
                tensors = {name: value[0] for name, value in tensors.items()}
            save_checkpoint(directory or self.args.output_dir, config, tensors)

    def write_report(self) -> None:
        """Writes settings, curves, pictures and the model card beside the adapter that `save_model` wrote."""
        captions = self.args.train_batch_size * self.accelerator.num_processes
        write_report(self.args, self._data, steps=self.step, num_captions=captions)

    def push_to_hub(self) -> str:
        """Pushes the adapter in `output_dir` with its card, curves and pictures; returns the URL of the commit.

        Raises:
            OSError: The Hub refused; the folder is untouched.
        """
        return push_report(self.args)

    def forecast(self) -> Forecast:
        """Returns what the run will do and take; runs one pair, changes no token and writes nothing."""
        with prepared(self.pipeline, self.args, self.accelerator.device):
            return forecast(
                self.args,
                self.conditioner,
                self.objective,
                self.parameters,
                self._train_examples,
                sizes=self.framing.sizes,
                steps=self.max_steps,
                batches_per_epoch=None if self._train_examples.count is None else len(self.loader),
                num_processes=self.accelerator.num_processes,
                device=self.accelerator.device,
            )

    # Set-up.

    def _open(self, dataset: Any) -> Examples:
        return open_examples(
            dataset,
            image_column=self.args.image_column,
            caption_column=self.args.caption_column,
            negative_caption_column=self.args.negative_caption_column,
        )

    def _make_loader(
        self, examples: Examples, *, shuffle: bool = True, latents: TensorCache | None = None
    ) -> PairLoader:
        return PairLoader(
            examples,
            self.framing,
            batch_size=self.args.train_batch_size,
            seed=self.args.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            shuffle=shuffle,
            max_broken=self.args.max_broken,
            num_workers=self.args.dataloader_num_workers,
            latents=latents,
        )

    def _count_steps(self) -> int:
        if self.args.max_steps is not None:
            return self.args.max_steps
        if self._train_examples.count is None:
            raise ValueError("a stream does not tell its length; give max_steps instead of num_train_epochs")
        return max(1, len(self.loader) * self.args.num_train_epochs // self.args.gradient_accumulation_steps)

    @property
    def _adapters(self) -> Adapters:
        adapters = adapters_of(denoiser_of(self.pipeline))
        assert adapters is not None
        return adapters

    def _place_tokens(self) -> None:
        """Puts the tokens where training takes place, the same in every process."""
        self.adapter.tokens.to(self.accelerator.device)
        for parameter in self.parameters:
            parameter.data.copy_(broadcast(parameter.data))
        if self.average is not None and self.step == 0:
            self.average = MovingAverage(self.parameters, self.args.ema_decay or 0.0)

    # A step.

    def _train_on(self) -> dict[str, float]:
        """Trains from where it stands until the last step, or until it is asked to stop; returns the last metrics."""
        metrics: dict[str, float] = {}
        with self._progress_bar() as progress:
            if self.step == 0:
                self._validate()
            for batches in self._steps():
                metrics = self._train_step(batches) or metrics
                progress.update()
                progress.set_postfix({name: f"{metrics[name]:.3g}" for name in _SHOWN if name in metrics})
                ends = self.step >= self.max_steps or self._must_stop()
                if self.step >= self.max_steps or self.step % self.args.validation_steps == 0:
                    self._validate()
                if ends or self.step % self.args.save_steps == 0:
                    self._save_checkpoint()
                if ends:
                    break
        return metrics

    @property
    def _first_row(self) -> int:
        """Where this process's rows begin in the global batch."""
        return self.accelerator.process_index * self.args.train_batch_size

    def _steps(self) -> Iterator[list[Batch]]:
        """Yields the batches of each optimizer step, epoch after epoch."""
        group: list[Batch] = []
        self._step_began = time.perf_counter()
        while self.step < self.max_steps:
            for batch in self.loader:
                group.append(batch)
                if len(group) == self.args.gradient_accumulation_steps:
                    yield group
                    group = []
                    self._step_began = time.perf_counter()

    def _pairs(self, batch: Batch, draws: Draws, timestep: Tensor | None = None) -> PairBatch:
        """Returns a batch noised and paired; timesteps (b,) are drawn unless given."""
        latents = self.inputs.latents(batch, draws)
        written = [text for row in batch.negative_captions for text in row]
        conditions = self.inputs.conditions([*batch.captions, *written])
        captions = meet_captions(
            self.accelerator, batch.captions, batch.negative_captions, batch.image_ids, conditions
        )
        noise = draw_noise(draws, latents.shape, share=self.args.share_noise)
        timestep = draw_timesteps(draws, len(batch), self.args) if timestep is None else timestep
        return pair_batch(latents, noise, timestep, self.conditioner.noising, captions)

    def _train_step(self, batches: list[Batch]) -> dict[str, float] | None:
        """One optimizer step; returns the metrics since they were logged last, where they are logged."""
        loss = torch.zeros((), device=self.accelerator.device)
        gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        rows, num_pairs = [], 0
        for number, batch in enumerate(batches):
            draws = Draws(self.args.seed, self.step * len(batches) + number, self._first_row)
            pairs = self._pairs(batch, draws)
            done = self.engine.step(pairs, generator=draws.generator(0, purpose=3))
            loss += done.loss / len(batches)
            for gradient, part in zip(gradients, done.gradients, strict=True):
                gradient += part / len(batches)
            rows.append(self._gathered(tell_apart(done.errors, pairs)))
            num_pairs += int((~done.errors.isnan()).sum()) * self.accelerator.num_processes
            if self.step == number == 0:
                warn_if_saturated(self.objective, done.errors, pairs)
        if self.accelerator.num_processes > 1:
            loss, *gradients = (self.accelerator.reduce(value, "mean") for value in (loss, *gradients))
        rate = self.schedule.rate
        norm = self._update(loss.item(), gradients, batches)
        self.step += 1
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        seconds = time.perf_counter() - self._step_began
        self._recent.add(loss.item(), joined, seconds=seconds, num_pairs=num_pairs)
        if self.step % self.args.logging_steps and self.step != self.max_steps:
            return None
        figures, rows = self._recent.take()
        token_norm = self.adapter.tokens.tokens.norm(dim=-1).mean().item()
        metrics = figures | summary(rows)
        metrics |= {"gradient_norm": norm, "learning_rate": rate, "token_norm": token_norm}
        self.journal.write(self.step, metrics)
        return metrics

    def _update(self, loss: float, gradients: list[Tensor], batches: list[Batch]) -> float:
        """Updates the tokens, unless the loss or the gradient is not finite; returns the norm of the gradient."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if not (math.isfinite(loss) and norm.isfinite()):
            if math.isfinite(loss) and self.engine.loss_scale > 1:
                self.engine.loss_scale /= 2  # half-precision gradients overflowed
            else:
                self._nonfinite.skip(self.step, loss, norm.item(), batches)
            return norm.item()
        self._nonfinite.in_a_row = 0
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.args.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.args.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update()
        return norm.item()

    def _gathered(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns per-row figures of all processes."""
        if self.accelerator.num_processes == 1:
            return rows
        gathered = self.accelerator.gather(torch.stack(list(rows.values()), dim=1))  # (rows, figures)
        return dict(zip(rows, gathered.unbind(1), strict=True))

    def _in_average(self) -> AbstractContextManager[None]:
        """Puts the moving average in the tokens' place while it lasts, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    # Checkpoints and stops.

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            tokens = dict(self.adapter.tokens.state_dict())
            self.checkpoints.save(self.step, self.adapter.config, tokens, self._state())
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self.args.to_dict(),
            "step": self.step,
            "best": self.best,
            "nonfinite_steps": self._nonfinite.in_a_row,
            "recent": self._recent.state_dict(),
            "loss_scale": self.engine.loss_scale,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.values,
            "data": self.loader.state_dict(),
        }

    def _resume(self) -> None:
        """Goes back to the checkpoint that the settings name, if any."""
        wanted = self.args.resume_from_checkpoint
        checkpoint = None if wanted is None or self.step else self.checkpoints.find(wanted)
        if checkpoint is not None:
            self._go_to(checkpoint)
        elif wanted is not None and not self.step:
            logger.info("%s has no checkpoint yet: training starts from the beginning", self.args.output_dir)
        self.checkpoints.check_none_after(self.step)

    def _go_to(self, checkpoint: Path) -> None:
        state = load_state(checkpoint, self.args.to_dict())
        self.loader.load_state_dict(state["data"])
        self._adapters.swap(self.adapter_name, *load_checkpoint(checkpoint))
        self.step, self.best = state["step"], state["best"]
        self._nonfinite.in_a_row, self.engine.loss_scale = state["nonfinite_steps"], state["loss_scale"]
        self._recent.load_state_dict(state["recent"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.values = [value.to(self.accelerator.device) for value in state["average"]]
        logger.info("resumed from %s", checkpoint)

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop."""
        made = torch.tensor([int(self._stop_request.made)], device=self.accelerator.device)
        return bool(self.accelerator.gather(made).any())

    def _progress_bar(self) -> Any:
        return tqdm(
            total=self.max_steps,
            initial=self.step,
            desc="soft tokens",
            disable=not self.accelerator.is_main_process,
            file=sys.stderr,
        )

    # Judging the run.

    def _validate(self) -> None:
        """Draws the validation prompts, evaluates held-out pairs, and keeps the adapter if it is the best so far."""
        if self.accelerator.is_main_process and self.args.validation_prompts:
            self._draw_validation()
        if self._held_out_examples is None:
            return
        found = self.evaluate()
        self.journal.write(self.step, {f"held_out/{name}": value for name, value in found.items()})
        if found.get("top1", -math.inf) > self.best:
            self.best = found["top1"]
            if self.accelerator.is_main_process:
                self.save_model(Path(self.args.output_dir) / "best")

    def _draw_validation(self) -> None:
        prompts = self.args.validation_prompts
        with self._in_average(), torch.no_grad():
            pictures = draw_side_by_side(
                self.pipeline,
                prompts,
                seed=self.args.validation_seed,
                num_inference_steps=self.args.num_validation_inference_steps,
                settings=self.conditioner.sampling(self.args.validation_guidance_scale),
                size=self.framing.sizes[len(self.framing.sizes) // 2],
            )
        grid = side_by_side_grid(pictures, prompts)
        save_picture(grid, Path(self.args.output_dir) / "validation" / f"step-{self.step:06d}.png")
        self.journal.show(self.step, "validation", grid)
        figures = score_side_by_side(self._validation_metrics, pictures, prompts, self.accelerator.device)
        if figures:
            self.journal.write(self.step, figures)


_SHOWN = ("loss", "top1", "pairs_per_second")
