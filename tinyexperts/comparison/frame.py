"""A tidy frame of run folders: one row each, with what the run reached and what it took.

`loss, held out` is the loss in nats a token on the held-out split; `new` and `stood_earlier` are its parts by whether a
token's bigram stood earlier in the context. Usage and unevenness (nats) are means over layers. `recall, <split>`
and `nats, <split>` are those of the facts of a split, `bits_per_parameter` that of known facts. What a run lacks is
NaN.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinyexperts.comparison.results import Results

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = "loss, held out"


def frame_of(results: Sequence[Results], **columns: Sequence[Any]) -> pd.DataFrame:
    """Return the frame of run folders.

    Args:
        results (Sequence[Results]): the run folders, which become the column `results`.
        columns (Sequence[Any]): more columns, by name.
    """
    import pandas as pd

    return pd.DataFrame([row_of(each) for each in results]).assign(results=list(results), **columns)


def row_of(results: Results) -> dict[str, Any]:
    """Return the measurements of a run folder as a row of the frame."""
    usage = results.expert_usage
    measured = {
        HELD_OUT: results.evaluated("loss"),
        "perplexity": results.evaluated("perplexity"),
        "bits_per_byte": results.evaluated("bits_per_byte"),
        "new": results.evaluated("loss_by_copy", "new"),
        "stood_earlier": results.evaluated("loss_by_copy", "stood_earlier"),
        "parameters_active": results.parameters("active"),
        "parameters_total": results.parameters("total"),
        "training_flops": results.last.get("training_flops"),
        "router_share": results.router_share,
        "num_tokens": results.last.get("num_tokens"),
        "seconds": results.last.get("seconds"),
        "tokens_per_second": results.tokens_per_second,
        "usage": statistics.fmean(layer.usage for layer in usage) if usage else None,
        **{
            f"{measure}, {split}": results.evaluated("facts", split, "all", measure)
            for split in ("validation", "unseen-phrasing", "unseen-entities")
            for measure in ("recall", "nats")
        },
        "bits_per_parameter": results.evaluated("facts", "validation", "bits_per_parameter"),
        "unevenness": statistics.fmean(layer.unevenness for layer in usage) if usage else None,
    }
    return {name: math.nan if value is None else value for name, value in measured.items()}
