"""The trainer: soft tokens learned by contrast on your own images, resumable at every step.

One step: load examples, noise each image once and pair it with the captions of the batch, let the engine run the
pairs, and update the tokens. Everything random is drawn from the seed and the number of the batch, so a run that was
killed and resumed ends bit-equal to one that was not. What happens around the steps are callbacks.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from ..adapter import Adapter, adapters_of
from ..checkpoint import save_checkpoint
from ..conditioning import conditioner_of
from ..config import SoftREPAConfig
from ..objectives import Objective
from ..pipeline import denoiser_of
from .arguments import ContrastiveFlowMatchingArguments
from .calibration import calibrate
from .callbacks import (
    Callbacks,
    FlowCallback,
    NonfiniteCallback,
    RescueCallback,
    StopCallback,
    TrainerControl,
    TrainerState,
)
from .card import Data, ReportCallback, claim_repository, data_name, push_report, write_report
from .checkpoints import Checkpoints
from .data.cache import TensorCache
from .data.dataset import Example, Examples
from .data.encode import Encoder
from .data.loader import PairLoader
from .estimate import Estimate, estimate_run
from .log import LogCallback, ProgressCallback
from .metrics import Recent, gains, joined_rows, standard_errors, summary, tell_apart
from .optimization import Schedule, make_average, make_optimizer
from .preflight import check_settings, open_checked, open_data
from .preparation import choose_adapter, keeping_weights, make_framing, prepared
from .state import RunState
from .step.collate import NEGATIVES, Draws, PairCollator, spread_timesteps
from .step.engine import PairEngine
from .validation import ValidationCallback

logger = logging.getLogger(__name__)

_FP16_LOSS_SCALE = 2.0**14

ComputeMetrics = Callable[[Mapping[str, Tensor]], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: Optimizer steps done.
        finished: False when it was asked to stop before its last step and is to go on another time.
        metrics: The last logged ones.
    """

    step: int
    finished: bool
    metrics: dict[str, float]


