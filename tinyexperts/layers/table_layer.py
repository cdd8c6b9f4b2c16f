"""The table of a layer: a parameter of numbers, or integers and their scales, which are buffers, for inference.

In int8 each vector has a scale (ops/expert_mlp/int8.py), in 4 bits each group of 32 elements (ops/expert_mlp/int4.py).
Buffers are saved, loaded and moved with the layer, and no optimizer sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tinyexperts.errors import InputError
from tinyexperts.layers.feed_forward import FeedForward
from tinyexperts.ops import quantize_groups, quantize_vectors
from tinyexperts.ops.cpu.huge_pages import prefer_huge_pages
from tinyexperts.ops.expert_mlp.int4 import num_groups, packed_bytes, unpack_groups

TableBits = Literal[8, 4]


class TableLayer(FeedForward):
    """A layer with a table `experts` [N, E, D], which may be quantized.

    With `table_bits` (the layer is made so, or by `quantize_`) `experts` and `scales` are int8 [N, E, D] and fp32
    [N, E], or in 4 bits uint8 [N, E, ceil(D / 2)] and bf16 [N, E, ceil(D / 32)]. Casts leave them as they are. A table
    that is made so holds zeros until it is loaded. Tokens and the other parameters get their gradients and the table
    none; `tinyexperts.optim.build_optimizers` and the trainer refuse such a layer.
    """

    experts: Tensor
    """The table: a parameter, or integers."""
    scales: Tensor | None
    """What the integers are multiplied by; None for a table of numbers."""

    @property
    def table_bits(self) -> TableBits | None:
        """The bits of an element of a quantized table; None for a table of numbers."""
        if self.scales is None:
            return None
        return 8 if self.experts.dtype == torch.int8 else 4

    @property
    def row_bytes(self) -> int:
        """The bytes of an expert in the table, with its scales."""
        parts = [self.experts] if self.scales is None else [self.experts, self.scales]
        return sum(part.shape[1:].numel() * part.element_size() for part in parts)

    def vectors_of(self, ids: Tensor, vectors: slice = slice(None)) -> Tensor:
        """Return vectors of some experts as numbers, whatever the table holds.

        Args:
            ids (int64, [...]): the experts.
            vectors (slice): those of the E vectors that are wanted: slice(-1, None) for v.

        Returns:
            numbers (fp32, or the type of a table of numbers, [..., vectors, D]).
        """
        rows = self.experts[:, vectors][ids]
        if self.scales is None:
            return rows
        scales = self.scales[:, vectors][ids]
        if rows.dtype == torch.int8:
            return rows * scales.unsqueeze(-1)
        numbers = scales.new_empty((*rows.shape[:-1], self._table_dim), dtype=torch.float32)
        unpack_groups(rows.flatten(0, -2), scales.flatten(0, -2), numbers.flatten(0, -2))
        return numbers

    def quantize_(self, bits: TableBits) -> None:
        """Round the table to integers, which take its place.

        Args:
            bits (int): 8 (`tinyexperts.ops.quantize_vectors`) or 4 (`tinyexperts.ops.quantize_groups`).

        Raises:
            InputError: other bits, or a table that is quantized already, or not finite.
        """
        check_table_bits(bits)
        self.check_quantizable()
        integers = quantize_vectors(self.experts) if bits == 8 else quantize_groups(self.experts)
        del self.experts
        self._set_integers(*integers, dim=self._table_dim)

    def store_in_bf16_(self) -> None:
        """Round a table of numbers to bf16; it still can be trained (RowSparseAdam(stochastic_rounding=True)).

        Raises:
            InputError: the table is quantized.
        """
        if not isinstance(self.experts, nn.Parameter):
            raise InputError(f"a table of numbers is stored in bf16, got one quantized to {self.table_bits} bits")
        table = prefer_huge_pages(torch.empty_like(self.experts, dtype=torch.bfloat16))
        with torch.no_grad():
            table.copy_(self.experts)
        # A table shared by columns has a class of its own.
        self.experts = type(self.experts)(table, requires_grad=self.experts.requires_grad)

    def check_quantizable(self) -> None:
        """Check that `quantize_` can round the table.

        Raises:
            InputError: it is quantized already, or not finite.
        """
        if self.table_bits is not None:
            raise InputError(f"a table is quantized once, got one that has {self.table_bits} bits")
        if self.experts.numel() and not torch.stack(self.experts.detach().aminmax()).isfinite().all():
            raise InputError(
                f"a table that is quantized must be finite, got {_first_not_finite(self.experts.detach())}"
            )

    def _set_numbers(self, table: nn.Parameter) -> None:
        self.experts, self._table_dim = table, table.shape[2]
        self.register_buffer("scales", None)

    def _set_integers(self, table: Tensor, scales: Tensor, *, dim: int) -> None:
        self._table_dim = dim
        self.register_buffer("experts", table)
        self.register_buffer("scales", scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TableLayer:
        """Keep the type of the scales in a cast: the integers were chosen for them as they are."""
        before = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.scales is not None and self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse integers for numbers and numbers for integers, which may have the same shape."""
        stored = state_dict.get(f"{prefix}experts")
        both_numbers = isinstance(stored, Tensor) and stored.is_floating_point() and self.scales is None
        if isinstance(stored, Tensor) and stored.dtype != self.experts.dtype and not both_numbers:
            errors: list[str] = rest[-1]
            errors.append(
                f"{prefix}experts is {stored.dtype} and the layer's is {self.experts.dtype}: make the layer with the "
                "table_bits of what it loads"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)


