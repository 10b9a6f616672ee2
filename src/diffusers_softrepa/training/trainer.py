"""The trainer: learns soft tokens by contrast on your own images, and can be resumed at every step.

A step loads examples, noises each image once, pairs it with the captions of the batch, runs the pairs through the
engine, and updates the tokens. All random numbers are drawn from the seed and the number of the batch, so a run that
was killed and resumed ends bit-equal to one that was not. Logging, checkpoints, validation and so on are callbacks.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
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
from ..quoting import quoted
from .arguments import ContrastiveFlowMatchingArguments
from .calibration import calibrate
from .callbacks import (
    Callbacks,
    FlowCallback,
    NonfiniteCallback,
    ProgressCallback,
    RescueCallback,
    StopCallback,
    TrainerControl,
    TrainerState,
)
from .card import Report, ReportCallback, claim_repository, data_name, push_report
from .checkpoints import BEST_FOLDER, Checkpoints
from .data.cache import TensorCache
from .data.dataset import Example, Examples
from .data.encode import Encoder
from .data.loader import PairLoader
from .estimate import Estimate, estimate_run
from .log import LogCallback
from .metrics import Recent, figures, gains, joined, means, retrieval_metrics, standard_errors
from .optimization import Schedule, make_average, make_optimizer
from .preflight import check_parts, check_settings, open_data, open_training_data
from .preparation import choose_adapter, make_framing, prepared
from .state import RunState
from .step.collate import NEGATIVES, Draws, PairCollator, spread_timesteps
from .step.engine import PairEngine
from .validation import ValidationCallback

logger = logging.getLogger(__name__)

_FP16_LOSS_SCALE = 2.0**14

ComputeMetrics = Callable[[Mapping[str, Tensor]], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of `train`.

    Attributes:
        step: Number of optimizer steps done.
        finished: False where the run was stopped by a signal and can be resumed.
        metrics: The last logged values of training.
    """

    step: int
    finished: bool
    metrics: dict[str, float]


