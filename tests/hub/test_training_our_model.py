"""Hugging Face's Trainer on our model: the steps of a plain loop, and a resumed training to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tinyexperts.hub import TinyExpertsConfig, TinyExpertsForCausalLM
from tinyexperts.layers import PEERConfig
from tinyexperts.model import TransformerConfig

NUM_STEPS, BATCH_SIZE, LENGTH = 4, 2, 12


def make():
    torch.manual_seed(0)
    layer = PEERConfig(num_experts=64, num_heads=2, experts_per_head=3, query_dim=6)
    config = TransformerConfig(
        vocab_size=50, context_length=16, d_model=16, num_layers=3, num_heads=2, expert_layer=layer
    )
    return TinyExpertsForCausalLM(TinyExpertsConfig.of(config))


@pytest.fixture
def examples():
    tokens = torch.randint(50, (NUM_STEPS * BATCH_SIZE, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **options,
    )


def test_the_trainer_makes_the_steps_of_a_plain_loop(examples, tmp_path):
    trained, plain = make(), make()
    trainer = Trainer(trained, arguments(tmp_path, save_strategy="no"), train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    plain.train()
    expected = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = torch.stack([each["input_ids"] for each in examples[start : start + BATCH_SIZE]])
        loss = plain(batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-4, rtol=0)
    for (name, ours), theirs in zip(trained.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert expected[-1] != expected[0]


def test_a_resumed_training_is_the_same_to_the_bit(examples, tmp_path):
    whole = make()
    again = copy.deepcopy(whole)
    Trainer(whole, arguments(tmp_path, save_steps=2), train_dataset=examples).train()
    Trainer(again, arguments(tmp_path), train_dataset=examples).train(str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
