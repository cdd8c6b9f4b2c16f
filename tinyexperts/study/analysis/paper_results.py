"""The paper's own results, for the tables and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Perplexity of each method's compute-optimal model, by budget and text.
PAPER_TEXTS = ("Curation", "Lambada", "Pile", "Wikitext", "C4")
PAPER_PERPLEXITY: Mapping[float, Mapping[str, tuple[float, ...]]] = {
    6e18: {
        "dense": (23.26, 21.95, 24.55, 29.14, 23.84),
        "moe": (20.98, 19.09, 23.26, 26.10, 21.41),
        "pkm": (21.80, 19.39, 20.49, 27.09, 21.92),
        "peer": (20.68, 17.65, 19.01, 25.48, 20.63),
    },
    2e19: {
        "dense": (17.70, 12.28, 18.19, 21.21, 18.31),
        "moe": (16.88, 12.97, 17.41, 20.28, 17.12),
        "pkm": (17.03, 11.18, 16.34, 20.26, 17.36),
        "peer": (16.34, 10.33, 14.99, 19.09, 16.45),
    },
}
# Perplexity, usage in percent, unevenness in nats, by N, without and with query norm.
PAPER_USAGE = {
    128**2: ((23.47, 100.0, 0.45), (23.47, 100.0, 0.30)),
    256**2: ((22.61, 100.0, 0.63), (22.55, 100.0, 0.44)),
    512**2: ((21.54, 100.0, 0.97), (21.47, 100.0, 0.66)),
    1024**2: ((20.73, 99.8, 1.52), (20.64, 100.0, 1.06)),
}


def paper_margins(baseline: str) -> tuple[float, ...]:
    """PEER minus a baseline on C4 in nats, at each of the paper's budgets."""
    return tuple(math.log(by_method["peer"][-1] / by_method[baseline][-1]) for by_method in PAPER_PERPLEXITY.values())
