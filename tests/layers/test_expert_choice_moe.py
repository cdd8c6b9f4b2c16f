"""ExpertChoiceMoE: against a loop over experts, its thresholds, its look-ahead, its costs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tinyexperts import ExpertChoiceMoE
from tinyexperts.errors import InputError


def make(seed=0, **options):
    torch.manual_seed(seed)
    return ExpertChoiceMoE(8, **({"num_experts": 5, "hidden_dim": 12, "capacity_factor": 1.5} | options))


def by_hand(layer, x, chosen):
    """Sum over experts of score * MLP(token), for the (token, expert) pairs in the mask `chosen` [M, E]."""
    scores = layer.router(x).softmax(-1)
    y = torch.zeros_like(x)
    for expert in range(chosen.shape[1]):
        output = F.gelu(x @ layer.up[expert]) @ layer.down[expert]
        y = y + output * (scores[:, expert] * chosen[:, expert]).unsqueeze(-1)
    return y


def chosen_by_experts(layer, x):
    scores = layer.router(x).softmax(-1)
    capacity = math.ceil(layer.capacity_factor * len(x) / scores.shape[1])
    return torch.zeros_like(scores).scatter(0, scores.topk(capacity, dim=0).indices, 1.0)


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_output_and_gradients_equal_a_loop_over_experts(num_tokens):
    layer, x = make(), torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(1))
    grads = []
    for forward in (layer, lambda x: by_hand(layer, x, chosen_by_experts(layer, x))):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        grads.append([y, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_experts_look_ahead_in_training_but_not_with_thresholds():
    layer, x = make(capacity_factor=0.5), torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 10:] = torch.randn(1, 10, 8) * 5
    layer.evaluation_routing = "expert_choice"
    layer.eval()
    assert not torch.allclose(layer(x)[:, :10], layer(changed)[:, :10])
    layer.evaluation_routing = "threshold"
    torch.testing.assert_close(layer(x)[:, :10], layer(changed)[:, :10])
    torch.testing.assert_close(
        layer(x), by_hand(layer, x[0], (layer.router(x[0]).softmax(-1) > layer.threshold).float())[None]
    )


def test_learned_thresholds_give_the_capacity_on_average():
    layer = make(capacity_factor=1.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        layer(torch.randn(100, 8, generator=generator))
    scores = layer.router(torch.randn(5000, 8, generator=generator)).softmax(-1)
    share = (scores > layer.threshold).float().mean(0)
    torch.testing.assert_close(share, torch.full((5,), 0.2), atol=0.03, rtol=0)


def test_the_first_threshold_is_the_middle_of_the_cut():
    layer, x = make(capacity_factor=1.0), torch.randn(10, 8)
    layer(x)
    scores = layer.router(x).softmax(-1).sort(dim=0, descending=True).values
    torch.testing.assert_close(layer.threshold, (scores[1] + scores[2]) / 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_thresholds_move_once_under_activation_checkpointing(use_reentrant):
    plain, checkpointed = make(), make()
    for step in range(3):
        x = torch.randn(9, 8, generator=torch.Generator().manual_seed(step))
        plain(x).sum().backward()
        checkpoint(checkpointed, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(plain.threshold, checkpointed.threshold)
    assert plain.num_batches_tracked == checkpointed.num_batches_tracked == 3


def test_flops_and_parameters_are_counted():
    layer = make(capacity_factor=2.0).eval()
    layer.evaluation_routing = "expert_choice"
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(50, 8))
    assert counter.get_total_flops() == 50 * layer.flops_per_token().total
    assert layer.flops_per_token().router == 2 * 8 * 5
    assert layer.num_parameters().total == sum(p.numel() for p in layer.parameters())
    assert layer.num_parameters().active == 8 * 5 + 2 * 2 * 8 * 12
    assert layer.parameter_groups().tables == []


def test_empty_batch_in_both_modes():
    for training in (True, False):
        assert make().train(training)(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_experts": 0}, "got 8, 0 and 12"), ({"capacity_factor": 0.0}, "got 0.0"), ({"activation": "x"}, "got 'x'")],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_thresholds_follow_a_router_that_has_changed():
    layer, x = make(capacity_factor=1.0), torch.randn(50, 8)
    for _ in range(300):
        layer(x)
    with torch.no_grad():
        layer.router.weight.mul_(0)  # now every score is 1 / 5
    before = layer.threshold.clone()
    for _ in range(100):
        layer(x)
    torch.testing.assert_close(layer.threshold, 0.2 + (before - 0.2) * 0.99**100)


def test_an_expert_that_takes_every_token_has_a_threshold_of_zero():
    layer = make(capacity_factor=5.0)  # as many as there are experts
    x = torch.randn(10, 8)
    layer(x)
    assert torch.equal(layer.threshold, torch.zeros(5))
    torch.testing.assert_close(layer.eval()(x), by_hand(layer, x, torch.ones(10, 5)))


def test_a_score_equal_to_the_threshold_does_not_pass():
    layer, x = make(num_experts=4), torch.randn(10, 8)
    with torch.no_grad():
        layer.router.weight.zero_()  # every score is 1 / 4, as every threshold is at first
    assert torch.equal(layer.eval()(x), torch.zeros(10, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_layer_trains_and_keeps_its_thresholds_in_fp32(dtype):
    layer, x = make(), torch.randn(30, 8)
    layer(x)
    threshold = layer.threshold.clone()
    layer = layer.to(dtype)
    assert torch.equal(layer.threshold, threshold)
    y = layer(2 * x.to(dtype))
    y.square().sum().backward()
    assert y.dtype == layer.up.grad.dtype == dtype
    assert layer.threshold.dtype == torch.float32
    assert not torch.equal(layer.threshold, threshold)
    assert layer.eval()(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_thresholds_are_of_fp32_whatever_they_are_loaded_from(device):
    state = make().to(torch.bfloat16).state_dict()
    state["threshold"] = torch.tensor([0.11, 0.12, 0.13, 0.14, 0.15], dtype=torch.bfloat16)
    layer = make(device=device)
    layer.load_state_dict(state, assign=True)
    assert layer.threshold.dtype == torch.float32
    assert torch.equal(layer.threshold, state["threshold"].float())
    assert state["threshold"].dtype == torch.bfloat16, "the checkpoint itself stays"
    layer(torch.randn(30, 8).bfloat16())
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("default", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_thresholds_are_of_fp32_or_wider_whatever_is_the_default(default, expected):
    torch.set_default_dtype(default)
    try:
        layer = make()
        layer(torch.randn(30, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.up.dtype == default
    assert layer.threshold.dtype == expected
    assert layer.type(torch.bfloat16).num_batches_tracked.dtype == torch.int64, "in 16 bits a count ends at 256"
    assert layer.threshold.dtype == expected


def test_a_frozen_router_keeps_its_thresholds():
    """As an adapter's layer must, whose frozen base is stored elsewhere."""
    layer, x = make(), torch.randn(30, 8)
    layer(x)
    before = layer.threshold.clone()
    layer.router.requires_grad_(False)
    layer(2 * x)
    assert torch.equal(layer.threshold, before)
    assert layer.num_batches_tracked == 1
    layer.router.requires_grad_(True)
    layer(2 * x)
    assert not torch.equal(layer.threshold, before)
    assert layer.num_batches_tracked == 2


