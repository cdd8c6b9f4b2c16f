"""The memory of a run that teaches a trained model: old texts that each step goes over again beside the new ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.data import TokenLoader, TokenSplit
from tinyexperts.model import Transformer


class Memory:
    """Windows of old texts, and the loss that keeps a model at them.

    With a teacher the loss is the divergence KL(teacher || model) of the predictions (learning without forgetting, Li
    and Hoiem, arXiv 1606.09282); without one it is that of the texts themselves (rehearsal).
    """

    def __init__(
        self,
        texts: Sequence[tuple[TokenSplit, Transformer | None]],
        *,
        weight: float,
        batch_size: int,
        seed: int,
        context: int,
    ) -> None:
        """Plan the batches.

        Args:
            texts (Sequence[tuple[TokenSplit, Transformer | None]]): old texts, each with the model whose predictions on
                them are kept, or None to keep the texts. A step goes over one of these, the longer the more often.
            weight (float): the factor of the loss.
            batch_size (int): windows B of a step.
            seed (int): the seed of the windows' order.
            context (int): tokens T of a window, or as many as the texts have.

        Raises:
            InputError: too little text for a window.
        """
        self.weight, self.seed = weight, seed
        self.teachers = [teacher for _, teacher in texts]
        self.loaders = [
            TokenLoader(
                split, batch_size=batch_size, context_length=min(context, max(1, split.num_tokens - 1)), seed=seed
            )
            for split, _ in texts
        ]
        windows = np.array([loader.num_windows for loader in self.loaders])
        self.shares = windows / windows.sum()
        """The share of the steps that go over each of the texts (float64)."""

    def loss(self, model: Transformer, step: int) -> Tensor:
        """Return the weighted loss (fp32, scalar), in nats a token, of the windows of a step.

        Args:
            model (Transformer): the model that is taught.
            step (int): the number of the step, from 0, which determines the windows.
        """
        chosen = int(np.random.default_rng((self.seed, step)).choice(len(self.loaders), p=self.shares))
        batch, teacher = self.loaders[chosen].batch(step), self.teachers[chosen]
        device = model.embedding.weight.device
        inputs = batch.inputs.to(device)
        if teacher is None:
            return self.weight * model.loss(inputs, batch.targets.to(device))
        with torch.no_grad():
            expected = F.log_softmax(teacher(inputs).float(), dim=-1).flatten(0, 1)
        found = F.log_softmax(model(inputs).float(), dim=-1).flatten(0, 1)
        return self.weight * F.kl_div(found, expected, reduction="batchmean", log_target=True)
