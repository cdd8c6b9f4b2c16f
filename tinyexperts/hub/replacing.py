"""A layer of this package in place of the feed-forward layers of a decoder of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tinyexperts.errors import InputError
from tinyexperts.hub.real_tokens import looks_at_other_tokens, tell_of_real_tokens
from tinyexperts.hub.record import Replacement, read_record, replacement_of, write_record
from tinyexperts.layers import FeedForward, ProductKeyLayer

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)

# Where transformers' decoders keep a block's feed-forward layer.
_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


def replace_feed_forward(model: AnyModel, layers: Iterable[int], make: Callable[[int], nn.Module]) -> AnyModel:
    """Put new layers in place of the feed-forward layers of some of a decoder's blocks.

        model = AutoModelForCausalLM.from_pretrained(...)
        replace_feed_forward(model, layers=[12], make=lambda d_model: PEER(d_model, 256**2, num_heads=4))

    The block's norms and residual connection stay. A new layer gets the device, dtype and training mode of the old
    one; whether its parameters require gradients is left as `make` made it. Query batch norm and mixtures of experts
    leave out padding, which they see in the attention mask that the block is given. `model.config.tinyexperts` records
    the layers, so that `load_replaced` can load what `model.save_pretrained` saves; a plain `from_pretrained` can't,
    and draws dense layers anew. Where a block expects a tuple, as that of a mixture of experts with its router's
    scores, the new layer's hook gives the output and None for the rest.

    Args:
        model (PreTrainedModel): a decoder with its weights, not yet sharded, quantized or wrapped. It is changed.
        layers (Iterable[int]): the blocks, counted from 0.
        make (Callable[[int], Module]): makes the layer of one block from the width D of the hidden states. It maps x
            (float, [..., D]) to y of the same shape.

    Returns:
        The same model.

    Raises:
        InputError: a model without one list of blocks that have a feed-forward layer of their own, such as OPT, or
            whose layer takes more than the hidden states; numbers that are none of its blocks, or the same twice; a
            block that was replaced before; a new layer of another width; weights that are quantized, sharded,
            offloaded or on the meta device. The model is unchanged then.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model must be a model of transformers (PreTrainedModel), got {type(model).__name__}")
    blocks = decoder_blocks(model)
    numbers = _checked(list(layers), len(blocks))
    recorded = read_record(model.config)
    width: int = model.config.get_text_config().hidden_size
    new: dict[int, tuple[nn.Module, Replacement]] = {}
    for number in numbers:
        if number in recorded:
            raise InputError(
                f"block {number} must have a feed-forward layer of {type(model).__name__}, got one replaced before, by "
                f"{recorded[number].class_name}, as the configuration says: load_replaced loads such a model, and "
                "models that share a configuration need one each"
            )
        old = getattr(blocks[number], _name_of_feed_forward(blocks[number], number))
        weight = _weight_of(old, f"the feed-forward layer {type(old).__name__} of block {number}")
        num_outputs = _num_outputs(old, weight, width, number)
        layer = make(width)
        if not isinstance(layer, nn.Module):
            raise InputError(f"make must return a module, got {type(layer).__name__}")
        if isinstance(layer, ProductKeyLayer) and layer.ranks is not None:
            raise InputError("make must return a layer with its whole table, got one whose table ranks share")
        layer.to(device=weight.device, dtype=weight.dtype)
        _check_output(layer, weight, width)
        looks_at_other_tokens(layer)
        for each in layer.modules():  # model.init_weights() would draw them again, as it draws the layers of theirs
            each._is_hf_initialized = True  # type: ignore[assignment]
        new[number] = (layer.train(old.training), replacement_of(layer, num_outputs))
    place(model, new)
    return model


def place(model: PreTrainedModel, new: Mapping[int, tuple[nn.Module, Replacement]]) -> None:
    """Put layers into the blocks of these numbers, and record them.

    Raises:
        InputError: as in replace_feed_forward, of the model and the numbers.
    """
    blocks = decoder_blocks(model)
    _checked(list(new), len(blocks))
    for number, (layer, replacement) in new.items():
        block = blocks[number]
        if looks_at_other_tokens(layer):
            assert isinstance(layer, FeedForward)
            tell_of_real_tokens(layer, block)
        if replacement.num_outputs > 1:
            layer.register_forward_hook(_AsTuple(replacement.num_outputs))
        setattr(block, _name_of_feed_forward(block, number), layer)
    write_record(model.config, read_record(model.config) | {number: each for number, (_, each) in new.items()})


