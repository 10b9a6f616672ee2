"""The state of a trainer between two steps: what a checkpoint holds of it, and how it is saved and restored."""

import logging
from pathlib import Path
from typing import Any, final

from ..objectives import Contrastive
from .checkpoints import Checkpoint, Checkpoints

logger = logging.getLogger(__name__)


@final
class RunState:
    """Saves the state of a trainer to checkpoints and restores it.

    Args:
        checkpoints: The checkpoints of its output folder.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._position: dict[str, int] = {}  # in the data, after the last whole step
        self._whole, self._saved_step = True, 0
        self._fingerprint: str | None = None

    def begin_update(self) -> None:
        """Notes that the tokens are being updated, so that their state is not to be saved."""
        self._whole = False

    def end_step(self, trainer: Any) -> None:
        """Notes that a step is complete, and the position in the data after it."""
        self._whole, self._position = True, {"epoch": trainer.loader.epoch, "batches": trainer.loader.batches}

    def save(self, trainer: Any) -> Path | None:
        """Saves the state after the last complete step; None if it is saved already, or there was no step."""
        step = trainer.state.global_step
        if not self._whole or step in (0, self._saved_step):
            return None
        tokens = dict(trainer.adapter.tokens.state_dict())
        saved = self._checkpoints.save(step, trainer.adapter.config, tokens, self._of(trainer))
        self._saved_step = step
        return saved

    def resume(self, trainer: Any, wanted: str | None) -> None:
        """Restores the checkpoint that is wanted, or that the settings name, if any.

        Raises:
            ValueError: It is no checkpoint, or one of other settings or data, or there are later ones.
            DamagedCheckpoint: It is damaged.
        """
        wanted, step = wanted or trainer.args.resume_from_checkpoint, trainer.state.global_step
        checkpoint = None if wanted is None or step else self._checkpoints.read(wanted)
        if checkpoint is not None:
            self._restore(trainer, checkpoint)
        elif wanted is not None and not step:
            logger.info("%s has no checkpoint yet: training starts from the beginning", trainer.args.output_dir)
        self._checkpoints.check_none_after(trainer.state.global_step)

    def check_disk(self, trainer: Any) -> None:
        """Checks that the disk has room for the checkpoints of the run, with the size of an Adam optimizer's state.

        Raises:
            OSError: It has not.
        """
        left = trainer.state.max_steps - trainer.state.global_step
        copies = 3 + (trainer.average is not None)
        each = copies * sum(parameter.nbytes for parameter in trainer.parameters) + 2**15
        self._checkpoints.check_room(each, -(-left // trainer.args.save_steps))

    def _of(self, trainer: Any) -> dict[str, Any]:
        return {
            "settings": trainer.args.to_dict(),
            "step": trainer.state.global_step,
            "best": trainer.state.best_metric,
            "nonfinite_steps": trainer.nonfinite.in_a_row,
            "recent": trainer.recent.state_dict(),
            "loss_scale": trainer.engine.loss_scale,
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.lr_scheduler.state_dict(),
            "average": None if trainer.average is None else trainer.average.values,
            "data": trainer.loader.state_dict() | self._position | {"fingerprint": self._known_by(trainer)},
            "objective": None if trainer.chosen is None else vars(trainer.chosen),
            "base": trainer.base_metrics,
            "warnings": trainer.warnings,
        }

    def _restore(self, trainer: Any, checkpoint: Checkpoint) -> None:
        checkpoint.check_settings(trainer.args.to_dict())
        state, now = checkpoint.state, self._known_by(trainer)
        trainer.loader.load_state_dict(state["data"])
        saved = state["data"]["fingerprint"]
        if saved != now:
            trainer.loader.load_state_dict({"epoch": 0, "batches": 0})
            raise ValueError(
                f"{checkpoint.path} was saved while training on other data (fingerprints {saved} and now {now}); go "
                "on with the same images and captions, or start afresh in another output_dir"
            )
        trainer.adapters.swap(trainer.adapter_name, checkpoint.config, checkpoint.tensors)
        trainer.state.global_step, trainer.state.best_metric = state["step"], state["best"]
        trainer.nonfinite.in_a_row, trainer.engine.loss_scale = state["nonfinite_steps"], state["loss_scale"]
        self._saved_step, self._position = state["step"], {key: state["data"][key] for key in ("epoch", "batches")}
        trainer.base_metrics, trainer.warnings = state["base"], list(state["warnings"])
        if state["objective"]:
            trainer.choose(Contrastive(**state["objective"]))
        trainer.recent.load_state_dict(state["recent"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.lr_scheduler.load_state_dict(state["schedule"])
        if trainer.average is not None:
            trainer.average.values = [value.to(trainer.accelerator.device) for value in state["average"]]
        logger.info("resumed from %s", checkpoint.path)

    def _known_by(self, trainer: Any) -> str:
        """Returns the fingerprint of the training data, computed once."""
        if self._fingerprint is None:
            self._fingerprint = trainer.train_examples.fingerprint()
        return self._fingerprint
