"""Stochastic rounding of fp32 to bf16, with random bits that depend on a seed and an element's place alone.

bf16 is the upper half of fp32. A random number of 16 bits is added to the lower half, and the lower half is cut off: a
value becomes the next number away from zero with the probability of its distance to the one below, and its mean stays.
Rounded to nearest instead, a table forgets each step that is smaller than half a unit in its last place, 1/512 to 1/256
of the value (arXiv 1502.02551, section 4; arXiv 2010.06192 for training in bf16 alone).

The random numbers are counted, not drawn: a hash (lowbias32, https://nullprogram.com/blog/2018/07/31/) of the element's
number in the table and of the seed. So a step has the same bits on every device, for any number of threads, whichever
rows are touched, and when it is made again from a checkpoint. What is here is the truth for rounding_cpu.py and for
triton_update.py, which must equal it to the bit.

Infinities and NaN stay what they are, and no finite number becomes an infinity: what would round beyond the largest one
is cut. fp32's arithmetic is torch's in int32, which wraps around at 2^32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.errors import InputError

MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Those of lowbias32."""
HIGH_MULTIPLIER = 0x9E3779B1
"""What the upper 32 bits of an element's number are multiplied by: odd, and its bits are spread."""
INFINITY = 0x7F800000
"""The bits of fp32's exponent, all of which infinities and NaN have set."""
NUM_SEEDS = 2**32


def check_rounding_seed(table: Tensor, seed: int | None) -> None:
    """Check that a table can be rounded with a seed.

    Raises:
        InputError: a seed outside of its range, or for a table that is not bf16.
    """
    if seed is None:
        return
    if table.dtype != torch.bfloat16:
        raise InputError(f"rounding_seed is for bf16 tables, got one of {table.dtype}")
    if not 0 <= seed < NUM_SEEDS:
        raise InputError(f"rounding_seed must be at least 0 and less than 2^32, got {seed}")


def hash_number(number: int) -> int:
    """Return lowbias32 of a number below 2^32: another such number, a different one for each."""
    number ^= number >> 16
    number = number * MULTIPLIERS[0] % NUM_SEEDS
    number ^= number >> 15
    number = number * MULTIPLIERS[1] % NUM_SEEDS
    return number ^ number >> 16


def seed_of_step(seed: int, parameter: int, step: int) -> int:
    """Return the seed of a step: of one parameter no two steps share it before step 2^32.

    Args:
        seed (int): that of the run.
        parameter (int): the number of the table in its optimizer.
        step (int): the number of the step.
    """
    of_parameter = hash_number(hash_number(seed % NUM_SEEDS) ^ parameter % NUM_SEEDS)
    return hash_number((of_parameter + step) % NUM_SEEDS)


def rounding_key(seed: int) -> int:
    """Return the key (0 <= key < 2^32) that a seed gives to the hash of elements."""
    return hash_number((seed + HIGH_MULTIPLIER) % NUM_SEEDS)


def signed(number: int) -> int:
    """Return the int32 of the same bits as a number below 2^32."""
    return number - 2**32 if number >= 2**31 else number


def random_bits(elements: Tensor, seed: int) -> Tensor:
    """Return 16 random bits (int32) for each element's number (int64) in its table."""
    # Of an int64 that passes 2^31 the low bits are taken.
    low, high = (_wrapped(each) for each in (elements, elements >> 32))
    bits = low ^ (high * signed(HIGH_MULTIPLIER)) ^ signed(rounding_key(seed))
    bits = bits ^ _shifted(bits, 16)
    bits = bits * signed(MULTIPLIERS[0])
    bits = bits ^ _shifted(bits, 15)
    bits = bits * signed(MULTIPLIERS[1])
    return (bits ^ _shifted(bits, 16)) & 0xFFFF


def round_stochastically(values: Tensor, elements: Tensor, seed: int) -> Tensor:
    """Round up or down at random, up with the probability of the distance to the number below.

    Args:
        values (fp32, any shape): what is rounded.
        elements (int64, same shape): the numbers of the elements in their table, counted from 0.
        seed (int): 0 <= seed < 2^32.

    Returns:
        The values in bf16.
    """
    bits = values.contiguous().view(torch.int32)
    moved = bits + random_bits(elements, seed)
    stays = _is_special(bits) | _is_special(moved)
    moved = torch.where(stays, bits, moved) >> 16
    # A NaN whose bits are all in the lower half would become an infinity.
    moved = torch.where(values.isnan(), moved | 0x40, moved)
    return moved.to(torch.int16).view(torch.bfloat16)


def store_rows(table: Tensor, rows: Tensor, values: Tensor, seed: int | None) -> None:
    """Write rows [R, ...] into a table [N, ...] in its type, rounded to nearest without a seed.

    With a seed rows of a bf16 table are rounded at random; of another type they are written as without it (the check of
    a kernel calls the portable operator in fp64).
    """
    if seed is not None and table.dtype == torch.bfloat16:
        width = table[0].numel()
        within = torch.arange(width, device=table.device).view(table.shape[1:])
        elements = rows.view(-1, *(1,) * (table.dim() - 1)) * width + within
        values = round_stochastically(values.expand_as(elements), elements, seed)
    # The rows are unique, so a copy is exact and, unlike an indexed add, the same on every device.
    table.index_copy_(0, rows, values.to(table.dtype))


def _is_special(bits: Tensor) -> Tensor:
    """Return True for the bits of infinities and NaN."""
    return (bits & INFINITY) == INFINITY


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Return the bits of an int32 shifted right, with zeros behind them."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def _wrapped(numbers: Tensor) -> Tensor:
    """Return the lower 32 bits of an int64 as int32."""
    return ((numbers + 2**31) % 2**32 - 2**31).to(torch.int32)
