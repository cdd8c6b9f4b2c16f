"""The Trainer of transformers, and adapters of PEFT, with a replaced layer."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from tiny_decoders import VOCAB_SIZE, tiny_decoder
from torch._dynamo.utils import counters

from tinyexperts import PEER
from tinyexperts.hub import load_replaced, replace_feed_forward

LENGTHS = (20, 13, 20, 7, 16, 20, 9, 20, 20, 5, 11, 20)
DRAW = torch.Generator().manual_seed(3)
TEXTS = [{"input_ids": torch.randint(3, VOCAB_SIZE, (length,), generator=DRAW).tolist()} for length in LENGTHS]


# Of transformers: PEFT and its own Trainer call what has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def peer(width: int) -> PEER:
    torch.manual_seed(1)
    return PEER(width, 64, num_heads=2, experts_per_head=3, query_dim=6)


def model_of(family="llama"):
    return replace_feed_forward(tiny_decoder(family), [1], peer)


def padded_left(texts):
    """A batch, padded on the left."""
    longest = max(len(text["input_ids"]) for text in texts)
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for text in texts:
        missing = longest - len(text["input_ids"])
        batch["input_ids"].append([0] * missing + text["input_ids"])
        batch["attention_mask"].append([0] * missing + [1] * len(text["input_ids"]))
        batch["labels"].append([-100] * missing + text["input_ids"])
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def trainer_of(model, folder, *, collate=padded_left, **settings):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(**{**arguments, **settings})
    return transformers.Trainer(model=model, args=arguments, train_dataset=TEXTS, data_collator=collate)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(got, expected, **tolerance):
    for (name, tensor), other in zip(expected.state_dict().items(), got.state_dict().values(), strict=True):
        torch.testing.assert_close(other, tensor, msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def test_it_trains_as_a_plain_loop_does(tmp_path):
    batches = []

    def collate(texts):
        batches.append(padded_left(texts))
        return batches[-1]

    model, plain = model_of(), model_of()
    trainer = trainer_of(model, tmp_path, collate=collate)
    trainer.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.0)
    expected = []
    for batch in batches[:6]:
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    # Adam's first steps have the size of the learning rate for the smallest gradient, too.
    assert_equal(model, plain, rtol=1e-3, atol=3e-4)
    trainer.save_model(tmp_path / "saved")
    assert_equal(load_replaced(tmp_path / "saved"), model)


def test_it_resumes(tmp_path):
    whole = model_of()
    trainer_of(whole, tmp_path / "whole").train()
    resumed = load_replaced(tmp_path / "whole/checkpoint-3").train()
    trainer_of(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert_equal(resumed, whole)


def test_checkpointing_and_accumulation(tmp_path):
    plain, checkpointed = model_of(), model_of()
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3}
    trainer_of(plain, tmp_path / "plain", **settings).train()
    trainer_of(checkpointed, tmp_path / "checkpointed", gradient_checkpointing=True, **settings).train()
    assert_equal(checkpointed, plain, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_loss_falls(tmp_path):
    trainer = trainer_of(model_of(), tmp_path, bf16=True, max_steps=9, save_strategy="no")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.slow
def test_it_compiles(tmp_path, recwarn, caplog):
    torch._dynamo.reset()
    counters.clear()
    model, plain = model_of(), model_of()
    # Rows of one length, so that padding is no reason to compile anew; the mask is there.
    texts = [{"input_ids": (text["input_ids"] * 20)[:20]} for text in TEXTS]
    compiled = trainer_of(model, tmp_path / "compiled", torch_compile=True, max_steps=3)
    compiled.train_dataset = texts
    compiled.train()
    eager = trainer_of(plain, tmp_path / "eager", max_steps=3)
    eager.train_dataset = texts
    eager.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)
    assert counters["frames"]["total"] == counters["frames"]["ok"] >= 1
    assert not counters["aot_autograd"]["not_ok"]
    assert not counters["unimplemented"]
    assert not counters["graph_break"]
    told = [str(each.message) for each in recwarn if "torch.jit.script_method" not in str(each.message)]
    assert told == []
    # Its Trainer would rather have a GPU.
    assert [each.getMessage() for each in caplog.records if each.name != "transformers.training_args"] == []


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_is_saved_and_loaded_equal(target, tmp_path):
    base = model_of()
    batch = padded_left(TEXTS[:4])
    for _ in range(3):  # moves the statistics
        base(**batch)
    base.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(base.state_dict())
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target)
    model = peft.get_peft_model(base, config)
    trainer = trainer_of(model, tmp_path, save_strategy="no")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load_replaced(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        assert not torch.allclose(load_replaced(tmp_path / "base")(**batch).logits, expected)
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected)
    assert torch.equal(base.model.layers[1].mlp.experts, before["model.layers.1.mlp.experts"])


def test_an_adapter_with_the_whole_layer(tmp_path):
    base = model_of()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"])
    model = peft.get_peft_model(base, config)
    trainer_of(model, tmp_path, save_strategy="no").train()
    assert not torch.equal(base.model.layers[1].mlp.modules_to_save["default"].experts, peer(32).experts)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load_replaced(tmp_path / "base"), tmp_path / "adapter")
    batch = padded_left(TEXTS[:4])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