class ContrastiveFlowMatchingTrainer:
    """Trains the soft tokens of a text-to-image pipeline by contrast; all other weights stay frozen.

    Attributes:
        state: The `TrainerState` that callbacks get.
        warnings: Warnings of the run, which the model card repeats.
        model: The denoiser.
        parameters: The soft tokens in training.
        loader: The training batches.
        engine: The `PairEngine` that computes loss and gradients.
        data_collator: Turns loaded examples into a `PairBatch`.
        optimizer: The optimizer of the tokens.
        lr_scheduler: The schedule of their learning rate.

    Args:
        pipeline: A text-to-image pipeline. Training moves it to the device and, in mixed precision, casts its models;
            when training has finished, it samples with the trained tokens.
        args: The settings.
        train_dataset: Images with captions in any form that `open_examples` takes, such as the path of a folder.
        eval_dataset: Images with captions to evaluate on, in the same forms; defaults to None. With it, the best
            adapter by `metric_for_best_model` is kept in `output_dir/best`.
        adapter_config: Shape of a new adapter; defaults to the published shape of the family. An active adapter that
            requires gradients (from `add_softrepa`, or `load_softrepa(..., is_trainable=True)`) is trained further
            where neither this nor `adapter_name` is given.
        adapter_name: Name of the new adapter, or of an existing one to train further.
        validation_metrics: Metrics that score the validation images, in the forms that `evaluate` takes.
        compute_metrics: Function that returns further metrics of an evaluation. It gets a dict of tensors (n,) with
            `top1`, `margin`, `information` (NaN for images without a negative) and `timestep` of each image.
        callbacks: Callbacks that are called after the trainer's own; see `callbacks`.
        optimizers: Optimizer of the tokens and schedule of the learning rate; None for those of the settings.

    Raises:
        ValueError: The data, the settings and the pipeline do not fit together.
    """

    @torch.inference_mode(False)  # whatever mode the process is in
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
        check_parts(callbacks, optimizers)
        validation = ValidationCallback(validation_metrics)
        self.accelerator = Accelerator(log_with=args.report_to or None, project_dir=args.output_dir)
        self.conditioner = conditioner_of(pipeline, max_sequence_length=args.max_sequence_length)
        if args.gradient_checkpointing:
            self.conditioner.check_checkpointing()
        self.objective: Objective = args.make_objective(self.conditioner.noising.prediction)
        self.chosen: Objective | None = None
        self._open(train_dataset, eval_dataset)
        self._make_engine(adapter_config, adapter_name)
        self.state = self._make_state()
        self.optimizer = optimizers[0] or make_optimizer(args, self.parameters)
        self.lr_scheduler = Schedule(args, self.optimizer, self.state.max_steps, given=optimizers[1])
        self.average = make_average(args, self.optimizer, self.parameters)
        self.checkpoints = Checkpoints(args.output_dir, args.checkpoints_total_limit)
        self.kept, self.recent, self._began = RunState(self.checkpoints), Recent(), 0.0
        self.warnings: list[str] = []
        self.base_metrics: dict[str, Tensor] | None = None
        self._logged: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._evaluated: dict[str, Tensor] | None = None
        self.control, self.nonfinite, self._stop = TrainerControl(), NonfiniteCallback(), StopCallback()
        own = (LogCallback(self.accelerator), ProgressCallback(), FlowCallback(), self._stop, RescueCallback())
        self.callbacks = Callbacks([*own, self.nonfinite, validation, ReportCallback(), *callbacks])

    def _open(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Opens the data and makes what loads, encodes and collates them."""
        args = self.args
        self.framing = make_framing(args, self.conditioner)
        self.train_examples = open_training_data(args, train_dataset)
        self._data_names = data_name(train_dataset), data_name(eval_dataset)
        self.eval_examples = None if eval_dataset is None else open_data(args, eval_dataset)
        if self.eval_examples is not None:
            self._make_loader(self.eval_examples, shuffle=False)  # raises now if they do not fill a batch
        self.encoder = Encoder(args, self.conditioner, self.framing, self.accelerator.device)
        self.loader = self._make_loader(self.train_examples, latents=self.encoder.latents)
        self.batches_per_epoch = None if self.train_examples.count is None else len(self.loader)
        self.first_row = self.accelerator.process_index * args.train_batch_size
        self.data_collator = PairCollator(args, self.encoder, self.conditioner.noising, self.accelerator)

    def _make_engine(self, config: SoftREPAConfig | None, name: str | None) -> None:
        """Chooses or adds the adapter to train, and makes the engine that computes its gradients."""
        args, num_banks = self.args, self.objective.num_banks
        self.adapter_name = choose_adapter(self.pipeline, args, config, name, num_banks=num_banks)
        self.model = denoiser_of(self.pipeline)
        adapters = adapters_of(self.model)
        assert adapters is not None
        self.adapters = adapters
        self.parameters = list(self.adapter.tokens.parameters())
        self.engine = PairEngine(
            self.conditioner.predict,
            self.objective,
            self.parameters,
            use_bank=adapters.use_bank,
            ema=self.in_average,
            pair_chunk_size=args.pair_chunk_size,
            num_backward_negatives=args.num_backward_negatives,
            loss_scale=_FP16_LOSS_SCALE if args.mixed_precision == "fp16" else 1.0,
        )

    def _make_state(self) -> TrainerState:
        args, max_steps = self.args, self.args.max_steps
        if max_steps is None:
            max_steps = max(1, len(self.loader) * args.num_train_epochs // args.gradient_accumulation_steps)
        return TrainerState(
            max_steps=max_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.train_batch_size,
            num_train_epochs=args.num_train_epochs,
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )

    @property
    def adapter(self) -> Adapter:
        """The adapter in training."""
        return self.adapters[self.adapter_name]

    @property
    def finished(self) -> bool:
        """Whether the run is over; False where it was stopped to be resumed."""
        ended = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        return ended and not self.control.should_pause

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train(self, resume_from_checkpoint: str | PathLike[str] | bool | None = None) -> TrainingResult:
        """Trains to the last step, or until a signal stops the run, which saves a checkpoint first.

        Args:
            resume_from_checkpoint: A checkpoint folder, or `"latest"` or True for the newest one in `output_dir`;
                defaults to None, which takes the one of the settings.

        Raises:
            FloatingPointError: The loss was NaN or infinite for `max_nonfinite_steps` steps in a row.
            OSError: A checkpoint could not be written; the earlier ones are untouched.
            ValueError: The checkpoint was saved under other settings, or `output_dir` has later ones.
        """
        wanted = "latest" if resume_from_checkpoint is True else resume_from_checkpoint or None
        if not isinstance(wanted, str | PathLike | None):
            raise TypeError(
                f"resume_from_checkpoint must be a folder, 'latest', True or None, but is {quoted(wanted)}"
            )
        self._place_tokens()
        if self.args.dry_run:
            self.accelerator.print(self.estimate())
            return TrainingResult(0, False, {})
        main = self.accelerator.is_main_process
        if self.args.push_to_hub and main:
            claim_repository(self.args)
        with self.checkpoints.locked() if main else nullcontext(), self._stop.listening():
            self.kept.resume(self, None if wanted is None else str(wanted))
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
        """Returns how well captions are told apart, with the same images, noise and timesteps at every call.

        Args:
            eval_dataset: Images with captions; defaults to the trainer's `eval_dataset`.

        Raises:
            ValueError: There is no eval_dataset.
        """
        batches, rows = self.get_eval_dataloader(eval_dataset), []
        with self.in_average():
            for number, batch in zip(range(self.args.num_evaluation_batches), batches, strict=False):
                total = self.accelerator.num_processes * len(batch)
                timestep = spread_timesteps(number, self.first_row, len(batch), total)
                pairs = self.data_collator(batch, Draws(self.args.validation_seed, number, self.first_row), timestep)
                rows.append(self.gathered(retrieval_metrics(self.engine.errors(pairs), pairs)))
        found = joined(rows)
        self._evaluated = found if eval_dataset is None else None
        further = self.compute_metrics(found) if self.compute_metrics else {}
        return means(found) | standard_errors(found) | figures(further, "the result of compute_metrics")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PairLoader:
        """Returns the evaluation batches, in their stored order; arguments and errors as in `evaluate`."""
        examples = self.eval_examples if eval_dataset is None else open_data(self.args, eval_dataset)
        if examples is None:
            raise ValueError("evaluate needs an eval_dataset; give the trainer one")
        return self._make_loader(examples, shuffle=False)

    def log(self, logs: dict[str, float]) -> None:
        """Writes values of the present step to `log.jsonl` and the trackers, by the callbacks of `on_log`."""
        logs = figures(logs, "what is logged")
        self.state.log_history.append({"step": self.state.global_step, **logs})
        self._event("on_log", logs=logs)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Saves the trained adapter, or its moving average if there is one, for `load_softrepa`.

        Args:
            output_dir: The folder; defaults to `output_dir` of the settings.
        """
        config = replace(self.adapter.config, num_banks=1, inference_mode=True)
        with self.in_average():
            tensors = dict(self.adapter.tokens.state_dict())
            if self.adapter.config.num_banks > 1:  # sampling reads the first bank alone
                tensors = {name: value[0] for name, value in tensors.items()}
            save_checkpoint(output_dir or self.args.output_dir, config, tensors)

    def write_report(self) -> None:
        """Writes settings, curves, images and the model card beside the adapter that `save_model` wrote."""
        Report(
            self.args,
            self.state.global_step,
            self.args.train_batch_size * self.accelerator.num_processes,
            self.train_examples.count,
            *self._data_names,
            objective=self.chosen,
            warnings=self.warnings,
        ).write()

    def push_to_hub(self) -> str:
        """Pushes the adapter in `output_dir` with its card, curves and images; returns the URL of the commit.

        Raises:
            OSError: The Hub refused; the folder is untouched.
        """
        return push_report(self.args)

    def estimate(self) -> Estimate:
        """Returns the size of the run: runs one pair, changes no token and writes nothing."""
        with prepared(self.pipeline, self.args, self.accelerator.device):
            return estimate_run(self)

    def in_average(self) -> AbstractContextManager[None]:
        """Gives the tokens their moving average inside the block, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def warn(self, text: str) -> None:
        """Logs a warning that is repeated at the end of the run and in the model card."""
        self.warnings.append(text)
        with tqdm.external_write_mode():  # not in the line of the progress bar
            logger.warning("%s", text)

    def save_last_step(self) -> Path | None:
        """Saves the state after the last complete step; returns the checkpoint, None if there is nothing new."""
        return self.kept.save(self)

    def choose(self, objective: Objective) -> None:
        """Replaces the objective of the settings."""
        self.objective = self.engine.objective = self.chosen = objective

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

    def _place_tokens(self) -> None:
        """Moves the tokens to the device and gives every process the same values.

        Raises:
            ValueError: The tokens hold NaN or infinite values.
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
        """Fills the caches and takes the remaining steps, until the last one or a request to stop."""
        self.encoder.fill(
            self.loader, self.accelerator, eval_examples=self.eval_examples, stop=lambda: self._stop.asked
        )
        self._stop.stop_if_asked(self.control, self.accelerator)
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
        given |= {"trainer": self, "model": self.model, "optimizer": self.optimizer}
        given |= {"lr_scheduler": self.lr_scheduler, "train_dataloader": self.loader}
        self.control = self.callbacks.call(name, self.args, self.state, self.control, **given)

    def _follow_control(self) -> None:
        """Logs, evaluates and saves where the callbacks ask for it; a run that stops is saved too."""
        if self.control.should_log:
            self.control.should_log = False
            token_norm = self.adapter.tokens.tokens.norm(dim=-1).mean().item()
            self._logged = self.recent.means() | self._last | {"token_norm": token_norm}
            self.recent = Recent()
            self.log(self._logged)
        if self.control.should_evaluate:
            self.control.should_evaluate = False
            self._evaluate_and_keep_best()
        if self.control.should_save or self.control.should_training_stop:
            self.control.should_save = False
            if self.accelerator.is_main_process:
                self.save_last_step()
            self.accelerator.wait_for_everyone()
            self._event("on_save")

    def _evaluate_and_keep_best(self) -> None:
        """Evaluates on `eval_dataset`, if there is one, and saves the adapter if it is the best so far."""
        found = {} if self.eval_examples is None else self.evaluate()
        rows, self._evaluated = self._evaluated, None
        if self.state.global_step == 0:
            self.base_metrics = rows
            if rows:
                self._check_evaluation(found.keys() | rows.keys() | gains(rows, rows).keys(), rows)
        elif rows and self.base_metrics:
            found |= gains(rows, self.base_metrics)
        if found:
            self.log({f"eval/{name}": value for name, value in found.items()})
        self._event("on_evaluate", metrics={f"eval_{name}": value for name, value in found.items()})
        value, best = found.get(self.args.metric_for_best_model, math.nan), self.state.best_metric
        sign = 1 if self.args.greater_is_better else -1
        if self.state.global_step and math.isfinite(value) and (best is None or sign * value > sign * best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            if self.accelerator.is_main_process:
                self.save_model(Path(self.args.output_dir) / BEST_FOLDER)

    def _check_evaluation(self, names: Set[str], rows: Mapping[str, Tensor]) -> None:
        """Checks before the first step that evaluations have the metric of the best adapter, and tell anything."""
        if self.args.metric_for_best_model not in names:
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is no metric of an evaluation, which has "
                f"{', '.join(sorted(names - {'timestep'}))}; choose one of them, or return it from compute_metrics"
            )
        if rows["top1"].isnan().all():
            self.warn(
                "no image of the evaluation data meets a caption that is wrong for it, so nothing is measured: "
                "give images of other captions"
            )

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
        """Takes one optimizer step, on the mean of the gradients of its batches."""
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
            rows.append(self.gathered(retrieval_metrics(done.errors, pairs)))
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
        epoch, batches_per_epoch = self.loader.epoch, self.batches_per_epoch
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
        """Returns the per-image metrics of all processes."""
        if self.accelerator.num_processes == 1:
            return rows
        gathered = self.accelerator.gather(torch.stack(list(rows.values()), dim=1))  # (rows, figures)
        return dict(zip(rows, gathered.unbind(1), strict=True))
