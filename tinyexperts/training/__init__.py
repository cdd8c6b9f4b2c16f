"""Training: recipes, the loop, run folders, checkpoints, several processes."""

from tinyexperts.training.checkpoint import load_model
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.device import choose_device
from tinyexperts.training.distributed.ranks import LostRank
from tinyexperts.training.loop import Interrupted, train
from tinyexperts.training.step import Diverged

__all__ = [
    "Diverged",
    "Interrupted",
    "LostRank",
    "TrainConfig",
    "choose_device",
    "load_model",
    "train",
]
