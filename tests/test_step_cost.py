"""A step of training goes through few functions: the price of reading it, and of finding where something is done."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import diffusers_softrepa
from training_runs import At, trainer

TRAINING = str(Path(diffusers_softrepa.__file__).parent / "training")
MOST = 95
"""A step of four images took 231 calls when a datum still had ten forms."""
MOST_OF_DATA = 48
"""To choose, read, decode and encode four images and their captions: 46, which were 70."""


def test_a_step_calls_few_functions_of_training(tmp_path: Path):
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(TRAINING) and not code.co_name.startswith("<"):
            calls[f"{Path(code.co_filename).relative_to(TRAINING)}: {code.co_name}"] += 1

    run = trainer(
        tmp_path,
        train_batch_size=4,
        dataloader_num_workers=0,
        max_steps=6,
        save_steps=9,
        eval_steps=9,
        logging_steps=9,
        callbacks=[
            At("on_step_end", 3, lambda _: sys.setprofile(count)),
            At("on_step_end", 4, lambda _: sys.setprofile(None)),
        ],
    )
    before = sys.getprofile()
    try:
        run.train()
    finally:
        sys.setprofile(before)
    assert 20 < calls.total() <= MOST, calls
    assert len({name.split(":")[0] for name in calls}) <= 12, calls
    assert 10 < sum(calls[name] for name in calls if Path(name).parts[0] == "data") <= MOST_OF_DATA, calls
