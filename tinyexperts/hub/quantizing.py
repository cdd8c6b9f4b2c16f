"""Quantized tables in models of transformers, and in what their config.json says."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedModel

from tinyexperts.errors import InputError
from tinyexperts.hub.causal_lm import TinyExpertsForCausalLM
from tinyexperts.hub.record import read_record, replacement_of, write_record
from tinyexperts.hub.replacing import feed_forward_of
from tinyexperts.layers import TableBits, TableLayer
from tinyexperts.layers import quantize_tables_ as quantize_tables_of_module_

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


def quantize_tables_(model: AnyModel, bits: TableBits) -> AnyModel:
    """Quantize the tables of experts of a model, so that what `save_pretrained` writes can be loaded.

    Args:
        model (PreTrainedModel): a TinyExpertsForCausalLM, or a decoder with layers that `replace_feed_forward` put into
            it. It is changed.
        bits (int): 8 or 4.

    Returns:
        The same model.

    Raises:
        InputError: another model, or what `tinyexperts.layers.quantize_tables_` refuses; the model is unchanged then.
    """
    if isinstance(model, TinyExpertsForCausalLM):
        model.model.quantize_(bits)
        return model
    replaced = read_record(model.config) if isinstance(model, PreTrainedModel) else {}
    if not replaced:
        raise InputError(
            "model must be a TinyExpertsForCausalLM, or a decoder with layers of replace_feed_forward, got "
            f"{type(model).__name__}"
        )
    quantize_tables_of_module_(model, bits)
    layers = {number: feed_forward_of(model, number) for number in replaced}
    write_record(
        model.config,
        {
            number: replacement_of(layer, replaced[number].num_outputs)
            if isinstance(layer, TableLayer)
            else replaced[number]
            for number, layer in layers.items()
        },
    )
    return model
