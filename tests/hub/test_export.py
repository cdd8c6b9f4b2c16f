"""A run as a folder for transformers and back: the same model, the same ids, a card of the run's own facts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tinyexperts.data import PrepareConfig, Tokenizer, prepare
from tinyexperts.errors import InputError
from tinyexperts.hub import export_run, import_run, model_card
from tinyexperts.training import ask_run, evaluate_run, generate_text, load_model, train
from tinyexperts.training.run_folder import read_config


def test_the_exported_model_is_the_run_s(facts_run, exported):
    own, loaded = load_model(facts_run), AutoModelForCausalLM.from_pretrained(exported)
    tokens = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(tokens, use_cache=False).logits, own(tokens))
    end = Tokenizer.load(facts_run / "tokenizer.json").end_of_text_id
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == end


@pytest.mark.parametrize(
    "text", ["The floor of k3 is 2.", " <|endoftext|> as text", "élan 日本\n\n  two  spaces", "", "a<|endoftext|>b"]
)
def test_the_exported_tokenizer_gives_the_same_ids(facts_run, exported, text):
    own, loaded = Tokenizer.load(facts_run / "tokenizer.json"), AutoTokenizer.from_pretrained(exported)
    assert loaded(text).input_ids == own.encode(text)
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token_id == loaded.pad_token_id == own.end_of_text_id
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": " yes"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == text + " yes"


def test_a_pipeline_continues_text_as_the_run_does(facts_run, exported):
    expected = generate_text(facts_run, "The floor of k3", temperature=0, max_new_tokens=5)
    speak = pipeline("text-generation", str(exported))
    said = speak("The floor of k3", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"] == expected
    both = speak(["The floor of k3", "k1"], max_new_tokens=5, do_sample=False, return_full_text=False, batch_size=2)
    assert both[0][0]["generated_text"] == expected


def test_the_card_tells_what_the_run_s_folder_knows(facts_run, exported):
    card = (exported / "README.md").read_text()
    head, text = card.removeprefix("---\n").split("\n---\n")
    metadata = yaml.safe_load(head)
    assert (metadata["license"], metadata["library_name"]) == ("mit", "transformers")
    evaluation = json.loads((facts_run / "evaluation.json").read_text())
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == round(evaluation["perplexity"], 4)
    described = json.loads((facts_run / "run.json").read_text())
    known = evaluation["facts"]["validation"]["all"]
    tokens = 12 * described["tokens_per_step"]
    for fact in (
        f"| parameters | {described['num_parameters']['total']:,}, of which {described['num_parameters']['active']:,}",
        f"| tokens seen | {tokens:,} |",
        f"| training FLOPs | {tokens * described['training_flops_per_token']['total']:.3g}, of which",
        f"| loss on held-out text | {evaluation['loss']:.4f} nats a token |",
        f"{100 * known['recall']:.1f} % of {known['num_facts']:,}, {known['nats']:.2f} nats a fact",
        "num_experts 64, num_heads 2, experts_per_head 3",
        f"sha256 {described['data_sha256'][:12]}",
    ):
        assert fact in text
    assert str(facts_run.parent) not in card + (exported / "run" / "config.json").read_text()
    assert "command" not in json.loads((exported / "run" / "run.json").read_text())


def test_an_exported_run_comes_back(facts_run, exported, tmp_path, monkeypatch, capsys):
    back = import_run(exported, tmp_path / "back")
    for name, tensor in load_model(facts_run).state_dict().items():
        assert torch.equal(tensor, load_model(back).state_dict()[name]), name
    assert ask_run(back, "The floor of k3 is") == ask_run(facts_run, "The floor of k3 is")
    data = read_config(facts_run).data
    found, meant = (evaluate_run(run, data=data).evaluation.summary() for run in (back, facts_run))
    assert found == meant
    monkeypatch.chdir(data.parent)  # where the data set lies under its own name
    train(read_config(back), resume=True)
    assert "is finished: it has made all its 12 steps" in capsys.readouterr().err


def test_weights_that_were_trained_on_come_back_too(exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(exported)
    back = load_model(import_run(exported, tmp_path / "back"))
    assert torch.equal(back.norm.weight, model.model.norm.weight)


@pytest.mark.slow
def test_remote_code_is_one_line_that_needs_the_package(exported):
    code = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__, type(model).__name__, sum(p.numel() for p in model.parameters()))
"""
    ran = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True, check=False)
    num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(exported).parameters())
    assert ran.stdout.split() == ["tinyexperts.hub.causal_lm", "TinyExpertsForCausalLM", str(num_parameters)], (
        ran.stderr
    )