class _AsTuple:
    """The hook of a layer whose block expects a tuple: the output, and None for what only the old layer had."""

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> tuple[Tensor | None, ...]:
        return (output, *(None for _ in range(self.num_outputs - 1)))


def feed_forward_of(model: PreTrainedModel, number: int) -> nn.Module:
    """Return the feed-forward layer of a block of a decoder."""
    block = decoder_blocks(model)[number]
    layer: nn.Module = getattr(block, _name_of_feed_forward(block, number))
    return layer


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a decoder.

    Raises:
        InputError: not one list of blocks that have a feed-forward layer of their own.
    """
    decoder: nn.Module = model.get_decoder()
    lists = [each for each in decoder.modules() if isinstance(each, nn.ModuleList)]
    found = [each for each in lists if any(_names_in(block) for block in each)]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} must have one list of blocks whose feed-forward layer is a module of its own "
            f"({', '.join(_NAMES)}), got {len(found)} such lists; its lists are of "
            f"{', '.join(sorted({type(block).__name__ for each in lists for block in each})) or 'nothing'}"
        )
    return found[0]


def _names_in(block: nn.Module) -> list[str]:
    return [name for name in _NAMES if isinstance(getattr(block, name, None), nn.Module)]


def _name_of_feed_forward(block: nn.Module, number: int) -> str:
    names = _names_in(block)
    if len(names) != 1:
        raise InputError(
            f"block {number}, {type(block).__name__}, must have one feed-forward layer ({', '.join(_NAMES)}), got "
            f"{' and '.join(names) or 'none'}"
        )
    return names[0]


def _checked(layers: list[int], num_blocks: int) -> list[int]:
    whole = all(isinstance(number, int) for number in layers)
    if not layers or len(set(layers)) != len(layers) or not whole or not all(0 <= n < num_blocks for n in layers):
        raise InputError(
            f"layers must be distinct numbers of blocks between 0 and {num_blocks - 1}, at least one, got {layers}"
        )
    return layers


def _weight_of(old: nn.Module, what: str) -> Tensor:
    """Return a parameter of the old layer, whose device and dtype the new one gets."""
    parameters = list(old.parameters())
    if not parameters:
        raise InputError(f"{what} must have weights, got none")
    for each in parameters:
        if each.is_meta:
            raise InputError(f"{what} must have its weights in memory, got one on the meta device: load them first")
        if isinstance(each, DTensor):
            raise InputError(f"{what} must have whole weights, got a sharded one: replace it before it is sharded")
        if each.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            dtype = str(each.dtype).removeprefix("torch.")
            raise InputError(f"{what} must have weights of 16 bits or more, got {dtype}: replace it unquantized")
    return parameters[0]


@torch.no_grad()
def _output_of_two_tokens(layer: nn.Module, weight: Tensor, width: int) -> object:
    """Call a layer in evaluation mode, in which nothing in it moves; leaves each part in the mode that it was in."""
    modes = {each: each.training for each in layer.modules()}
    try:
        return layer.eval()(torch.zeros(1, 2, width, device=weight.device, dtype=weight.dtype))
    finally:
        for each, mode in modes.items():
            each.training = mode


def _num_outputs(old: nn.Module, weight: Tensor, width: int, number: int) -> int:
    """Count what the old layer returns: 1 for a tensor, else the parts of its tuple."""
    name = type(old).__name__
    try:
        output = _output_of_two_tokens(old, weight, width)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the feed-forward layer {name} of block {number} must take the hidden states alone, of width {width}: "
            f"{reason}"
        ) from None
    parts = output if isinstance(output, tuple) else (output,)
    if not parts or not isinstance(parts[0], Tensor) or parts[0].shape != (1, 2, width):
        raise InputError(
            f"the feed-forward layer {name} of block {number} must return hidden states [1, 2, {width}] for two "
            f"tokens, got {_described(output)}"
        )
    return len(parts)


def _check_output(layer: nn.Module, weight: Tensor, width: int) -> None:
    rule = f"the layer that make returns must map two tokens [1, 2, {width}] to as many, of {weight.dtype}"
    try:
        output = _output_of_two_tokens(layer, weight, width)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{rule}; {type(layer).__name__} fails: {reason}") from None
    if not isinstance(output, Tensor) or output.shape != (1, 2, width) or output.dtype != weight.dtype:
        raise InputError(f"{rule}, got {_described(output)} from {type(layer).__name__}")


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"{list(output.shape)} of {output.dtype}"
    return type(output).__name__
