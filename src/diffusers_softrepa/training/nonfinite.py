"""Steps whose loss or gradient is NaN or infinite: skipped, reported, and the end of a run when they do not cease."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import final

from .loader import Batch

logger = logging.getLogger(__name__)


@final
class NonfiniteSteps:
    """Counts skipped steps and lists their batches in files.

    Attributes:
        in_a_row: How many there were since the last good one.

    Args:
        output_dir: Where the reports go.
        limit: How many in a row end the run.
        rank: Of this process, which reports its own rows.
    """

    def __init__(self, output_dir: str, limit: int, rank: int) -> None:
        self.in_a_row = 0
        self._folder, self._limit, self._rank = Path(output_dir), limit, rank

    def skip(self, step: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
        """Reports the batches of a step that is skipped.

        Args:
            step: Number of the step.
            loss: Of the batches of all processes.
            norm: Of the gradient.
            batches: Of this process.

        Raises:
            FloatingPointError: It was one too many in a row.
        """
        self.in_a_row += 1
        report = self._folder / f"nonfinite-step-{step}-rank-{self._rank}.json"
        entries = [
            {"example": name, "caption": caption, "negative_captions": negatives}
            for batch in batches
            for name, caption, negatives in zip(batch.names, batch.captions, batch.negative_captions, strict=True)
        ]
        found = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "batch": entries}
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
        logger.warning(
            "step %d is skipped: its loss is %s, the norm of its gradient %s; its batch is in %s",
            *(step, loss, norm, report),
        )
        if self.in_a_row >= self._limit:
            raise FloatingPointError(
                f"loss or gradient were not finite for {self.in_a_row} steps in a row, the last one step {step}: see "
                f"{report}; lower learning_rate, set max_grad_norm, or use mixed_precision='no' or 'bf16'"
            )
