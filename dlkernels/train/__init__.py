"""Training: ``Trainer`` for any model, from one process to many; ``train`` and ``compare`` for the teaching models.

    trainer = Trainer(model, F.cross_entropy, AdamW(model.parameters()), max_norm=1.0, precision="bfloat16", folder="run")
    trainer.fit(Batches(x, y, 64), Batches(x_val, y_val, 64, shuffle=False), epochs=20, resume=True)

Read first ``trainer.py``, whose ``training_step`` is the whole of it; the other files are what a long run needs besides.
"""

from .batches import Batches
from .checkpoint import CheckpointError
from .checks import NotFinite, OneBatch, find_not_finite, overfit_one_batch
from .distributed import join, leave, spread
from .keeper import Progress
from .race import FIRST_STEPS, Comparison, History, accuracy, compare, learn_one_batch, time_steps, train
from .schedules import SCHEDULES, make_schedule
from .trackers import TRACKERS, JSONLines, Tracker, make_tracker
from .trainer import Trainer

__all__ = [
    "FIRST_STEPS", "SCHEDULES", "TRACKERS", "Batches", "CheckpointError", "Comparison", "History", "JSONLines", "NotFinite", "OneBatch",
    "Progress", "Tracker", "Trainer", "accuracy", "compare", "find_not_finite", "join", "learn_one_batch", "leave", "make_schedule",
    "make_tracker", "overfit_one_batch", "spread", "time_steps", "train",
]  # fmt: skip
