"""Training probes on (embedding, reward) rows, many at once.

Probes that have about as many prompts share the passes over the data: one matrix product scores a batch with every probe,
and a mask says which prompts each of them trains on (folds of a cross-validation, seeds that redraw the prompts, learning
rates that compete). A batch is made of chunks: at most `chunk` samples of one prompt, drawn anew in every epoch (the paper's
L_PG: 100 prompts x 10 samples). It is cut so large that each probe finds `chunks_per_batch` chunks of its own in it on
average: its steps, their noise and its epochs are then those of training alone, whoever trains beside it. Probes with far
fewer prompts get passes of their own, for in shared ones they would hardly ever be met.

Hyper-parameters are chosen on held-out prompts: the step at which a probe's own loss is lowest there, the learning rate
where candidates are given, and the temperature that earns most there. With fewer than `minimum_mixed` held-out prompts that
have both good and bad completions such a choice is noise: then nothing is held out and the settings' own `steps` (or
`epochs`), `learning_rate` and `beta` are used, and it is said. `refitted` gives held-out prompts back, for a probe that is kept.
"""

from qprobe.probe.training.data import ROWS_AT_A_TIME, Data, score_rows, statistics
from qprobe.probe.training.settings import TrainingSettings
from qprobe.probe.training.trainer import BETAS, ProbeTask, TrainedProbe, held_out_mixed, refitted, train

__all__ = [
    "BETAS",
    "ROWS_AT_A_TIME",
    "Data",
    "ProbeTask",
    "TrainedProbe",
    "TrainingSettings",
    "held_out_mixed",
    "refitted",
    "score_rows",
    "statistics",
    "train",
]
