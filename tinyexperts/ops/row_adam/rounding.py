"""Stochastic rounding of fp32 numbers to bf16: up or down by chance, so that the mean is the number itself.

A step that is small beside a bf16 number would be lost when it is rounded to the nearest one: the number stays as it
is, step after step. Rounded by chance it moves as often as it should (Gupta et al. 2015, arXiv 1502.02551). A 16-bit
random number is added to the fp32 bits, and the lower 16 bits are cut off.

The random number is a hash of the element's place in the table and of a seed. So the bits depend on these alone: not on
threads, devices or the order of the rows, and a run that is resumed goes on to the bit. The hash is lowbias32 (Ellis
2018, "Prospecting for Hash Functions", public domain). triton_update.py has the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1
_EXPONENT = 0x7F800000


def seed_of(*numbers: int) -> int:
    """Return a seed (32 bits) made of numbers of up to 64 bits: of a run, a parameter, a step."""
    seed = len(numbers)  # not 0, which the hash leaves as it is
    for number in numbers:
        seed = _mixed(_mixed(seed ^ (number & _LOW)) ^ (number >> 32 & _LOW))
    return seed


def _mixed(number: int) -> int:
    number ^= number >> 16
    number = number * 0x7FEB352D & _LOW
    number ^= number >> 15
    number = number * 0x846CA68B & _LOW
    return number ^ number >> 16


def round_stochastically(values: Tensor, places: Tensor, seed: int) -> Tensor:
    """Round fp32 numbers to bf16 by chance.

    Args:
        values (fp32, [...]): the numbers. Infinities and NaN stay, and a finite number stays finite.
        places (int64, [...]): the place of each in its table, as the table lies in memory.
        seed (int): made by `seed_of`; another one for each step.

    Returns:
        rounded (bf16, [...]): one of the two neighbours of each number, the nearer one with the higher chance.
    """
    number = (places & _LOW) ^ (places >> 32) * _GOLDEN & _LOW ^ seed
    number ^= number >> 16
    number = number * 0x7FEB352D & _LOW
    number ^= number >> 15
    # The second factor has 32 bits, and a product of 64 would not fit: the halves one by one.
    number = (number * 0xA68B + ((number * 0x846C & 0xFFFF) << 16)) & _LOW
    number ^= number >> 16
    bits = values.view(torch.int32).to(torch.int64) & _LOW
    rounded = bits + (number >> 16)
    stays_finite = ((bits & _EXPONENT) != _EXPONENT) & ((rounded & _EXPONENT) != _EXPONENT)
    top = torch.where(stays_finite, rounded, bits) >> 16
    top = torch.where(values.isnan(), top | 0x40, top)  # a NaN whose upper bits are those of infinity
    return top.to(torch.uint16).view(torch.bfloat16)
