"""The two operations of the CPU's kernels with vectors of a table: products with a token, and sums into a token.

stored_vectors.py reads the vectors and prefetches later ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from numba.core import types
from numba.extending import intrinsic

from tinyexperts.ops.cpu import simd
from tinyexperts.ops.cpu.compile import CACHE_LINE_BYTES, inlined, prefetch
from tinyexperts.ops.expert_mlp.stored_vectors import Block, GroupedVectors, PlainVectors, StoredVectors

_tuple_of: Callable[[Any, int], Any] = cast(Any, types.UniTuple)
# How far ahead to prefetch: far enough to cover the memory's latency, and little enough for a core's second cache.
_AHEAD_BYTES = 1 << 13
_LEAST_AHEAD = 8


@inlined
def pairs_ahead(experts: Any) -> int:
    """Return the number of pairs between the one that is read and the one that is prefetched."""
    row_bytes = max(1, experts.shape[1] * experts.shape[2] * experts.itemsize)
    return int(max(_LEAST_AHEAD, _AHEAD_BYTES // row_bytes))


@inlined
def prefetch_scales_of_4(scales: Any, ids: Any, pair: int) -> None:
    """Prefetch the scales [N, E] or [N, E, G] of four pairs' experts, if the table has any."""
    if len(scales) > 0:
        row_bytes = scales.strides[0]
        for later in range(pair, pair + 4):
            row = scales.ctypes.data + ids[min(later, len(ids) - 1)] * row_bytes
            for offset in range(0, row_bytes, CACHE_LINE_BYTES):
                prefetch(row + offset)


def _stored_vectors(
    context: Any, builder: Any, signature: Any, arguments: Any, dim: Any, number: Any, count: int
) -> StoredVectors:
    """Return the vectors that the first six arguments of `products` and `add` name."""
    names = ("experts", "scales", "ids", "pair", "pair_ahead", "vector")
    operands = dict(zip(names, zip(signature.args, arguments, strict=True), strict=False))
    kind = GroupedVectors if signature.args[0].dtype == types.uint8 else PlainVectors
    return kind(context, builder, operands, dim, number, count)


def _products(count: int) -> Any:
    """Make the intrinsic that multiplies `count` vectors with one token."""

    @intrinsic
    def products(
        typing_context: Any,
        experts: Any,
        scales: Any,
        ids: Any,
        pair: Any,
        pair_ahead: Any,
        vector: Any,
        x: Any,
        m: Any,
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = simd.array_data(context, builder, signature.args[6], arguments[6])
            _, dim = simd.array_shape(context, builder, signature.args[6], arguments[6])
            number = data.type.pointee
            vectors = _stored_vectors(context, builder, signature, arguments, dim, number, count)
            token = builder.gep(data, [builder.mul(arguments[7], dim)])
            # One sum of each vector for each number of lanes.
            sums = {
                lanes: [simd.variable(builder, simd.constant(number, lanes, 0.0)) for _ in range(count)]
                for lanes in vectors.lane_counts
            }

            def use(block: Block) -> None:
                # The token's lanes are loaded once for all vectors.
                x_lanes = [simd.load(builder, token, d, block.lanes) for d in block.starts]
                for i, sum_ in enumerate(sums[block.lanes]):
                    before, scale = builder.load(sum_), vectors.scale(i, block)
                    products = zip(vectors.values(i, block), x_lanes, strict=True)
                    if scale is None:
                        total = _add_products(builder, before, products)
                    else:
                        total = _add_products(
                            builder,
                            before,
                            [(_add_products(builder, None, products), simd.splat(builder, scale, block.lanes))],
                        )
                    builder.store(total, sum_)

            vectors.visit(use)
            totals = [
                functools.reduce(builder.fadd, (simd.total(builder, builder.load(each[i])) for each in sums.values()))
                for i in range(count)
            ]
            return context.make_tuple(builder, signature.return_type, totals)

        intp = types.intp
        return _tuple_of(x.dtype, count)(experts, scales, ids, intp, intp, intp, x, intp), code

    return products


def _add_products(builder: Any, total: Any, factors: Any) -> Any:
    """Return the total (None: nothing yet) and the products of pairs of factors, added in their order."""
    for a, b in factors:
        # "contract" lets a processor fuse product and sum.
        product = builder.fmul(a, b, flags=["contract"])
        total = product if total is None else builder.fadd(total, product, flags=["contract"])
    return total


def _add(count: int) -> Any:
    """Make the intrinsic that adds `count` vectors, each times its factor, to one token."""

    @intrinsic
    def add(
        typing_context: Any,
        experts: Any,
        scales: Any,
        ids: Any,
        pair: Any,
        pair_ahead: Any,
        vector: Any,
        factors: Any,
        y: Any,
        m: Any,
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            factors = [builder.extract_value(arguments[6], i) for i in range(count)]
            data = simd.array_data(context, builder, signature.args[7], arguments[7])
            _, dim = simd.array_shape(context, builder, signature.args[7], arguments[7])
            number = data.type.pointee
            vectors = _stored_vectors(context, builder, signature, arguments, dim, number, count)
            token = builder.gep(data, [builder.mul(arguments[8], dim)])

            def use(block: Block) -> None:
                # Read and written once for all vectors, which are added in their order.
                y_lanes = [simd.load(builder, token, d, block.lanes) for d in block.starts]
                for i, factor in enumerate(factors):
                    scale = vectors.scale(i, block)
                    factor = factor if scale is None else builder.fmul(factor, scale)
                    factor_lanes = simd.splat(builder, factor, block.lanes)
                    for place, values in enumerate(vectors.values(i, block)):
                        y_lanes[place] = _add_products(builder, y_lanes[place], [(values, factor_lanes)])
                for d, lanes in zip(block.starts, y_lanes, strict=True):
                    simd.store(builder, lanes, token, d)

            vectors.visit(use)
            return context.get_dummy_value()

        intp = types.intp
        return types.void(experts, scales, ids, intp, intp, intp, _tuple_of(y.dtype, count), y, intp), code

    return add


# products(experts, scales, ids [M*P], pair, pair_ahead, vector, x, m): experts[ids[pair + i], vector] . x[m], a tuple.
products_of_4: Callable[..., Any] = cast(Any, _products(4))
products_of_1: Callable[..., Any] = cast(Any, _products(1))
# add(experts, scales, ids, pair, pair_ahead, vector, factors, y, m): y[m] += the sum of factors[i] * vector i.
add_4: Callable[..., None] = cast(Any, _add(4))
add_1: Callable[..., None] = cast(Any, _add(1))
