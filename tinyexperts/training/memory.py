"""The memory of a run that teaches a trained model: old texts that each step goes over again beside the new ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyexperts.data import TokenDataset, TokenLoader
from tinyexperts.model import Transformer


class Memory:
    """Windows of old texts, and the loss that keeps a model at them.

    With a base model the loss is the divergence KL(base || model) of the predictions (learning without forgetting, Li
    and Hoiem, arXiv 1606.09282); without one it is that of the texts themselves (rehearsal).
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        base: Transformer | None,
        weight: float,
        batch_size: int,
        seed: int,
        context: int,
    ) -> None:
        """Plan the batches.

        Args:
            dataset (TokenDataset): the old texts; its training split is trained on.
            base (Transformer | None): the model whose predictions are kept; None: the texts are.
            weight (float): the factor of the loss.
            batch_size (int): windows B of a step.
            seed (int): the seed of the windows' order.
            context (int): tokens T of a window, or as many as the texts have.

        Raises:
            InputError: too little text for a window.
        """
        split = dataset.split("train")
        self.dataset, self.base, self.weight = dataset, base, weight
        self.loader = TokenLoader(
            split, batch_size=batch_size, context_length=min(context, max(1, split.num_tokens - 1)), seed=seed
        )

    def loss(self, model: Transformer, step: int) -> Tensor:
        """Return the weighted loss (fp32, scalar), in nats a token, of the windows of a step.

        Args:
            model (Transformer): the model that is taught.
            step (int): the number of the step, from 0, which determines the windows.
        """
        batch, device = self.loader.batch(step), model.embedding.weight.device
        inputs = batch.inputs.to(device)
        if self.base is None:
            return self.weight * model.loss(inputs, batch.targets.to(device))
        with torch.no_grad():
            expected = F.log_softmax(self.base(inputs).float(), dim=-1).flatten(0, 1)
        found = F.log_softmax(model(inputs).float(), dim=-1).flatten(0, 1)
        return self.weight * F.kl_div(found, expected, reduction="batchmean", log_target=True)