def test_scores_of_a_double_layer_are_double():
    layer, x = make(num_experts=3, capacity_factor=3.0).double(), torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x, torch.ones(4, 3)), rtol=1e-12, atol=1e-12)


def test_an_unknown_evaluation_routing_raises():
    layer = make().eval()
    layer.evaluation_routing = "thresholds"
    with pytest.raises(ValueError, match="one of expert_choice, threshold, got 'thresholds'"):
        layer(torch.zeros(2, 8))


@pytest.mark.parametrize("training", [True, False])
def test_padding_that_a_mask_names_changes_nothing_for_real_tokens(training):
    torch.manual_seed(0)
    layer = ExpertChoiceMoE(6, 3, hidden_dim=5).train(training)
    layer.evaluation_routing = "expert_choice"
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 7, 6)
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    x[~mask] = 100.0
    padded, alone = x.clone().requires_grad_(), x[mask].clone().requires_grad_()
    y, y_alone = layer(padded, mask), twin(alone)
    torch.testing.assert_close(y[mask], y_alone)
    assert not y[~mask].any()
    y.square().sum().backward()
    y_alone.square().sum().backward()
    torch.testing.assert_close(padded.grad[mask], alone.grad)
    assert not padded.grad[~mask].any()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(layer.threshold, twin.threshold)
    assert not torch.allclose(layer(x)[mask], layer(x, mask)[mask])  # what the mask is for


def test_wrong_masks_are_refused():
    layer, x = ExpertChoiceMoE(6, 3, hidden_dim=5), torch.randn(2, 7, 6)
    with pytest.raises(InputError, match=r"got int64 \[2, 7\]"):
        layer(x, torch.ones(2, 7, dtype=torch.int64))
    with pytest.raises(InputError, match=r"got bool \[7\]"):
        layer(x, torch.ones(7, dtype=torch.bool))
