"""The token embedding and the head of a model, found by what they are, not by their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from tinyexperts.layers.feed_forward import FeedForward

# The parts that DistributedDataParallel, torch.compile, checkpointing and FullyShardedDataParallel put into names.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_EMBEDDING_NAMES, _HEAD_NAMES = {"embedding"}, {"head", "lm_head"}

_Path = tuple[str, ...]


def find_embedding_and_head(model: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Find the parameters of two dimensions or more of the embeddings and of the heads; tied ones are in both.

    The modules inside a FeedForward layer are neither. Embeddings are nn.Embedding and nn.EmbeddingBag, modules with a
    weight that are called embedding, and the result of a module's get_input_embeddings(). Heads are the result of a
    module's get_output_embeddings(). Outside of modules with this method, heads are modules with a weight that are
    called head or lm_head, and each nn.Linear that makes as many numbers as an embedding has rows and whose result no
    other layer takes.
    """
    modules = dict(_outside_feed_forward(model))
    named = [module for each in modules.values() for module in _ask(each, "get_input_embeddings") or ()]
    embeddings = {
        path: module
        for path, module in modules.items()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        or (_has_weight(module) and (_own_name(path) in _EMBEDDING_NAMES or module in named))
    }
    heads: list[nn.Module] = []
    searched = dict(modules)
    for path, module in modules.items():
        answer = _ask(module, "get_output_embeddings")
        if answer is not None:
            heads += answer
            searched = {other: each for other, each in searched.items() if other[: len(path)] != path}
    heads += [each for path, each in searched.items() if _has_weight(each) and _own_name(path) in _HEAD_NAMES]
    heads += [searched[path] for path in _makers_of_logits(model, embeddings) if path in searched]
    return _matrices_of(embeddings.values()), _matrices_of(heads)


def _outside_feed_forward(module: nn.Module, path: _Path = ()) -> Iterator[tuple[_Path, nn.Module]]:
    """Modules in their order, each by its path; no FeedForward layer and nothing in one."""
    if isinstance(module, FeedForward):
        return
    yield path, module
    for name, child in module.named_children():
        yield from _outside_feed_forward(child, (*path, name))


def _ask(module: nn.Module, method: str) -> list[nn.Module] | None:
    """Return the answer of a method of Hugging Face's models; None if there is no such method, or no answer."""
    function = getattr(module, method, None)
    if not callable(function):
        return None
    try:
        answer = function()
    except NotImplementedError:
        return None
    return [answer] if isinstance(answer, nn.Module) else []


def _has_weight(module: nn.Module) -> bool:
    """Return True if it has a matrix of weights of its own, perhaps under a parametrization."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2


def _own_name(path: _Path) -> str:
    return next((name for name in reversed(path) if name not in _WRAPPERS), "")


def _matrices_of(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters() if parameter.dim() >= 2}


def _makers_of_logits(model: nn.Module, embeddings: dict[_Path, nn.Module]) -> list[_Path]:
    """Return the paths of linear layers as wide as the vocabulary whose result no layer takes.

    An MLP may be as wide as the vocabulary, and so may the whole model, of bytes for example. So a layer that takes as
    many numbers takes them from the layers nearest to it in the tree of modules, and a layer is no head either if its
    twin in another block is taken from.
    """
    modules = {tuple(filter(None, name.split("."))): module for name, module in model.named_modules()}
    found = []
    for size in {rows for module in embeddings.values() if (rows := getattr(module, "num_embeddings", None))}:
        makers = [
            path
            for path, module in modules.items()
            if (isinstance(module, nn.Linear) and module.out_features == size)
            or (path in embeddings and getattr(module, "embedding_dim", None) == size)
        ]
        taken: set[_Path] = set()
        order = {path: place for place, path in enumerate(modules)}
        for path, module in modules.items():
            if size in (getattr(module, "in_features", None), getattr(module, "in_channels", None)):
                taken.update(_nearest(path, makers, embeddings, order))
        twins = {_in_any_block(path, modules) for path in taken}
        found += [
            path
            for path in makers
            if isinstance(modules[path], nn.Linear) and _in_any_block(path, modules) not in twins
        ]
    return found


def _nearest(
    taker: _Path, makers: list[_Path], embeddings: dict[_Path, nn.Module], order: dict[_Path, int]
) -> list[_Path]:
    """Find the makers in the smallest module that holds the taker and one of them.

    In a module that holds an embedding, and so perhaps the head, only those that come before the taker.
    """
    for depth in range(len(taker) - 1, -1, -1):
        scope = taker[:depth]
        holds_embedding = any(path[:depth] == scope for path in embeddings)
        nearest = [
            maker
            for maker in makers
            if maker[:depth] == scope and maker != taker and (not holds_embedding or order[maker] < order[taker])
        ]
        if nearest:
            return nearest
    return []


def _in_any_block(path: _Path, modules: dict[_Path, nn.Module]) -> tuple[object, ...]:
    """Return a key that is equal for a layer's twins in other blocks: path without numbers, and the block's shapes."""
    numbered = [depth for depth in range(1, len(path)) if re.search(r"\d", path[depth - 1])]
    if not numbered:
        return path
    block = modules[path[: numbered[-1]]]
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return (*(re.sub(r"\d+", "", name) for name in path[:-1]), path[-1], shapes)
