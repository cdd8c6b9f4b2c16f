"""The two operations of the CPU's kernels with vectors of a table: products with a token, and sums into a token.

The limit is the memory: the rows of a token are anywhere in the table. So each vector is read once, those of four
experts side by side, and meanwhile the same vectors of the experts further on (in the next token, too) are prefetched,
a cache line at a time. Requested all at once they would fill the queue to the memory and hold up the arithmetic;
requested in one of the two passes only, the memory would rest in the other (1.6 and 1.2 times the time at D = 256).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from numba.core import cgutils, types
from numba.extending import intrinsic

from tinyexperts.ops.cpu import simd
from tinyexperts.ops.cpu.compile import CACHE_LINE_BYTES, inlined, prefetch

_tuple_of: Callable[[Any, int], Any] = cast(Any, types.UniTuple)
_LANES = 16
# How far ahead to prefetch: far enough to cover the memory's latency, and little enough for a core's second cache.
_AHEAD_BYTES = 1 << 14
_LEAST_AHEAD = 8


@inlined
def pairs_ahead(experts: Any) -> int:
    """Return the number of pairs between the one that is read and the one that is prefetched."""
    row_bytes = max(1, experts.shape[1] * experts.shape[2] * experts.itemsize)
    return int(max(_LEAST_AHEAD, _AHEAD_BYTES // row_bytes))


@inlined
def prefetch_scales_of_4(scales: Any, ids: Any, pair: int) -> None:
    """Prefetch the scales [N, E] of four pairs' experts, if the table has any."""
    if len(scales) > 0:
        for later in range(pair, pair + 4):
            prefetch(scales.ctypes.data + ids[min(later, len(ids) - 1)] * scales.shape[1] * scales.itemsize)


class _ExpertVectors:
    """The same vector of `count` experts to read, and of as many to prefetch, while code is made."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, count: int) -> None:
        experts, ids, pair, pair_ahead, vector = arguments[:5]
        self._context, self._builder, self._dtype = context, builder, signature.args[0].dtype
        self._bytes = self._dtype.bitwidth // 8
        data = simd.array_data(context, builder, signature.args[0], experts)
        id_data = simd.array_data(context, builder, signature.args[1], ids)
        _, num_vectors, self.dim = simd.array_shape(context, builder, signature.args[0], experts)
        (num_ids,) = simd.array_shape(context, builder, signature.args[1], ids)

        # Offsets are of numba's intp, 64 bits: N * E * D may pass 2^31.
        def start(position: Any) -> Any:
            row = builder.load(builder.gep(id_data, [position]))
            return builder.gep(data, [builder.mul(builder.add(builder.mul(row, num_vectors), vector), self.dim)])

        last = builder.sub(num_ids, pair.type(1))
        self._now = [start(builder.add(pair, pair.type(i))) for i in range(count)]
        self._ahead = []
        for i in range(count):
            position = builder.add(pair_ahead, pair.type(i))
            # Beyond the end the last one.
            self._ahead.append(start(builder.select(builder.icmp_signed("<", position, last), position, last)))

    def load(self, i: int, d: Any, lanes: int, number: Any) -> Any:
        """Return elements of the i-th vector from d on, as numbers of LLVM's type `number`."""
        values = simd.load(self._builder, self._now[i], d, lanes)
        return simd.widen(self._context, self._builder, values, self._dtype, number)

    def visit(self, use: Callable[[Any, int], None]) -> None:
        """Make the code that calls use(d, lanes) over all D elements, in cache lines, and prefetches as many lines."""
        builder, dim = self._builder, self.dim
        elements = CACHE_LINE_BYTES // self._bytes
        # A step is whole lines and whole lanes: 16 lanes are one line of fp32, two of fp64 and half a line of bf16.
        step = max(_LANES, elements)
        whole = builder.sub(dim, builder.and_(dim, dim.type(step - 1)))
        with cgutils.for_range_slice(builder, dim.type(0), whole, dim.type(step), dim.type) as (first, _):
            for offset in range(0, step, elements):
                self._prefetch(builder.add(first, dim.type(offset)))
            for offset in range(0, step, _LANES):
                use(builder.add(first, dim.type(offset)), _LANES)
        # The rest of a D that no step divides: one line to prefetch, one element at a time.
        with builder.if_then(builder.icmp_signed("<", whole, dim)):
            self._prefetch(whole)
            with cgutils.for_range_slice(builder, whole, dim, dim.type(1), dim.type) as (d, _):
                use(d, 1)

    def _prefetch(self, d: Any) -> None:
        for pointer in self._ahead:
            simd.prefetch(self._builder, self._builder.gep(pointer, [d]))