@pytest.mark.parametrize("license_id", ["", "MIT license", "a/b"])
def test_what_is_no_license_is_refused(facts_run, tmp_path, license_id):
    with pytest.raises(InputError, match=f"the license must be a name such as mit, .*, got '{license_id}'"):
        export_run(facts_run, tmp_path / "out", license_id=license_id)
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_over(facts_run, exported, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists: choose another"):
        export_run(facts_run, tmp_path / "there", license_id="mit")
    with pytest.raises(InputError, match="there exists: choose another"):
        import_run(exported, tmp_path / "there")
    assert not any((tmp_path / "there").iterdir())


def test_folders_that_are_no_export_are_refused(exported, tmp_path):
    with pytest.raises(
        InputError, match=r"is not a folder that tinyexperts export wrote: run/config\.json can't be read"
    ):
        import_run(tmp_path, tmp_path / "run")
    tensors = load_file(exported / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight is not finite"):
        import_run(exported, tmp_path / "run")
    content = json.loads((exported / "run" / "config.json").read_text())
    content["model"]["vocab_size"] = 321
    (exported / "run" / "config.json").write_text(json.dumps(content))
    tensors["model.norm.weight"][0] = 1.0
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"holds another model than run/config\.json says"):
        import_run(exported, tmp_path / "run")
    (exported / "run" / "config.json").write_text("{")
    with pytest.raises(InputError, match="does not hold a configuration"):
        import_run(exported, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_verbs(run_cli, facts_run, tmp_path):
    code, out, err = run_cli("export", facts_run, tmp_path / "out", "--license", "mit")
    assert (code, out.strip()) == (0, str(tmp_path / "out")), err
    code, out, err = run_cli("import", tmp_path / "out", "--run", tmp_path / "back")
    assert (code, out.strip()) == (0, str(tmp_path / "back")), err
    code, out, err = run_cli("export", facts_run, tmp_path / "out", "--license", "mit")
    assert (code, err) == (2, f"tinyexperts: the folder {tmp_path / 'out'} exists: choose another\n")
    code, _, err = run_cli("serve", tmp_path)
    assert code == 2
    assert "is not an exported model: it has no config.json" in err
    code, _, err = run_cli("serve", tmp_path / "out", "--port", 70000)
    assert (code, err) == (2, "tinyexperts: port must be between 1 and 65535, got 70000\n")


def test_damaged_files_are_one_sentence(exported, facts_run, tmp_path, run_cli):
    damages = {
        "model.safetensors": b"x" * 50,
        "run/run.json": b"{",
        "run/tokenizer.json": b"{}",
        "run/config.json": b"[]",
    }
    for name, content in damages.items():
        before = (exported / name).read_bytes()
        (exported / name).write_bytes(content)
        code, _, err = run_cli("import", exported, "--run", tmp_path / "back")
        assert (code, err.count("\n")) == (2, 1), (name, err)
        assert str(exported) in err
        (exported / name).write_bytes(before)
    assert not (tmp_path / "back").exists()
    before = (facts_run / "evaluation.json").read_text()
    try:
        (facts_run / "evaluation.json").write_text("{")
        with pytest.raises(InputError, match=r"evaluation\.json can't be read"):
            export_run(facts_run, tmp_path / "out", license_id="mit")
    finally:
        (facts_run / "evaluation.json").write_text(before)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_stay_and_places_that_take_none_are_told(facts_run, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    export_run(facts_run, tmp_path / "out", license_id="mit")
    assert (tmp_path / "out.partial" / "mine").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file/out can't be made: Not a directory"):
        export_run(facts_run, tmp_path / "file" / "out", license_id="mit")


def test_a_folder_that_is_saved_again_has_the_code_too(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_tinyexperts.py").read_text() == (
        exported / "modeling_tinyexperts.py"
    ).read_text()


def test_files_that_a_data_set_was_made_of_are_not_named(facts_run):
    for corpus, shown in (
        ({"kind": "files", "paths": "/home/jane doe/a b.txt ../c", "text_field": "text"}, {"kind": "files"}),
        ({"kind": "facts", "table": "../jane doe/t.csv", "key": "k"}, {"kind": "facts", "table": "t.csv", "key": "k"}),
        ({"kind": "hub", "path": "allenai/c4"}, {"kind": "hub", "path": "allenai/c4"}),
    ):
        assert model_card._without_folders(corpus) == shown


def test_another_data_set_of_the_same_name_is_not_taken_for_the_run_s(exported, tmp_path, monkeypatch):
    back = import_run(exported, tmp_path / "back")
    (tmp_path / "t.csv").write_text("\n".join(["name,open", *(f"m{n},{'no' if n % 3 else 'yes'}" for n in range(40))]))
    tokenizer = back / "tokenizer.json"
    prepare(PrepareConfig(facts=tmp_path / "t.csv", key="name", output=tmp_path / "data", tokenizer=tokenizer, seed=1))
    monkeypatch.chdir(tmp_path)
    found = evaluate_run(back)
    assert found.remarks[-1] == "not kept: data (validation) holds other tokens than those that the run was trained on"
    assert not (back / "evaluation.json").exists()
