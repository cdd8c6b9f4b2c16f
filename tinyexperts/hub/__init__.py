"""At home with Hugging Face's transformers: layers of this package in models of theirs."""

from typing import TYPE_CHECKING

from tinyexperts.extras import require_extra
from tinyexperts.lazy_exports import lazy_exports

require_extra("hf", __name__)

if TYPE_CHECKING:  # needs transformers, which takes seconds to import
    from tinyexperts.hub.loading import load_replaced
    from tinyexperts.hub.replacing import replace_feed_forward
else:
    __getattr__, __dir__ = lazy_exports(__name__, __file__)

__all__ = ["load_replaced", "replace_feed_forward"]
