"""Facts without the experts that fire for them: the loss of an answer when some vectors v are zero.

Where does a model keep a fact? If in the experts that fire most at its answer, then without them its loss rises more
than that of other facts, and more than without as many others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from tinyexperts.data.shards.reader import TokenSplit
from tinyexperts.errors import InputError, require_at_least
from tinyexperts.evaluation.facts import answer_losses
from tinyexperts.evaluation.fired import recorded_firing
from tinyexperts.explorer.questions import best_answered
from tinyexperts.layers.product_key_layer import ProductKeyLayer
from tinyexperts.model import Transformer, evaluation_mode
from tinyexperts.statistics.seed_interval import SeedInterval

ExpertKey: TypeAlias = tuple[str, int]
"""The layer's name and the expert's id."""


@dataclass(frozen=True, kw_only=True)
class LossRise:
    """The rise of losses without the experts of each fact in turn (nats, fp64 [num_counts, num_facts])."""

    own: np.ndarray
    """The rise of the loss of the fact itself."""
    others: np.ndarray
    """The mean rise of the losses of the other facts."""


@dataclass(frozen=True, kw_only=True)
class KnockOut:
    """The losses of facts without experts."""

    statements: tuple[int, ...]
    """The numbers of the facts' statements in their split."""
    losses: np.ndarray
    """The loss of each answer with all experts (nats, fp64 [num_facts])."""
    num_right: int
    """Facts that are answered right with all experts."""
    counts: tuple[int, ...]
    """Numbers of experts that are knocked out together."""
    fired: LossRise
    """Without the experts that fire most for a fact."""
    drawn: LossRise
    """Without as many, drawn among those that fire for other facts of the sample and not for this one: the mean over
    draws."""
    num_draws: int

    def own_minus_others(self, count: int) -> SeedInterval:
        """Return how much more the fact's own loss rises than the others', without the experts that fire most."""
        place = self.counts.index(count)
        return SeedInterval(values=tuple((self.fired.own - self.fired.others)[place].tolist()))

    def fired_minus_drawn(self, count: int) -> SeedInterval:
        """Return how much more the fact's own loss rises without the experts that fire most than without drawn ones."""
        place = self.counts.index(count)
        return SeedInterval(values=tuple((self.fired.own - self.drawn.own)[place].tolist()))


def knock_out(
    model: Transformer,
    split: TokenSplit,
    *,
    num_facts: int = 20,
    counts: Sequence[int] = (1, 4, 16, 64),
    num_draws: int = 5,
    seed: int = 0,
) -> KnockOut:
    """Measure the loss of facts without the experts that fire most for one of them, and without others.

    An expert fires for a fact by the sum of the sizes of its factors over heads and tokens, at the tokens that predict
    the answer: the last of the question and those of the answer. The facts are drawn among those that are answered
    right, or are the best answered ones where too few are. Every table is as it was at the end.

    Args:
        model (Transformer): the model, on any device.
        split (TokenSplit): statements of facts.
        num_facts (int): facts to draw, or as many as there are.
        counts (Sequence[int]): numbers of experts to knock out. One that is larger than the experts that fire for some
            fact, or than those that can be drawn, is left out.
        num_draws (int): draws of other experts, for each fact.
        seed (int): the seed of all draws.

    Raises:
        InputError: a model without experts to knock out, documents that state no facts, fewer than two facts that the
            context holds, or a setting out of range.
    """
    if not any(isinstance(layer, ProductKeyLayer) for layer in model.modules()):
        raise InputError("experts can be knocked out of PEER and product-key memory layers, and the model has none")
    require_at_least(2, "num_facts", num_facts)
    require_at_least(1, "num_draws", num_draws)
    for count in counts:
        require_at_least(1, "counts", count)
    generator = np.random.default_rng(seed)
    statements = _known_facts(model, split, num_facts, generator)
    whole = answer_losses(model, split, statements)
    fired = [_fired_for(model, split, number) for number in statements]
    drawn_from = [_others_than(fired, place) for place in range(len(fired))]
    most = min(min(len(own), len(others)) for own, others in zip(fired, drawn_from, strict=True))
    counts = tuple(count for count in counts if count <= most)

    def rise_without(experts: Iterable[ExpertKey], place: int) -> tuple[float, float]:
        with knocked_out(model, experts):
            rises = answer_losses(model, split, statements).nats - whole.nats
        return float(rises[place]), float(np.delete(rises, place).mean())

    shape = (len(counts), len(statements), 2)
    by_fired, by_drawn = np.zeros(shape), np.zeros(shape)
    for row, count in enumerate(counts):
        for place, own in enumerate(fired):
            by_fired[row, place] = rise_without(own[:count], place)
            draws = [generator.choice(len(drawn_from[place]), count, replace=False) for _ in range(num_draws)]
            rises = [rise_without([drawn_from[place][number] for number in draw], place) for draw in draws]
            by_drawn[row, place] = np.mean(rises, axis=0)
    return KnockOut(
        statements=tuple(statements),
        losses=whole.nats,
        num_right=int(whole.is_right.sum()),
        counts=counts,
        fired=LossRise(own=by_fired[..., 0], others=by_fired[..., 1]),
        drawn=LossRise(own=by_drawn[..., 0], others=by_drawn[..., 1]),
        num_draws=num_draws,
    )


