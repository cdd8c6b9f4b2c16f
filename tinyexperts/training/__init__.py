"""Training: recipes, the loop, run folders, checkpoints, several processes."""

from typing import TYPE_CHECKING

from tinyexperts.extras import require_extra
from tinyexperts.lazy_exports import lazy_exports

require_extra("train", __name__)

if TYPE_CHECKING:
    from tinyexperts.training.checkpoint import load_model
    from tinyexperts.training.config import TrainConfig
    from tinyexperts.training.device import choose_device
    from tinyexperts.training.distributed.ranks import LostRank
    from tinyexperts.training.loop import Interrupted, train
    from tinyexperts.training.quantize_run import Quantized, Tables, quantize_run
    from tinyexperts.training.step import Diverged
    from tinyexperts.training.teach_config import TeachConfig, TeachOptions
    from tinyexperts.training.teach_model import teach
    from tinyexperts.training.teaching import Knowledge, Taught, teach_run
    from tinyexperts.training.trained_run import ask_run, evaluate_run, generate_text
else:
    __getattr__, __dir__ = lazy_exports(__name__, __file__)

__all__ = [
    "Diverged",
    "Interrupted",
    "Knowledge",
    "LostRank",
    "Quantized",
    "Tables",
    "Taught",
    "TeachConfig",
    "TeachOptions",
    "TrainConfig",
    "ask_run",
    "choose_device",
    "evaluate_run",
    "generate_text",
    "load_model",
    "quantize_run",
    "teach",
    "teach_run",
    "train",
]
