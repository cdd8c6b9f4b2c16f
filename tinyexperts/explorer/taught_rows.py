"""Where teaching has left its mark: the rows of the table that it changed, and who retrieves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tinyexperts.evaluation.fired import counted_retrievals
from tinyexperts.explorer.text_sample import draw_texts, equally_long
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.model import Transformer, evaluation_mode
from tinyexperts.training import load_model
from tinyexperts.training.checkpoint import checkpoints
from tinyexperts.training.teaching_history import history


@dataclass(frozen=True, kw_only=True)
class TaughtRows:
    """The rows of a layer's table by what teaching did to them, and by the texts that retrieve them."""

    change: np.ndarray
    """The length of each row's change, relative to that of the row before (fp64 [N]); 0 where nothing changed."""
    new: np.ndarray
    """Retrievals of each row by a sample of the new texts (fp64 [N])."""
    old: np.ndarray
    """Retrievals of each row by a sample of the old texts (fp64 [N])."""

    @property
    def changed(self) -> np.ndarray:
        """True for rows that changed (bool [N])."""
        result: np.ndarray = self.change > 0
        return result

    @property
    def is_free(self) -> np.ndarray:
        """True for rows that no old text of the sample retrieves (bool [N])."""
        result: np.ndarray = self.old == 0
        return result

    def share(self, counts: np.ndarray, rows: np.ndarray) -> float:
        """Return the share of some rows in a sum over all; 0 where that is 0.

        Args:
            counts (fp64 [N]): what is summed, for example the retrievals `new` or `old`.
            rows (bool [N]): the rows.
        """
        total = float(counts.sum())
        return float(counts[rows].sum()) / total if total else 0.0


def taught_rows(run: Path, model: Transformer) -> dict[str, TaughtRows] | None:
    """Return what teaching did to the tables of a run's model, by the layer's name.

    Args:
        run (Path): the folder of the run.
        model (Transformer): its model.

    Returns:
        None for a run that was not taught, or of which the base's weights, the data set or the first run's data set is
        gone.
    """
    past = history(run)
    new_data, old_data = past[0].data(), past[-1].data()
    if len(past) < 2 or past[-1].config.teaching is not None or new_data is None or old_data is None:
        return None
    if not checkpoints(past[1].run) or past[1].config.model != model.config:
        return None
    base = load_model(past[1].run)
    texts = [draw_texts(data.split("train"), model.config.context_length) for data in (new_data, old_data)]
    counts = [count_retrievals(model, each) for each in texts]
    before = dict(base.named_modules())
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ProductKeyLayer):
            was = before[name].get_parameter("experts").detach().flatten(1).double()
            moved = (layer.experts.detach().cpu().flatten(1).double() - was).norm(dim=1)
            found[name] = TaughtRows(
                change=(moved / was.norm(dim=1).clamp(min=1e-12)).numpy(),
                new=counts[0][name].cpu().numpy(),
                old=counts[1][name].cpu().numpy(),
            )
    return found


def count_retrievals(model: Transformer, texts: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the retrievals of each expert by texts (fp64 [N]), by the layer's name.

    Args:
        model (Transformer): the model, on any device.
        texts (Sequence[np.ndarray]): the texts' ids, no longer than the context.
    """
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad(), counted_retrievals(model) as counts:
        for numbers in equally_long(texts):
            model(torch.from_numpy(np.stack([texts[number] for number in numbers])).to(device))
    return counts
