"""The grid of use: means over squares of experts, no color where none is used, and the curves of a knock-out."""

from __future__ import annotations

import base64
import io
import re

import matplotlib.image
import numpy as np
import pytest
import torch

from tinyexperts.evaluation import ExpertUsage
from tinyexperts.explorer import KnockOut, LossRise, figures
from tinyexperts.explorer.figures import binned, experts_per_pixel, knock_out_curves, use_grid


@pytest.mark.parametrize(("side", "most", "block"), [(6, 256, 1), (6, 3, 2), (5, 3, 2), (7, 2, 4)])
def test_a_pixel_is_the_mean_over_its_square_in_even_shares(monkeypatch, side, most, block) -> None:
    monkeypatch.setattr(figures, "MOST_PIXELS", most)
    share = np.random.default_rng(0).random(side**2)
    share /= share.sum()
    assert experts_per_pixel(side**2) == block
    found = binned(share)
    expected = [
        [
            np.mean(
                [share[i * side + j] for i in range(a, min(a + block, side)) for j in range(b, min(b + block, side))]
            )
            for b in range(0, side, block)
        ]
        for a in range(0, side, block)
    ]
    np.testing.assert_allclose(found, np.array(expected) * side**2)


def test_a_million_experts_are_no_more_pixels_than_the_most() -> None:
    assert experts_per_pixel(1024**2) == 4
    assert binned(np.full(1024**2, 2.0**-20)).shape == (256, 256)


def test_the_picture_has_color_where_an_expert_is_used() -> None:
    share = torch.zeros(64, dtype=torch.float64)
    share[[3, 20, 63]] = torch.tensor([0.7, 0.29, 0.01], dtype=torch.float64)
    svg = use_grid("blocks.1", ExpertUsage(share=share), [[3, 20], [63]]).svg
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    alpha = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))[..., 3]
    assert alpha.shape == (8, 8)
    assert set(np.flatnonzero(alpha.flatten()).tolist()) == {3, 20, 63}
    assert alpha[0, 3] > alpha[2, 4] > alpha[7, 7]
    assert "question 1" in svg
    assert "question 2" in svg
    assert "8 by 8 experts of blocks.1" in svg
    assert "4.7% are used" in svg


def test_the_curves_of_a_knock_out_have_their_ends_in_words() -> None:
    draw = np.random.default_rng(0)
    rises = [LossRise(own=draw.random((2, 5)), others=draw.random((2, 5))) for _ in range(2)]
    found = KnockOut(
        statements=(1, 2, 3, 4, 5),
        losses=np.ones(5),
        num_right=5,
        counts=(1, 8),
        num_draws=2,
        fired=rises[0],
        drawn=rises[1],
    )
    svg = knock_out_curves(found).svg
    for name, rise in zip(("fired", "random"), rises, strict=True):
        assert f"{name}: own {rise.own[1].mean():+.2f}, others {rise.others[1].mean():+.2f} nats" in svg
    assert "With 8 experts knocked out" in svg
