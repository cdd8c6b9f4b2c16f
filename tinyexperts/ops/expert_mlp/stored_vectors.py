"""The vectors of a table as the CPU's kernels read them, while their code is made: where they are, and their numbers.

The limit is the memory: the rows of a token are anywhere in the table. So each vector is read once, those of four
experts side by side, and meanwhile the same vectors of the experts further on (in the next token, too) are prefetched,
a cache line at a time. Requested all at once they would fill the queue to the memory and hold up the arithmetic;
requested in one of the two passes only, the memory would rest in the other (1.6 and 1.2 times the time at D = 256).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from tinyexperts.ops.cpu import simd
from tinyexperts.ops.cpu.compile import CACHE_LINE_BYTES
from tinyexperts.ops.expert_mlp.int4 import GROUP

LANES = 16


class Block(NamedTuple):
    """Elements of each vector that are used together: `lanes` elements from each of `starts` on."""

    lanes: int
    starts: tuple[Any, ...]
    stored: Any
    """The place of the first of them in the stored vector."""
    halves: tuple[int, ...] = ()
    """The four bits of the stored bytes that hold the elements of each start, low (0) or high (1); for 4 bits."""
    group: Any = None
    """The number of their group; for 4 bits."""


class StoredVectors(ABC):
    """The same vector of `count` experts to read, and of as many to prefetch.

    Args:
        operands (dict[str, tuple[Any, Any]]): numba's type and LLVM's value of the arguments `experts`, `scales`,
            `ids`, `pair`, `pair_ahead` and `vector`.
        dim (Any): D.
        count (int): experts.
    """

    lane_counts: ClassVar[tuple[int, ...]] = (LANES, 1)
    """The numbers of lanes that blocks have."""

    def __init__(
        self, context: Any, builder: Any, operands: dict[str, tuple[Any, Any]], dim: Any, number: Any, count: int
    ) -> None:
        self.context, self.builder, self.dim, self.number = context, builder, dim, number
        experts_type, experts = operands["experts"]
        self.dtype = experts_type.dtype
        data = simd.array_data(context, builder, experts_type, experts)
        id_data = simd.array_data(context, builder, *operands["ids"])
        _, num_vectors, self.num_stored = simd.array_shape(context, builder, experts_type, experts)
        (num_ids,) = simd.array_shape(context, builder, *operands["ids"])
        pair, pair_ahead, vector = (operands[name][1] for name in ("pair", "pair_ahead", "vector"))
        last = builder.sub(num_ids, pair.type(1))

        # Offsets are of numba's intp, 64 bits: N * E * D may pass 2^31.
        def number_of(position: Any) -> Any:
            row = builder.load(builder.gep(id_data, [position]))
            return builder.add(builder.mul(row, num_vectors), vector)

        self.numbers = [number_of(builder.add(pair, pair.type(i))) for i in range(count)]
        """The number of each vector among all of the table."""
        self._now = [builder.gep(data, [builder.mul(each, self.num_stored)]) for each in self.numbers]
        self._ahead = []
        for i in range(count):
            position = builder.add(pair_ahead, pair.type(i))
            # Beyond the end the last one.
            position = builder.select(builder.icmp_signed("<", position, last), position, last)
            self._ahead.append(builder.gep(data, [builder.mul(number_of(position), self.num_stored)]))

    @abstractmethod
    def values(self, i: int, block: Block) -> list[Any]:
        """Return the elements of a block of the i-th vector, lanes for each of its starts, without their scale."""

    @abstractmethod
    def scale(self, i: int, block: Block) -> Any:
        """Return the scale of a block of the i-th vector; None if it has none of its own."""

    @abstractmethod
    def visit(self, use: Callable[[Block], None]) -> None:
        """Make the code that calls `use` with all D elements, in cache lines, and prefetches as many lines."""

    def load(self, i: int, block: Block) -> Any:
        """Return what is stored of a block of the i-th vector."""
        return simd.load(self.builder, self._now[i], block.stored, block.lanes)

    def prefetch(self, stored: Any) -> None:
        """Ask for the cache line of an element of each vector further on."""
        for pointer in self._ahead:
            simd.prefetch(self.builder, self.builder.gep(pointer, [stored]))


class PlainVectors(StoredVectors):
    """Vectors of a table [N, E, D] whose elements are numbers of any type; a scale of a whole vector is not seen."""

    def values(self, i: int, block: Block) -> list[Any]:
        return [simd.widen(self.context, self.builder, self.load(i, block), self.dtype, self.number)]

    def scale(self, i: int, block: Block) -> Any:
        return None

    def visit(self, use: Callable[[Block], None]) -> None:
        builder, dim = self.builder, self.dim
        elements = CACHE_LINE_BYTES // (self.dtype.bitwidth // 8)
        # A step is whole lines and whole lanes: 16 lanes are one line of fp32, two of fp64 and half a line of bf16.
        step = max(LANES, elements)
        whole = builder.sub(dim, builder.and_(dim, dim.type(step - 1)))
        with cgutils.for_range_slice(builder, dim.type(0), whole, dim.type(step), dim.type) as (first, _):
            for offset in range(0, step, elements):
                self.prefetch(builder.add(first, dim.type(offset)))
            for offset in range(0, step, LANES):
                d = builder.add(first, dim.type(offset))
                use(Block(LANES, (d,), d))
        # The rest of a D that no step divides: one line to prefetch, whole lanes, then one element at a time.
        with builder.if_then(builder.icmp_signed("<", whole, dim)):
            self.prefetch(whole)
            start = whole
            if step > LANES:
                start = builder.sub(dim, builder.and_(dim, dim.type(LANES - 1)))
                with cgutils.for_range_slice(builder, whole, start, dim.type(LANES), dim.type) as (d, _):
                    use(Block(LANES, (d,), d))
            with cgutils.for_range_slice(builder, start, dim, dim.type(1), dim.type) as (d, _):
                use(Block(1, (d,), d))


class GroupedVectors(StoredVectors):
    """Vectors of a table in 4 bits (int4.py), with scales [N, E, G]."""

    lane_counts = (LANES, LANES // 2, 1)

    def __init__(
        self, context: Any, builder: Any, operands: dict[str, tuple[Any, Any]], dim: Any, number: Any, count: int
    ) -> None:
        super().__init__(context, builder, operands, dim, number, count)
        scales_type, scales = operands["scales"]
        self._scale_dtype = scales_type.dtype
        data = simd.array_data(context, builder, scales_type, scales)
        num_groups = simd.array_shape(context, builder, scales_type, scales)[2]
        self._scales = [builder.gep(data, [builder.mul(each, num_groups)]) for each in self.numbers]

    def values(self, i: int, block: Block) -> list[Any]:
        builder, lanes = self.builder, block.lanes
        codes = builder.zext(self.load(i, block), ir.VectorType(ir.IntType(32), lanes))

        def numbers(half: int) -> Any:
            # Codes become the last bits of the fraction of 2^23 or, four bits higher, of 2^19: a float without shift or
            # conversion, and exact. Then the 2^23 is taken off again, and the 8 that codes are above their levels.
            base = (23, 19)[half]
            bits = simd.constant(ir.IntType(32), lanes, (127 + base) << 23)
            mask = simd.constant(ir.IntType(32), lanes, (0x0F, 0xF0)[half])
            floats = builder.bitcast(builder.or_(builder.and_(codes, mask), bits), ir.VectorType(ir.FloatType(), lanes))
            levels = builder.fsub(floats, simd.constant(ir.FloatType(), lanes, 2.0**base + 8))
            return levels if self.number == ir.FloatType() else builder.fpext(levels, ir.VectorType(self.number, lanes))

        return [numbers(half) for half in block.halves]

    def scale(self, i: int, block: Block) -> Any:
        scale = simd.load(self.builder, self._scales[i], block.group, 1)
        wide = simd.widen(self.context, self.builder, scale, self._scale_dtype, self.number)
        return self.builder.extract_element(wide, ir.IntType(32)(0))

    def visit(self, use: Callable[[Block], None]) -> None:
        builder, dim, half = self.builder, self.dim, GROUP // 2
        intp = dim.type
        num_whole = builder.sdiv(dim, intp(GROUP))
        whole = builder.mul(num_whole, intp(half))
        with cgutils.for_range_slice(builder, intp(0), self.num_stored, intp(CACHE_LINE_BYTES), intp) as (line, _):
            self.prefetch(line)
            end = builder.add(line, intp(CACHE_LINE_BYTES))
            end = builder.select(builder.icmp_signed("<", end, whole), end, whole)
            with cgutils.for_range_slice(builder, line, end, intp(half), intp) as (stored, _):
                low = builder.add(stored, stored)
                high = builder.add(low, intp(half))
                use(Block(LANES, (low, high), stored, (0, 1), builder.sdiv(stored, intp(half))))
        # The group at the end of a D that 32 does not divide: half as many lanes, then one element at a time.
        num_low = builder.sub(self.num_stored, whole)
        num_high = builder.sub(dim, builder.add(builder.add(whole, whole), num_low))
        start = builder.add(whole, builder.and_(num_high, intp(-LANES // 2)))
        with cgutils.for_range_slice(builder, whole, start, intp(LANES // 2), intp) as (stored, _):
            low = builder.add(whole, stored)
            use(Block(LANES // 2, (low, builder.add(low, num_low)), stored, (0, 1), num_whole))
        with cgutils.for_range_slice(builder, start, self.num_stored, intp(1), intp) as (stored, _):
            low = builder.add(whole, stored)
            high = builder.add(low, num_low)
            use(Block(1, (low,), stored, (0,), num_whole))
            with builder.if_then(builder.icmp_signed("<", high, dim)):
                use(Block(1, (high,), stored, (1,), num_whole))
