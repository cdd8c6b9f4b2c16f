"""Expert-choice mixture of experts: Zhou et al. (arXiv 2202.09368), the paper's MoE baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import FeedForward, Flops, ParameterCount, check_mask
from tinyexperts.layers.recomputation import in_recomputation
from tinyexperts.ops.activation import Activation, activate, check_activation
from tinyexperts.ops.collectives import all_gather_tokens
from tinyexperts.ops.rank_groups import RankGroups

EvaluationRouting = Literal["expert_choice", "threshold"]


class ExpertChoiceMoE(FeedForward):
    """A feed-forward layer of dense experts, each of which chooses its tokens.

    Every expert takes the C = ceil(capacity_factor * M / num_experts) tokens of the batch that score highest for it,
    so the load is balanced by construction; a token's output is the sum of the experts that chose it, weighted by its
    softmax score over the experts, and zero where none did.

    **A token's fate depends on later tokens.** Experts choose among all tokens of the batch, later positions and other
    sequences included, so in training, and in evaluation over whole sequences, the layer looks ahead. In evaluation,
    `evaluation_routing` says how tokens are routed:
    - "threshold" (default): a token keeps the experts whose learned threshold its score passes; each token by its
      own, which leaks least and is the only way that can generate text. The thresholds are running means of the
      scores at which the experts cut off in training, so the number of experts a token gets varies. Which experts
      have work depends on the data: torch.compile breaks the graph there, and torch.export refuses it.
    - "expert_choice": experts choose among the tokens given, as in training and as the paper presumably evaluated.

    Without a `mask` (bool, the leading dimensions of x; True: a real token) padding is chosen like any token: it takes
    places that real tokens would have had, and moves the thresholds. With one the experts see the real tokens alone,
    and the output of padding is zero.

    The thresholds move in training unless the router is frozen (its weight requires no gradient). They are of fp32 or
    wider, whatever the layer is cast to or loaded from.

    Args:
        d_model (int): width D.
        num_experts (int): 128 in the paper, each the size of the dense MLP.
        capacity_factor (float): experts a token gets on average.
        hidden_dim (int | None): hidden neurons of one expert; 4 * d_model when None.
        activation (str): "gelu" (exact), "relu", "relu2" or "silu".
        ranks (RankGroups | None): the processes over whose tokens together the experts choose, each with as many; the
            parameters are whole on each, and their gradients, of its own tokens, are to be summed.

    Raises:
        InputError: a size below 1, a capacity factor outside (0, num_experts], an unknown activation.
    """

    threshold: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int = 128,
        *,
        capacity_factor: float = 1.0,
        hidden_dim: int | None = None,
        activation: Activation = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ranks: RankGroups | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = 4 * d_model if hidden_dim is None else hidden_dim
        if min(d_model, num_experts, hidden_dim) < 1:
            raise InputError(
                f"d_model, num_experts and hidden_dim must be at least 1, got {d_model}, {num_experts} and {hidden_dim}"
            )
        if not 0 < capacity_factor <= num_experts:
            raise InputError(
                f"capacity_factor must be above 0 and at most num_experts = {num_experts}, got {capacity_factor}"
            )
        check_activation(activation)
        self.capacity_factor, self.activation, self.ranks = capacity_factor, activation, ranks
        self.evaluation_routing: EvaluationRouting = "threshold"
        self.router = nn.Linear(d_model, num_experts, bias=False, device=device, dtype=dtype)
        self.up = nn.Parameter(torch.empty(num_experts, d_model, hidden_dim, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, d_model, device=device, dtype=dtype))
        # Before any training step the threshold is the score of a uniform router.
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("threshold", torch.full((num_experts,), 1 / num_experts, device=device, dtype=wide))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertChoiceMoE:
        """Keep the thresholds in fp32 in a cast: in bf16 the small steps of their running mean would round to 0."""
        before = {"threshold": self.threshold, "num_batches_tracked": self.num_batches_tracked}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.threshold.dtype.itemsize < 4:  # replaced, with assign=True, by that of a checkpoint
            self.threshold = self.threshold.float()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw normal weights of variance 1 / fan-in; thresholds of a uniform router."""
        if self.up.is_meta:
            return
        for weight, fan_in in (
            (self.router.weight, self.up.shape[1]),
            (self.up, self.up.shape[1]),
            (self.down, self.down.shape[1]),
        ):
            nn.init.normal_(weight, std=1 / math.sqrt(fan_in), generator=generator)
        self.threshold.fill_(1 / len(self.threshold))
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the layer's output for each token.

        Args:
            x (float, [..., D]): the tokens.
            mask (bool, [...]): True for real tokens, False for padding.

        Returns:
            y (dtype of x, [..., D]): the outputs, zero for padding.

        Raises:
            InputError: a mask that is not bool, of the leading dimensions of x, on its device, or that is given to one
                of several ranks, whose experts take as many tokens of each.
        """
        if mask is not None:
            check_mask(mask, x)
            if self.ranks is not None:
                raise InputError(
                    "a mask is for one process alone: experts of several ranks take as many tokens of each"
                )
            return torch.zeros_like(x).index_put((mask,), self(x[mask]))
        x_MD = x.reshape(-1, x.shape[-1])
        logits_ME = self.router(x_MD)
        scores_ME = logits_ME.to(torch.promote_types(logits_ME.dtype, torch.float32)).softmax(-1)
        if self.training or self.evaluation_routing == "expert_choice":
            y_MD = self._forward_by_expert_choice(x_MD, scores_ME)
        elif self.evaluation_routing == "threshold":
            y_MD = self._forward_of_kept(x_MD, scores_ME, scores_ME > self.threshold)
        else:
            raise InputError(
                f"evaluation_routing must be one of {', '.join(get_args(EvaluationRouting))}, "
                f"got {self.evaluation_routing!r}"
            )
        return y_MD.view(x.shape)

    def _forward_by_expert_choice(self, x_MD: Tensor, scores_ME: Tensor) -> Tensor:
        of_all_ME = scores_ME if self.ranks is None else all_gather_tokens(scores_ME.detach(), self.ranks.all_ranks)
        num_tokens, num_experts = of_all_ME.shape
        capacity = min(num_tokens, math.ceil(self.capacity_factor * num_tokens / num_experts))
        top = of_all_ME.topk(min(capacity + 1, num_tokens), dim=0)
        if self.training and num_tokens and self.router.weight.requires_grad and not in_recomputation():
            self._update_threshold(top.values.detach(), capacity, num_tokens)
        if self.ranks is not None:  # how many of the chosen are this rank's own depends on the data
            chosen_ME = torch.zeros_like(of_all_ME, dtype=torch.bool).scatter_(0, top.indices[:capacity], True)
            own_ME = chosen_ME.chunk(self.ranks.all_ranks.size())[dist.get_rank(self.ranks.all_ranks)]
            return self._forward_of_kept(x_MD, scores_ME, own_ME)
        chosen_EC, weights_EC = top.indices[:capacity].T, top.values[:capacity].T
        hidden = activate(torch.bmm(x_MD[chosen_EC], self.up), self.activation)
        y_ECD = torch.bmm(hidden, self.down) * weights_EC.unsqueeze(-1).to(x_MD.dtype)
        return torch.zeros_like(x_MD).index_add(0, chosen_EC.flatten(), y_ECD.flatten(0, 1).to(x_MD.dtype))

    @torch.no_grad()
    def _update_threshold(self, top_scores: Tensor, capacity: int, num_tokens: int) -> None:
        """Move the running mean (momentum 0.01, plain at first) of the middle between the last taken and the next."""
        if capacity == num_tokens:  # all were taken, so that no score is too low
            cut_off = torch.zeros_like(self.threshold)
        else:
            cut_off = ((top_scores[capacity - 1] + top_scores[capacity]) / 2).to(self.threshold.dtype)
        self.num_batches_tracked.add_(1)
        momentum = (1 / self.num_batches_tracked).clamp(min=0.01)
        self.threshold.lerp_(cut_off, momentum)

    def _forward_of_kept(self, x_MD: Tensor, scores_ME: Tensor, keeps_ME: Tensor) -> Tensor:
        y_MD = torch.zeros_like(x_MD)
        has_work_E = keeps_ME.any(0)
        has_work_E[0] = True  # so that the weights have a gradient, be it zero, on a rank of which no token was chosen
        for expert in has_work_E.nonzero().flatten().tolist():
            tokens = keeps_ME[:, expert].nonzero().flatten()
            hidden = activate(x_MD[tokens] @ self.up[expert], self.activation)
            y = (hidden @ self.down[expert]) * scores_ME[tokens, expert, None].to(x_MD.dtype)
            y_MD = y_MD.index_add(0, tokens, y.to(x_MD.dtype))
        return y_MD

    def flops_per_token(self) -> Flops:
        """Count the average over a large batch; of a small one the capacity is rounded up."""
        expert = 2 * (self.up.numel() + self.down.numel()) // len(self.up)
        return Flops(router=2 * self.router.weight.numel(), experts=round(self.capacity_factor * expert))

    def num_parameters(self) -> ParameterCount:
        """Count the parameters; active are, on average, capacity_factor experts a token."""
        router, experts = self.router.weight.numel(), self.up.numel() + self.down.numel()
        active = round(self.capacity_factor * experts / len(self.up))
        return ParameterCount(active=router + active, total=router + experts)


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceMoEConfig:
    """An expert-choice mixture of dense experts."""

    kind: ClassVar[str] = "expert_choice_moe"
    """The name of this kind of layer in files."""
    num_experts: int = 128
    """Experts."""
    capacity_factor: float = 1.0
    """Experts a token gets on average."""
    hidden_dim: int | None = None
    """Hidden neurons of one expert; default: 4 * d_model."""
    activation: Activation = "gelu"
    """Activation of the hidden neurons."""

    def build(
        self,
        d_model: int,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        ranks: RankGroups | None = None,
    ) -> ExpertChoiceMoE:
        """Make the layer, which has no table."""
        return ExpertChoiceMoE(d_model, **vars(self), device=device, ranks=ranks)
