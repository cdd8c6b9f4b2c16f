"""Loading a decoder of transformers that was saved with replaced feed-forward layers."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tinyexperts.errors import InputError
from tinyexperts.hub.checked_weights import check_weights
from tinyexperts.hub.record import Replacement, read_record
from tinyexperts.hub.replacing import place


def load_replaced(folder: str | PathLike[str], **kwargs: Any) -> Any:
    """Load a model with the layers that `replace_feed_forward` put into it before it was saved.

    The model is made with these layers in place before any weight is read: the class is that which was saved, and no
    dense layer is loaded in vain.

    Args:
        folder (str): a folder that save_pretrained wrote, or a name on the hub.
        **kwargs: those of `from_pretrained`, such as dtype or device_map.

    Returns:
        The model, in evaluation mode as `from_pretrained` gives it; with output_loading_info=True, and what that tells.

    Raises:
        InputError: a configuration that records no replaced layers, or a layer that isn't one of this package; a class
            that transformers doesn't have; a checkpoint that lacks a tensor, has one too many, one of another shape, or
            one that is not finite.
    """
    of_weights = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype", "output_loading_info") if name in kwargs}
    config, kwargs = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
    with_info = of_weights.pop("output_loading_info", False)
    replacements = read_record(config)
    if not replacements:
        raise InputError(
            f"{folder} must have been saved after replace_feed_forward, but its config.json has no record (tinyexperts)"
        )
    for number, each in replacements.items():
        if each.layer is None:
            raise InputError(
                f"block {number} of {folder} holds a {each.class_name}, which is no layer of tinyexperts: make the "
                "model anew, put that layer in by replace_feed_forward, and load the tensors by load_state_dict"
            )
    saved_class = _saved_class(folder, config)
    model, info = _class_with(replacements, saved_class).from_pretrained(
        folder, config=config, **(kwargs | of_weights | {"output_loading_info": True, "ignore_mismatched_sizes": True})
    )
    check_weights(model, info, source=Path(folder))
    model.__class__ = saved_class
    return (model, info) if with_info else model


def _saved_class(folder: str | PathLike[str], config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise InputError(f"architectures of {folder} must be one class of transformers, got {names}")
    return found


def _class_with(replacements: dict[int, Replacement], saved_class: type[PreTrainedModel]) -> Any:
    """Return a class whose models have the layers as soon as they are made, on the meta device."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        saved_class.__init__(self, config, *args, **kwargs)
        width = config.get_text_config().hidden_size
        new = {}
        for number, each in replacements.items():
            assert each.layer is not None
            new[number] = (each.layer.build(width, sparse=each.sparse), each)
        place(self, new)

    return type(saved_class.__name__, (saved_class,), {"__init__": __init__, "__module__": saved_class.__module__})