@contextmanager
def knocked_out(model: Transformer, experts: Iterable[ExpertKey]) -> Iterator[None]:
    """Make the vectors v of some experts zero while open; they are bit for bit as they were at the end.

    Args:
        model (Transformer): the model.
        experts (Iterable[ExpertKey]): the experts.
    """
    by_layer: dict[str, list[int]] = {}
    for name, id_ in experts:
        by_layer.setdefault(name, []).append(id_)
    kept = []
    try:
        for name, ids in by_layer.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, ProductKeyLayer)
            # Of a quantized vector the scales: zero as well, and put back to the bit.
            table = layer.experts.detach() if layer.scales is None else layer.scales
            kept.append((table, ids, table[ids, -1].clone()))
            table[ids, -1] = 0
        yield
    finally:
        for table, ids, vectors in kept:
            table[ids, -1] = vectors


def _known_facts(model: Transformer, split: TokenSplit, num_facts: int, generator: np.random.Generator) -> list[int]:
    """Draw statements among those that are answered right, or take the best answered ones, in the split's order."""
    best, num_right = best_answered(model, split)
    if len(best) < 2:
        raise InputError(
            f"two facts or more are needed to compare one with others, and of the statements of {split.name} the "
            f"context of {model.config.context_length} tokens holds {len(best)}"
        )
    pool = best[: max(num_right, num_facts)]
    return sorted(generator.choice(pool, min(num_facts, len(pool)), replace=False).tolist())


def _fired_for(model: Transformer, split: TokenSplit, number: int) -> list[ExpertKey]:
    """Return the experts that fire at the tokens that predict a statement's answer, the strongest first."""
    assert split.facts is not None
    tokens = np.concatenate([[split.end_of_text_id], split.document(number)[:-1]])
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad(), recorded_firing(model) as firing:
        model(torch.from_numpy(tokens)[None].to(device))
    sizes: Counter[ExpertKey] = Counter()
    start = int(split.facts.answer_starts[number])  # the token before the answer, as the text begins one later
    for name, found in firing.items():
        ids, factors = (of_all[0, start:].flatten().tolist() for of_all in (found.ids, found.factors.abs()))
        for id_, factor in zip(ids, factors, strict=True):
            sizes[name, id_] += factor
    return [expert for expert, size in sizes.most_common() if size > 0]


def _others_than(fired: Sequence[Sequence[ExpertKey]], place: int) -> list[ExpertKey]:
    """Return the experts that fire for other facts and not for this one, in a fixed order."""
    everyone = {expert for experts in fired for expert in experts}
    return sorted(everyone - set(fired[place]))
