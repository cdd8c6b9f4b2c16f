"""Training: recipes, the loop, run folders, checkpoints, several processes and what they take."""

from tinyexperts.training.checkpoint import load_model
from tinyexperts.training.config import TrainConfig
from tinyexperts.training.device import choose_device
from tinyexperts.training.loop import Interrupted, train
from tinyexperts.training.plan import Devices, MeshPlan, plan, smaller_plans
from tinyexperts.training.ranks import LostRank
from tinyexperts.training.step import Diverged

__all__ = [
    "Devices",
    "Diverged",
    "Interrupted",
    "LostRank",
    "MeshPlan",
    "TrainConfig",
    "choose_device",
    "load_model",
    "plan",
    "smaller_plans",
    "train",
]