def quantize_tables_(model: nn.Module, bits: TableBits) -> None:
    """Quantize the tables of all PEER and product-key-memory layers of a model, one after the other.

    Meanwhile it needs the memory of one quantized table and little more. A Transformer says so in its config if its own
    `quantize_` is called instead.

    Args:
        model (nn.Module): the model, or a layer, as it is after training; it is changed.
        bits (int): 8 or 4, as in TableLayer.quantize_.

    Raises:
        InputError: other bits, no table, or one that is quantized already, is shared by ranks, or is not finite; then
            nothing is changed.
    """
    layers = [module for module in model.modules() if isinstance(module, TableLayer)]
    check_table_bits(bits)
    if not layers:
        raise InputError(
            f"tables of PEER and product-key memory layers are quantized, and {type(model).__name__} has none"
        )
    for layer in layers:
        layer.check_quantizable()
    for layer in layers:
        layer.quantize_(bits)


def store_tables_in_bf16_(model: nn.Module) -> None:
    """Round the tables of PEER and product-key-memory layers of a model to bf16; quantized ones stay as they are."""
    for module in model.modules():
        if isinstance(module, TableLayer) and module.table_bits is None:
            module.store_in_bf16_()


def _first_not_finite(table: Tensor) -> float:
    return next(float(row[~row.isfinite()][0]) for row in table if not row.isfinite().all())


def check_table_bits(bits: int) -> None:
    """Check a number of bits.

    Raises:
        InputError: it is not 8 or 4.
    """
    if bits not in get_args(TableBits):
        raise InputError(f"table_bits must be 8 or 4, got {bits!r}")


def empty_integers(
    num_experts: int, num_vectors: int, dim: int, bits: TableBits, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Make a quantized table and its scales, which are zero.

    Raises:
        InputError: bits that are not 8 or 4.
    """
    check_table_bits(bits)
    shape = num_experts, num_vectors
    if bits == 8:
        table = torch.empty(*shape, dim, dtype=torch.int8, device=device)
        return prefer_huge_pages(table), torch.zeros(shape, dtype=torch.float32, device=device)
    table = torch.empty(*shape, packed_bytes(dim), dtype=torch.uint8, device=device)
    scales = torch.empty(*shape, num_groups(dim), dtype=torch.bfloat16, device=device)
    return prefer_huge_pages(table), prefer_huge_pages(scales).zero_()
