"""Scores and their indices as one integer each, whose order is that of retrieval; for Triton's kernels only."""

from __future__ import annotations

import triton
import triton.language as tl

# Below every key.
NO_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@triton.jit
def ordered(score: tl.tensor) -> tl.tensor:
    """Return an int32 in the order of the scores: NaN above all, as torch sorts it, and the two zeros equal."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score == 0.0, 0, bits)
    bits = tl.where(score != score, 0x7FC00000, bits)
    # The larger a negative number's bits, the smaller it is.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(score: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return an int64 that is larger for a better score, and among equal scores for a lower index (int32)."""
    return (ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def score_of(key: tl.tensor) -> tl.tensor:
    """Return the score of a key; of a zero the positive one."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key: tl.tensor) -> tl.tensor:
    """Return the index of a key, int32."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