def _products(count: int) -> Any:
    """Make the intrinsic that multiplies `count` vectors with one token."""

    @intrinsic
    def products(
        typing_context: Any, experts: Any, ids: Any, pair: Any, pair_ahead: Any, vector: Any, x: Any, m: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = _ExpertVectors(context, builder, signature, arguments, count)
            data = simd.array_data(context, builder, signature.args[5], arguments[5])
            number = data.type.pointee
            token = builder.gep(data, [builder.mul(arguments[6], vectors.dim)])
            # One sum for the steps' lanes and one for the rest, of each vector.
            sums = {
                lanes: [simd.variable(builder, simd.constant(number, lanes, 0.0)) for _ in range(count)]
                for lanes in (_LANES, 1)
            }

            def use(d: Any, lanes: int) -> None:
                # The token's lanes are loaded once for all vectors. "contract" lets a processor fuse product and sum.
                x_lanes = simd.load(builder, token, d, lanes)
                for i, sum_ in enumerate(sums[lanes]):
                    product = builder.fmul(vectors.load(i, d, lanes, number), x_lanes, flags=["contract"])
                    builder.store(builder.fadd(builder.load(sum_), product, flags=["contract"]), sum_)

            vectors.visit(use)
            totals = [
                builder.fadd(*(simd.total(builder, builder.load(sums[lanes][i])) for lanes in (_LANES, 1)))
                for i in range(count)
            ]
            return context.make_tuple(builder, signature.return_type, totals)

        intp = types.intp
        return _tuple_of(x.dtype, count)(experts, ids, intp, intp, intp, x, intp), code

    return products


def _add(count: int) -> Any:
    """Make the intrinsic that adds `count` vectors, each times its factor, to one token."""

    @intrinsic
    def add(
        typing_context: Any,
        experts: Any,
        ids: Any,
        pair: Any,
        pair_ahead: Any,
        vector: Any,
        factors: Any,
        y: Any,
        m: Any,
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = _ExpertVectors(context, builder, signature, arguments, count)
            factors = [builder.extract_value(arguments[5], i) for i in range(count)]
            data = simd.array_data(context, builder, signature.args[6], arguments[6])
            number = data.type.pointee
            token = builder.gep(data, [builder.mul(arguments[7], vectors.dim)])

            def use(d: Any, lanes: int) -> None:
                # Read and written once for all vectors, which are added in their order.
                y_lanes = simd.load(builder, token, d, lanes)
                for i, factor in enumerate(factors):
                    factor_lanes = simd.splat(builder, factor, lanes)
                    product = builder.fmul(vectors.load(i, d, lanes, number), factor_lanes, flags=["contract"])
                    y_lanes = builder.fadd(y_lanes, product, flags=["contract"])
                simd.store(builder, y_lanes, token, d)

            vectors.visit(use)
            return context.get_dummy_value()

        intp = types.intp
        return types.void(experts, ids, intp, intp, intp, _tuple_of(y.dtype, count), y, intp), code

    return add


# products(experts, ids [M*P], pair, pair_ahead, vector, x, m): experts[ids[pair + i], vector] . x[m], a tuple.
products_of_4: Callable[..., Any] = cast(Any, _products(4))
products_of_1: Callable[..., Any] = cast(Any, _products(1))
# add(experts, ids, pair, pair_ahead, vector, factors, y, m): y[m] += the sum of factors[i] * experts[.., vector].
add_4: Callable[..., None] = cast(Any, _add(4))
add_1: Callable[..., None] = cast(Any, _add(1))
