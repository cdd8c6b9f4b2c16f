"""The rows that a step trains: those that new texts use and old ones do not, by TF-IDF (Lin et al. 2025, 2510.15103).

Sparse memory fine-tuning (arXiv 2510.15103, section 3): of the rows that a batch retrieves, the step trains the few
with the highest tf x idf, where tf is a row's share of the batch's retrievals, and idf falls with the number of
batches of old texts that retrieve it. Here the rows are updated by Adam as everywhere in this package, and the batches
of old texts have the run's own size. Rows that only what is remembered by retrieves are not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tinyexperts.evaluation.fired import counted_retrievals
from tinyexperts.evaluation.routings import product_key_layers
from tinyexperts.model import Transformer, evaluation_mode
from tinyexperts.ops.expert_mlp.row_sums import sparse_gradient
from tinyexperts.optim import rows_and_values


class RowChoice:
    """The rows of highest TF-IDF of each step, for a model whose tables have sparse gradients."""

    def __init__(self, model: Transformer, num_rows: int, old_batches: Iterable[Tensor]) -> None:
        """Count the rows that old texts retrieve.

        Args:
            model (Transformer): the model that is taught, before its first step.
            num_rows (int): rows of each table that a step trains, at most.
            old_batches (Iterable[Tensor]): the token ids (int64 [B, T]) of batches of old texts.
        """
        self.num_rows = num_rows
        self._model = model
        self._counts: dict[str, Tensor] = {}
        with_row = {
            name: layer.experts.new_zeros(len(layer.experts)).double()
            for name, layer in product_key_layers(self._model).items()
        }
        num_batches = 0
        with evaluation_mode(model), torch.no_grad():
            for inputs in old_batches:
                num_batches += 1
                with self.counted():
                    model(inputs.to(model.embedding.weight.device))
                for name, counts in self._counts.items():
                    with_row[name] += (counts > 0).double()
        self.idf = {name: torch.log((num_batches + 1) / (count + 1)) for name, count in with_row.items()}
        """log((batches + 1) / (batches with the row + 1)) by the layer's name (fp64 [N])."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the rows that forward passes retrieve while open, in place of those that were counted before."""
        with counted_retrievals(self._model) as self._counts:
            yield

    def chosen(self, name: str) -> Tensor:
        """Return the rows (int64, ascending) of highest TF-IDF of what was counted in a layer.

        Args:
            name (str): the layer's name.
        """
        counts = self._counts[name]
        scores = counts / counts.sum().clamp(min=1) * self.idf[name]
        best = scores.topk(min(self.num_rows, int((counts > 0).sum()))).indices
        return best[counts[best] > 0].sort().values

    def restrict_gradients(self) -> None:
        """Keep of each table's gradient the chosen rows."""
        for name, layer in product_key_layers(self._model).items():
            table = layer.experts
            if table.grad is None:
                continue
            rows, values = rows_and_values(table.grad)
            is_kept = torch.isin(rows, self.chosen(name), assume_unique=True)
            table.grad = sparse_gradient(rows[is_kept], values[is_kept], table.shape)
