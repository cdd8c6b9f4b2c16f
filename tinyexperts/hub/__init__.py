"""At home with Hugging Face: our models for transformers, and our layers in other people's models.

Importing this package registers our models with AutoConfig and AutoModelForCausalLM.
"""

from importlib.metadata import version

from tinyexperts.extras import MissingExtra, require_extra

require_extra("hf", __name__)
if tuple(map(int, version("transformers").split(".")[:2])) < (5, 24):
    raise MissingExtra(
        f"{__name__} needs transformers 5.24 or later, got {version('transformers')}: "
        "pip install --upgrade 'tinyexperts[hf]'"
    )

from tinyexperts.hub.causal_lm import TinyExpertsForCausalLM
from tinyexperts.hub.configuration import TinyExpertsConfig
from tinyexperts.hub.export import export_run, import_run
from tinyexperts.hub.loading import load_replaced
from tinyexperts.hub.quantizing import quantize_tables_
from tinyexperts.hub.replacing import replace_feed_forward
from tinyexperts.hub.serving import serve
from tinyexperts.hub.tasks import evaluate_tasks

__all__ = [
    "TinyExpertsConfig",
    "TinyExpertsForCausalLM",
    "evaluate_tasks",
    "export_run",
    "import_run",
    "load_replaced",
    "quantize_tables_",
    "replace_feed_forward",
    "serve",
]