class ContrastiveFlowMatchingTrainer:
    """Trains the soft tokens of a pipeline by contrast; everything else of the pipeline stays frozen.

    Attributes:
        state: Where the run is; callbacks get it.
        warnings: What was said of the run; the model card tells it too.
        parameters: The tokens in training.
        loader: The training batches.
        engine: Runs the pairs.
        data_collator: Makes pairs of loaded examples.
        optimizer: Of the tokens.
        lr_scheduler: Their learning rate over steps.

    Args:
        pipeline: A text-to-image pipeline, loaded whole. Training moves it to its device and, in mixed precision, its
            models to half precision; when it has finished, the pipeline samples with the tokens that were saved.
        args: The settings.
        train_dataset: Images with captions, in any form that `open_examples` takes.
        eval_dataset: Held-out ones; with them the best adapter, by `metric_for_best_model`, is kept in
            `output_dir/best`.
        adapter_config: What to train; the family's published settings unless given. An active adapter that requires
            gradients (`add_softrepa`, or `load_softrepa(..., is_trainable=True)`) is trained on where neither this
            nor a name is given.
        adapter_name: The adapter to train, or the name of the new one.
        validation_metrics: Metrics of single pictures that score the validation pictures, as `evaluate` takes them.
        compute_metrics: Further figures of an evaluation. It gets those of every held-out image, (n,) each: `top1`,
            `margin`, `information` (NaN for images without a negative) and `timestep`.
        callbacks: Yours, called after the trainer's own; see `callbacks`.
        optimizers: Optimizer of the tokens and schedule of its rate, None for those of the settings.

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
        compute_metrics: ComputeMetrics | None = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Optimizer | None, Any] = (None, None),
    ) -> None:
        self.pipeline, self.args, self.compute_metrics = pipeline, args, compute_metrics
        check_settings(args)
        validation = ValidationCallback(validation_metrics)
        self.accelerator = Accelerator(log_with=args.report_to or None, project_dir=args.output_dir)
        self.conditioner = conditioner_of(pipeline, max_sequence_length=args.max_sequence_length)
        if args.gradient_checkpointing:
            self.conditioner.check_checkpointing()
        self.objective: Objective = args.make_objective(self.conditioner.noising.prediction)
        self.chosen: Objective | None = None
        self.framing = make_framing(args, self.conditioner)
        self.train_examples = open_checked(args, train_dataset)
        self._data = Data(self.train_examples.count, data_name(train_dataset), data_name(eval_dataset))
        self.eval_examples = None if eval_dataset is None else open_data(args, eval_dataset)
        if self.eval_examples is not None:
            self._make_loader(self.eval_examples, shuffle=False)  # too few of them show now, not after hours
        self.encoder = Encoder(args, self.conditioner, self.framing, self.accelerator.device)
        self.loader = self._make_loader(self.train_examples, latents=self.encoder.latents)
        self.adapter_name = choose_adapter(
            pipeline, args, adapter_config, adapter_name, num_banks=self.objective.num_banks
        )
        adapters = adapters_of(denoiser_of(pipeline))
        assert adapters is not None
        self.adapters = adapters
        self.parameters = list(self.adapter.tokens.parameters())
        self.engine = PairEngine(
            keeping_weights(self.conditioner.denoiser, self.conditioner.predict),
            self.objective,
            self.parameters,
            use_bank=adapters.use_bank,
            ema=self.in_average,
            pair_chunk_size=args.pair_chunk_size,
            num_backward_negatives=args.num_backward_negatives,
            loss_scale=_FP16_LOSS_SCALE if args.mixed_precision == "fp16" else 1.0,
        )
        self.data_collator = PairCollator(args, self.encoder, self.conditioner.noising, self.accelerator)
        max_steps = self._count_steps()
        self.optimizer = optimizers[0] or make_optimizer(args, self.parameters)
        self.lr_scheduler = Schedule(args, self.optimizer, max_steps, given=optimizers[1])
        self.average = make_average(args, self.optimizer, self.parameters)
        self.checkpoints = Checkpoints(args.output_dir, args.checkpoints_total_limit)
        self.kept = RunState(self.checkpoints)
        self.state = TrainerState(
            max_steps=max_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.train_batch_size,
            num_train_epochs=args.num_train_epochs,
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        self.recent, self.nonfinite, self._began = Recent(), NonfiniteCallback(), 0.0
        self._last: dict[str, float] = {}
        self._evaluated: dict[str, Tensor] | None = None
        self.base_rows: dict[str, Tensor] | None = None
        self.warnings: list[str] = []
        self._logged: dict[str, float] = {}
        self._batches_per_epoch = None if self.train_examples.count is None else len(self.loader)
        self.first_row = self.accelerator.process_index * args.train_batch_size
        self._stop = StopCallback()
        own = (LogCallback(self.accelerator), ProgressCallback(), FlowCallback(), self._stop, RescueCallback())
        self.callbacks = Callbacks([*own, self.nonfinite, validation, ReportCallback(), *callbacks])
        self._given = {
            "trainer": self,
            "model": self.conditioner.denoiser,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "train_dataloader": self.loader,
        }

    @property
    def adapter(self) -> Adapter:
        """The adapter in training."""
        return self.adapters[self.adapter_name]

    @property
    def finished(self) -> bool:
        """Whether the run is over, or only stopped to go on another time."""
        ended = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        return ended and not self.control.should_pause

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainingResult:
        """Trains to the last step, or until it is asked to stop, which saves a checkpoint first.

        Args:
            resume_from_checkpoint: A checkpoint folder, or `latest` or True for the newest one in `output_dir`; that
                of the settings unless given.

        Raises:
            FloatingPointError: The loss was NaN or infinite for `max_nonfinite_steps` steps in a row.
            OSError: A checkpoint could not be written; the earlier ones are untouched.
            ValueError: The checkpoint to resume from is of other settings, or output_dir has later ones.
        """
        self._place_tokens()
        if self.args.dry_run:
            self.accelerator.print(self.estimate())
            return TrainingResult(0, False, {})
        main = self.accelerator.is_main_process
        if self.args.push_to_hub and main:
            claim_repository(self.args)
        with self.checkpoints.locked() if main else nullcontext():
            self.kept.resume(self, "latest" if resume_from_checkpoint is True else resume_from_checkpoint or None)
            self.kept.check_disk(self)
            self.control = TrainerControl()
            try:
                self._event("on_train_begin")
                with prepared(self.pipeline, self.args, self.accelerator.device):
                    self._run()
                self._event("on_train_end")
            except BaseException as error:
                self._event("on_exception", error=error)
                raise
        return TrainingResult(self.state.global_step, self.finished, self._logged)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Returns how well held-out captions are told apart: fixed images, noise and timesteps, so that runs compare.

        Args:
            eval_dataset: Images with captions; the trainer's held-out ones unless given.

        Raises:
            ValueError: There is no eval_dataset.
        """
        rows = []
        with self.in_average():
            for number, batch in zip(
                range(self.args.num_evaluation_batches), self.get_eval_dataloader(eval_dataset), strict=False
            ):
                total = self.accelerator.num_processes * len(batch)
                timestep = spread_timesteps(number, self.first_row, len(batch), total)
                pairs = self.data_collator(batch, Draws(self.args.validation_seed, number, self.first_row), timestep)
                rows.append(self.gathered(tell_apart(self.engine.errors(pairs), pairs)))
        joined = joined_rows(rows)
        self._evaluated = joined if eval_dataset is None else None
        further = self.compute_metrics(joined) if self.compute_metrics else {}
        return summary(rows) | standard_errors(joined) | dict(further)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PairLoader:
        """Returns the batches of held-out images, in their stored order; arguments and errors as `evaluate`."""
        examples = self.eval_examples if eval_dataset is None else open_data(self.args, eval_dataset)
        if examples is None:
            raise ValueError("evaluate needs an eval_dataset; give the trainer one")
        return self._make_loader(examples, shuffle=False)

    def log(self, logs: dict[str, float]) -> None:
        """Writes figures of the present step to `log.jsonl` and the trackers, by the callbacks of `on_log`."""
        self.state.log_history.append({"step": self.state.global_step, **logs})
        self._event("on_log", logs=logs)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Saves the trained adapter, its moving average if there is one, as `load_softrepa` reads it.

        Args:
            output_dir: The folder; `output_dir` of the settings unless given.
        """
        config = replace(self.adapter.config, num_banks=1, inference_mode=True)
        with self.in_average():
            tensors = dict(self.adapter.tokens.state_dict())
            if self.adapter.config.num_banks > 1:  # sampling reads the first bank alone
                tensors = {name: value[0] for name, value in tensors.items()}
            save_checkpoint(output_dir or self.args.output_dir, config, tensors)

    def write_report(self) -> None:
        """Writes settings, curves, pictures and the model card beside the adapter that `save_model` wrote."""
        captions = self.args.train_batch_size * self.accelerator.num_processes
        write_report(
            self.args,
            self._data,
            steps=self.state.global_step,
            num_captions=captions,
            objective=self.chosen,
            warnings=self.warnings,
        )

    def push_to_hub(self) -> str:
        """Pushes the adapter in `output_dir` with its card, curves and pictures; returns the URL of the commit.

        Raises:
            OSError: The Hub refused; the folder is untouched.
        """
        return push_report(self.args)

    def estimate(self) -> Estimate:
        """Returns what the run will do and take; runs one pair, changes no token and writes nothing."""
        with prepared(self.pipeline, self.args, self.accelerator.device):
            return estimate_run(
                self.args,
                self.conditioner,
                self.objective,
                self.parameters,
                self.train_examples,
                sizes=self.framing.sizes,
                steps=self.state.max_steps,
                batches_per_epoch=self._batches_per_epoch,
                num_processes=self.accelerator.num_processes,
                device=self.accelerator.device,
            )

    def in_average(self) -> AbstractContextManager[None]:
        """Puts the moving average in the tokens' place while it lasts, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def warn(self, text: str) -> None:
        """Warns of something about the run; it is said again at its end, and in the model card."""
        self.warnings.append(text)
        with tqdm.external_write_mode():  # not in the line of the progress bar
            logger.warning("%s", text)

    def save_last_step(self) -> Path | None:
        """Saves the run as it was after the last whole step.

        Returns:
            The checkpoint; None if it is there already, or the run has no whole step.
        """
        return self.kept.save(self)

    def choose(self, objective: Objective) -> None:
        """Trains another objective than that of the settings from now on."""
        self.objective = self.engine.objective = self.chosen = objective

    # Set-up.

    def _make_loader(
        self, examples: Examples, *, shuffle: bool = True, latents: TensorCache | None = None
    ) -> PairLoader:
        return PairLoader(
            examples,
            self.framing if shuffle else replace(self.framing, further_resolutions=()),
            batch_size=self.args.train_batch_size,
            seed=self.args.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            shuffle=shuffle,
            max_broken=self.args.max_broken,
            num_workers=self.args.dataloader_num_workers,
            latents=latents,
            empty_prompts=self.args.proportion_empty_prompts if shuffle else 0.0,
        )

    def _count_steps(self) -> int:
        if self.args.max_steps is not None:
            return self.args.max_steps
        return max(1, len(self.loader) * self.args.num_train_epochs // self.args.gradient_accumulation_steps)

    def _place_tokens(self) -> None:
        """Puts the tokens where training takes place, the same in every process.

        Raises:
            ValueError: They are not finite, so that nothing could be learned from them on.
        """
        if not all(parameter.isfinite().all() for parameter in self.parameters):
            raise ValueError(f"adapter {self.adapter_name!r} holds NaN or infinite tokens; train a fresh one")
        self.adapter.tokens.to(self.accelerator.device)
        for parameter in self.parameters:
            parameter.data.copy_(broadcast(parameter.data))
        if self.average is not None and self.state.global_step == 0:
            self.average = make_average(self.args, self.optimizer, self.parameters)

    # The loop.

    def _run(self) -> None:
        """Fills the caches and takes the steps that are left, or as many as there are until it is asked to stop."""
        self.encoder.fill(
            self.train_examples, self.accelerator, held_out=self.eval_examples, stop=lambda: self._stop.asked
        )
        self._stop.heed(self.control, self.accelerator)
        if self.control.should_training_stop:
            return
        if self.state.global_step == 0:
            calibrate(self)
        self._follow_control()
        for batches in self._steps():
            self._event("on_step_begin")
            self._train_step(batches)
            self._event("on_step_end")
            self._follow_control()
            if self.control.should_training_stop:
                return

    def _event(self, name: str, **given: Any) -> None:
        self.control = self.callbacks.call(name, self.args, self.state, self.control, **self._given, **given)

    def _follow_control(self) -> None:
        """Logs, evaluates and saves where callbacks asked for it; a run that stops is saved too."""
        if self.control.should_log:
            self.control.should_log = False
            token_norm = self.adapter.tokens.tokens.norm(dim=-1).mean().item()
            self._logged = self.recent.take() | self._last | {"token_norm": token_norm}
            self.log(self._logged)
        if self.control.should_evaluate:
            self.control.should_evaluate = False
            self._judge()
        if self.control.should_save or self.control.should_training_stop:
            self.control.should_save = False
            if self.accelerator.is_main_process:
                self.save_last_step()
            self.accelerator.wait_for_everyone()
            self._event("on_save")

    def _judge(self) -> None:
        """Evaluates held-out images, if there are some, and keeps the adapter if it is the best so far."""
        found = {} if self.eval_examples is None else self.evaluate()
        rows, self._evaluated = self._evaluated, None
        if self.state.global_step == 0:
            self.base_rows = rows
        elif rows and self.base_rows:
            found |= gains(rows, self.base_rows)
        if found:
            self.log({f"held_out/{name}": value for name, value in found.items()})
        self._event("on_evaluate", metrics={f"eval_{name}": value for name, value in found.items()})
        value, best = found.get(self.args.metric_for_best_model, math.nan), self.state.best_metric
        sign = 1 if self.args.greater_is_better else -1
        if self.state.global_step and math.isfinite(value) and (best is None or sign * value > sign * best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            if self.accelerator.is_main_process:
                self.save_model(Path(self.args.output_dir) / "best")

    def _steps(self) -> Iterator[list[list[Example]]]:
        """Yields the batches of each optimizer step, epoch after epoch."""
        group: list[list[Example]] = []
        self._began = time.perf_counter()
        while self.state.global_step < self.state.max_steps:
            self._event("on_epoch_begin")
            for batch in self.loader:
                group.append(batch)
                if len(group) == self.args.gradient_accumulation_steps:
                    yield group
                    group = []
                    self._began = time.perf_counter()
            self._event("on_epoch_end")

    def _train_step(self, batches: list[list[Example]]) -> None:
        """One optimizer step."""
        loss = torch.zeros((), device=self.accelerator.device)
        gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        rows, num_pairs, state = [], 0, self.state
        for number, batch in enumerate(batches):
            draws = Draws(self.args.seed, state.global_step * len(batches) + number, self.first_row)
            pairs = self.data_collator(batch, draws)
            done = self.engine.step(pairs, generator=draws.generators(1, NEGATIVES)[0])
            loss += done.loss / len(batches)
            for gradient, part in zip(gradients, done.gradients, strict=True):
                gradient += part / len(batches)
            rows.append(self.gathered(tell_apart(done.errors, pairs)))
            num_pairs += int((~done.errors.isnan()).sum()) * self.accelerator.num_processes
            self._event("on_substep_end", pairs=pairs, outcome=done)
        if self.accelerator.num_processes > 1:
            loss, *gradients = (self.accelerator.reduce(value, "mean") for value in (loss, *gradients))
        norm = torch.nn.utils.get_total_norm(gradients)
        self._last = {"gradient_norm": norm.item(), "learning_rate": self.lr_scheduler.rate}
        self._event("on_pre_optimizer_step", loss=loss.item(), gradient_norm=norm.item(), batches=batches)
        if self.control.should_skip_step:
            self.control.should_skip_step = False
        else:
            self._update(gradients, norm)
        state.global_step += 1
        self.kept.end_step(self)
        epoch, batches_per_epoch = self.loader.epoch, self._batches_per_epoch
        state.epoch = epoch if batches_per_epoch is None else epoch + self.loader.batches / batches_per_epoch
        self.recent.add(loss.item(), rows, seconds=time.perf_counter() - self._began, num_pairs=num_pairs)

    def _update(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Updates the tokens by gradients of this norm."""
        self.kept.begin_update()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.args.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.args.max_grad_norm, norm)
        self.optimizer.step()
        self._event("on_optimizer_step")
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.update()

    def gathered(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns per-row figures of all processes."""
        if self.accelerator.num_processes == 1:
            return rows
        gathered = self.accelerator.gather(torch.stack(list(rows.values()), dim=1))  # (rows, figures)
        return dict(zip(rows, gathered.unbind(1), strict=True))
