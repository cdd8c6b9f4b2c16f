"""Training: recipes, the loop, run folders, checkpoints."""

from tinyexperts.training.checkpoint import load_model
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.device import choose_device
from tinyexperts.training.loop import Interrupted, train

__all__ = ["Interrupted", "TrainConfig", "choose_device", "load_model", "train"]
