"""The decoder-only transformer: pre-norm blocks of attention and a feed-forward layer, some of them sparse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers import (
    FeedForward,
    ParameterCount,
    PEERConfig,
    ProductKeyMemoryConfig,
    TableBits,
    quantize_tables_,
)
from tinyexperts.model.attention import (
    Attend,
    Attention,
    LayerCache,
    RotaryAngles,
    attend_causally,
    cache_mask,
    rotary_angles,
)
from tinyexperts.model.config import TransformerConfig
from tinyexperts.ops.rank_groups import RankGroups

# The size of a chunk of the loss: 4 MiB of fp32 logits, but tokens enough to keep the matrix products wide.
_CHUNK_LOGITS, _LEAST_CHUNK_TOKENS = 1 << 20, 128


class Cache:
    """The keys and values of all blocks for the positions seen so far, which make generation linear in its length.

    Args:
        model (Transformer): the model that fills the cache.
        batch_size (int): B, the number of sequences.
    """

    def __init__(self, model: Transformer, batch_size: int) -> None:
        weight = model.embedding.weight
        self.length = 0
        """The number of positions seen so far."""
        self.layers = [LayerCache(model.config, batch_size, weight.device, weight.dtype) for _ in model.blocks]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self, x: Tensor, angles: RotaryAngles, attend: Attend = attend_causally, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the hidden states after the block.

        Args:
            x (float, [B, T, D]): the hidden states.
            angles (RotaryAngles): the angles of their positions.
            attend (Attend): the function that attends.
            mask (bool, [B, T]): True for real tokens, False for padding, which the feed-forward layer leaves out.

        Returns:
            y (dtype of x, [B, T, D]).
        """
        x = x + self.attention(self.attention_norm(x), angles, attend)
        normed = self.feed_forward_norm(x)
        y: Tensor = x + (self.feed_forward(normed) if mask is None else self.feed_forward(normed, mask))
        return y


class Transformer(nn.Module):
    """A decoder-only language model.

    Initial weights come from torch's global generator: seed it. Matrices are normal of variance 1 / fan-in, those that
    write into the residual stream scaled by 1 / sqrt(2 * num_layers) (GPT-2); the embedding has standard deviation 0.02
    (GPT-2) and the untied head starts at zero, so that the first loss is log V (assumption: as nanochat's).
    Feed-forward layers initialize themselves.

    Args:
        config (TransformerConfig): the settings.
        sparse_tables (bool): give the tables of PEER and product-key-memory layers sparse gradients.
        ranks (RankGroups | None): the processes that train the model together. They share tables by columns; each has
            all of the other parameters.
    """

    blocks: Sequence[Block]

    def __init__(
        self, config: TransformerConfig, *, sparse_tables: bool = False, ranks: RankGroups | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]  # it is one of blocks, which its type can't say
            Block(
                config,
                config.expert_layer.build(config.d_model, sparse=sparse_tables, ranks=ranks)
                if number in config.blocks_with_experts
                else config.dense.build(config.d_model),
            )
            for number in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._reset_parameters()
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def quantize_(self, bits: TableBits) -> None:
        """Quantize the tables of experts for inference, and say so in the config.

        Args:
            bits (int): 8 or 4.

        Raises:
            InputError: what quantize_tables_ refuses.
        """
        quantize_tables_(self, bits)
        layer = self.config.expert_layer
        assert isinstance(layer, PEERConfig | ProductKeyMemoryConfig)
        self.config = replace(self.config, expert_layer=replace(layer, table_bits=bits))

    def _reset_parameters(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            attention = block.attention
            for projection in (attention.query, attention.key, attention.value, attention.output):
                nn.init.normal_(projection.weight, std=1 / math.sqrt(projection.in_features))
            with torch.no_grad():
                attention.output.weight.div_(math.sqrt(2 * len(self.blocks)))

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute the logits of the token that follows each of `tokens`.

        Args:
            tokens (int64, [B, T]): with a cache, those that follow the ones it has seen; it is extended by them.
            cache (Cache | None): made by `Cache(model, batch_size)`.

        Returns:
            logits (float, [B, T, V]).

        Raises:
            InputError: tokens of another shape, or more of them than the context holds.
        """
        logits: Tensor = self.head(self.features(tokens, cache))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss, which equals F.cross_entropy of the logits.

        On a CPU in fp32 the logits never exist whole: they are made, turned into gradients and forgotten by chunks
        that stay in the cache. (torch 2.13 brought the function for that; older ones make them whole.)

        Args:
            tokens (int64, [B, T]): the input.
            targets (int64, [B, T]): the token that follows each of them.

        Returns:
            loss (fp32, scalar): in nats a token.

        Raises:
            InputError: as `forward`.
        """
        in_chunks = tokens.device.type == "cpu" and self.head.weight.dtype == torch.float32
        if not in_chunks or torch.is_autocast_enabled("cpu") or not hasattr(F, "linear_cross_entropy"):
            return F.cross_entropy(self(tokens).float().flatten(0, 1), targets.flatten())
        chunk_tokens = max(_LEAST_CHUNK_TOKENS, _CHUNK_LOGITS // self.config.vocab_size)
        return F.linear_cross_entropy(
            self.features(tokens).flatten(0, 1),
            self.head.weight,
            targets.flatten(),
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens),
        )

    def features(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the final normalized hidden states (float, [B, T, D]); arguments and errors as in `forward`."""
        if tokens.dim() != 2:
            raise InputError(f"tokens must be [B, T], got {list(tokens.shape)}")
        start = 0 if cache is None else cache.length
        stop = start + tokens.shape[1]
        if stop > self.config.context_length:
            raise InputError(
                f"{stop} tokens are more than the model's context of {self.config.context_length} tokens holds"
            )
        positions = torch.arange(start, stop, device=tokens.device)
        angles = rotary_angles(self.config, positions)
        x = self.embedding(tokens)
        if cache is None:
            for block in self.blocks:
                x = block(x, angles)
        else:
            mask = cache_mask(positions, start)
            for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
                x = block(x, angles, layer_cache.attend_from(start, mask))
            cache.length = stop
        normed: Tensor = self.norm(x)
        return normed

    def flops_per_token(self, context_length: int) -> int:
        """Count the FLOPs of all modules for a token, in one forward pass over sequences of this length."""
        return (
            sum(
                block.attention.flops_per_token(context_length) + block.feed_forward.flops_per_token().total
                for block in self.blocks
            )
            + 2 * self.head.weight.numel()
        )

    def router_flops_per_token(self) -> int:
        """Count the part of flops_per_token that chooses experts."""
        return sum(block.feed_forward.flops_per_token().router for block in self.blocks)

    def num_parameters(self) -> ParameterCount:
        """Count all parameters, and those that take part in one token: one row of an untied embedding."""
        counts = [block.feed_forward.num_parameters() for block in self.blocks]
        in_layers = {parameter for block in self.blocks for parameter in block.feed_forward.parameters()}
        total = sum(parameter.numel() for parameter in self.parameters() if parameter not in in_layers)
        total += sum(count.total for count in counts)
        idle = sum(count.total - count.active for count in counts)
        if not self.config.tied_embeddings:
            idle += self.embedding.weight.numel() - self.config.d_model
        return ParameterCount(active=total - idle, total=total)
