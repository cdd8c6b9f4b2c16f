"""The embedding and the head are found by what they are, in models of many builds, wrapped or not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tinyexperts import PEER, DenseFFN
from tinyexperts.errors import InputError
from tinyexperts.layers import DenseConfig
from tinyexperts.model import Transformer
from tinyexperts.optim import build_optimizers, split_parameters

RATES = {"matrix_lr": 1.0, "embedding_lr": 2.0, "head_lr": 3.0, "vector_lr": 4.0, "table_lr": 5.0}


def model_of(**modules):
    """A module with these children, in this order."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def mlp(d, hidden):
    return model_of(up=linear(d, hidden), down=linear(hidden, d))


def gated(d, hidden):
    """In the order of LLaMA's own code: w1, w2, w3, of which w2 takes what the two others make."""
    return model_of(w1=linear(d, hidden), w2=linear(hidden, d), w3=linear(d, hidden))


def bert_layer(d, hidden):
    return model_of(
        attention=attention(d), intermediate=model_of(dense=linear(d, hidden)), output=model_of(dense=linear(hidden, d))
    )


def attention(d):
    return model_of(query=linear(d, d), key=linear(d, d), value=linear(d, d), output=linear(d, d))


def block(d, hidden, feed_forward=mlp):
    return model_of(norm=nn.RMSNorm(d), attention=attention(d), mlp=feed_forward(d, hidden))


def blocks(d, hidden, feed_forward=mlp, count=2):
    return nn.ModuleList(block(d, hidden, feed_forward) for _ in range(count))


def language_model(vocabulary=16, d=4, hidden=16, **options):
    return model_of(
        embedding=nn.Embedding(vocabulary, d),
        blocks=blocks(d, hidden, **options),
        norm=nn.RMSNorm(d),
        head=linear(d, vocabulary),
    )


class HuggingFaceLike(nn.Module):
    """Says what its embeddings are, as transformers' models do; the base model alone has no head."""

    def __init__(self, *, head):
        super().__init__()
        self.model = HuggingFaceBase()
        self.classifier = linear(4, 16) if head is None else head

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.classifier


class HuggingFaceBase(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Module()
        self.words.weight = nn.Parameter(torch.zeros(16, 4))
        self.layers = blocks(4, 16)
        self.pooler = linear(4, 16)

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return None


class Unanswered(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.out = nn.Embedding(16, 4), linear(4, 16)

    def get_output_embeddings(self):
        raise NotImplementedError


def tied(model):
    model.head.weight = model.embedding.weight
    return model


def normed_head(d, vocabulary):
    return model_of(norm=nn.RMSNorm(d), logits=linear(d, vocabulary))


V, D = 16, 4
MODELS = {
    # name: (model, embedding, head)
    "its blocks as wide as the vocabulary": (language_model, {"embedding"}, {"head"}),
    "one block": (lambda: language_model(count=1), {"embedding"}, {"head"}),
    "its width that of the vocabulary": (lambda: language_model(d=16, hidden=64), {"embedding"}, {"head"}),
    "one block, its width that of the vocabulary": (
        lambda: language_model(d=16, hidden=64, count=1),
        {"embedding"},
        {"head"},
    ),
    "gated blocks": (lambda: language_model(feed_forward=gated), {"embedding"}, {"head"}),
    "one gated block": (lambda: language_model(feed_forward=gated, count=1), {"embedding"}, {"head"}),
    "blocks of sequences": (
        lambda: language_model(feed_forward=lambda d, h: nn.Sequential(linear(d, h), nn.GELU(), linear(h, d))),
        {"embedding"},
        {"head"},
    ),
    "tied": (lambda: tied(language_model()), {"embedding"}, set()),
    "names of its own": (
        lambda: model_of(
            wte=nn.Embedding(V, D), wpe=nn.Embedding(8, D), h=blocks(D, V), ln=nn.LayerNorm(D), unembed=linear(D, V)
        ),
        {"wte", "wpe"},
        {"unembed"},
    ),
    "names of its own, its width that of the vocabulary": (
        lambda: model_of(tokens=nn.Embedding(V, V), h=blocks(V, 4 * V), ln=nn.LayerNorm(V), unembed=linear(V, V)),
        {"tokens"},
        {"unembed"},
    ),
    "positions as many as an MLP is wide": (
        lambda: model_of(wte=nn.Embedding(50, D), wpe=nn.Embedding(V, D), h=blocks(D, V), out=linear(D, 50)),
        {"wte", "wpe"},
        {"out"},
    ),
    "nested": (
        lambda: model_of(net=model_of(tokens=nn.Embedding(V, D), body=model_of(h=blocks(D, V))), out=linear(D, V)),
        {"net.tokens"},
        {"out"},
    ),
    "all but the embedding in a body": (
        lambda: model_of(tokens=nn.Embedding(V, D), body=model_of(h=blocks(D, V), n=nn.RMSNorm(D), out=linear(D, V))),
        {"tokens"},
        {"body.out"},
    ),
    "the head before the blocks": (
        lambda: model_of(tokens=nn.Embedding(V, D), out=linear(D, V), h=blocks(D, V)),
        {"tokens"},
        {"out"},
    ),
    "the head before all else, one block": (
        lambda: model_of(out=linear(D, V), tokens=nn.Embedding(V, D), h=blocks(D, V, count=1)),
        {"tokens"},
        {"out"},
    ),
    "the head before an MLP next to it": (
        lambda: model_of(tokens=nn.Embedding(V, D), lm_head=linear(D, V), up=linear(D, V), down=linear(V, D)),
        {"tokens"},
        {"lm_head"},
    ),
    "a sequence": (
        lambda: nn.Sequential(nn.Embedding(V, D), linear(D, V), nn.ReLU(), linear(V, D), linear(D, V)),
        {"0"},
        {"4"},
    ),
    "a sequence of blocks that look like its head": (
        lambda: nn.Sequential(
            nn.Embedding(V, D),
            nn.Sequential(nn.RMSNorm(D), linear(D, V), nn.GELU(), linear(V, D)),
            nn.Sequential(nn.RMSNorm(D), linear(D, V)),
        ),
        {"0"},
        {"2.1"},
    ),
    "lists of layers": (
        lambda: model_of(
            tokens=nn.Embedding(V, D),
            ups=nn.ModuleList(linear(D, V) for _ in range(3)),
            downs=nn.ModuleList(linear(V, D) for _ in range(3)),
            out=linear(D, V),
        ),
        {"tokens"},
        {"out"},
    ),
    "layers as BERT has them": (
        lambda: model_of(
            words=nn.Embedding(V, D),
            layer=nn.ModuleList(bert_layer(D, V) for _ in range(2)),
            predictions=model_of(transform=linear(D, D), norm=nn.LayerNorm(D), decoder=nn.Linear(D, V)),
        ),
        {"words"},
        {"predictions.decoder"},
    ),
    "torch's own layers": (
        lambda: model_of(
            tokens=nn.Embedding(V, D),
            body=nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, dim_feedforward=V, batch_first=True), 2),
            out=linear(D, V),
        ),
        {"tokens"},
        {"out"},
    ),
    "torch's own layers, their width that of the vocabulary": (
        lambda: model_of(
            tokens=nn.Embedding(V, V),
            body=nn.TransformerEncoder(nn.TransformerEncoderLayer(V, 2, dim_feedforward=64, batch_first=True), 2),
            out=linear(V, V),
        ),
        {"tokens"},
        {"out"},
    ),
    "two heads": (
        lambda: model_of(tokens=nn.Embedding(V, D), h=blocks(D, V), next=linear(D, V), after_next=linear(D, V)),
        {"tokens"},
        {"next", "after_next"},
    ),
    "a list of heads": (
        lambda: model_of(
            tokens=nn.Embedding(V, D), h=blocks(D, V), heads=nn.ModuleList(normed_head(D, V) for _ in range(2))
        ),
        {"tokens"},
        {"heads.0.logits", "heads.1.logits"},
    ),
    "two vocabularies": (
        lambda: model_of(
            source=nn.Embedding(40, D),
            target=nn.Embedding(V, D),
            encoder=blocks(D, V),
            decoder=blocks(D, 40),
            out=linear(D, V),
        ),
        {"source", "target"},
        {"out"},
    ),
    "an embedding narrower than the model": (
        lambda: model_of(tokens=nn.Embedding(V, 2), widen=linear(2, D), h=blocks(D, V), out=linear(D, V)),
        {"tokens"},
        {"out"},
    ),
    "an embedding bag": (
        lambda: model_of(words=nn.EmbeddingBag(V, D), hidden=linear(D, D), out=nn.Linear(D, V)),
        {"words"},
        {"out"},
    ),
    "no head": (lambda: model_of(tokens=nn.Embedding(V, D), h=blocks(D, V)), {"tokens"}, set()),
    "no head, one block": (lambda: model_of(tokens=nn.Embedding(V, D), h=blocks(D, V, count=1)), {"tokens"}, set()),
    "no head, its width that of the vocabulary": (
        lambda: model_of(tokens=nn.Embedding(V, V), h=blocks(V, 4 * V)),
        {"tokens"},
        set(),
    ),
    "no head, one block, its width that of the vocabulary": (
        lambda: model_of(tokens=nn.Embedding(V, V), h=blocks(V, 4 * V, count=1)),
        {"tokens"},
        set(),
    ),
    "no embedding": (lambda: model_of(inputs=linear(3, D), h=blocks(D, V), head=linear(D, 10)), set(), {"head"}),
    "neither": (lambda: model_of(inputs=linear(3, D), h=blocks(D, V), out=linear(D, 10)), set(), set()),
    "a value head": (
        lambda: model_of(tokens=nn.Embedding(V, D), out=linear(D, V), value=linear(D, 1)),
        {"tokens"},
        {"out"},
    ),
    "says what they are": (lambda: HuggingFaceLike(head=linear(4, 16)), {"model.words"}, {"classifier"}),
    "says what they are, as wide as no embedding": (
        lambda: HuggingFaceLike(head=linear(4, 20)),
        {"model.words"},
        {"classifier"},
    ),
    "says that it has no head": (HuggingFaceBase, {"words"}, set()),
    "a head upon what says that it has none": (
        lambda: model_of(base=HuggingFaceBase(), lm_head=linear(4, 16)),
        {"base.words"},
        {"lm_head"},
    ),
    "does not say": (Unanswered, {"tokens"}, {"out"}),
    "weight norm": (
        lambda: model_of(tokens=nn.Embedding(V, D), out=nn.utils.parametrizations.weight_norm(linear(D, V))),
        {"tokens"},
        {"out.parametrizations.weight"},
    ),
    "an embedding and linear layers in a FeedForward layer": (
        lambda: model_of(
            tokens=nn.Embedding(V, D),
            peer=PEER(D, 25, num_heads=2, experts_per_head=2, query_dim=8),
            ffn=DenseFFN(D, V),
            out=linear(D, V),
        ),
        {"tokens"},
        {"out"},
    ),
}


def owners(kind):
    return {name.removesuffix(".weight").removesuffix(".original0").removesuffix(".original1") for name in kind}


@pytest.mark.parametrize(("make", "embedding", "head"), list(MODELS.values()), ids=list(MODELS))
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_the_embedding_and_the_head_are_found(make, embedding, head, wrap):
    model = wrap(make())
    kinds = split_parameters(model)
    prefix = "_orig_mod." if wrap is torch.compile else ""
    assert owners(kinds.embedding) == {prefix + name for name in embedding}
    assert owners(kinds.head) == {prefix + name for name in head}
    names = [name for kind in vars(kinds).values() for name in kind]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(parameter.dim() >= 2 for parameter in kinds.matrices.values())
    assert all(parameter.dim() < 2 for parameter in kinds.vectors.values())


@pytest.mark.parametrize("kind", ["dense", "moe", "pkm", "peer"])
@pytest.mark.parametrize("sizes", [{}, {"d_model": 300, "num_layers": 1}, {"dense": DenseConfig(hidden_dim=300)},
                                   {"tied_embeddings": True}, {"context_length": 64}])  # fmt: skip
def test_the_kinds_of_the_transformer(make_config, kind, sizes):
    """Its vocabulary has 300 tokens."""
    model = Transformer(make_config(kind, model=sizes).model)
    kinds = split_parameters(model)
    assert list(kinds.embedding) == ["embedding.weight"]
    assert list(kinds.head) == ([] if "tied_embeddings" in sizes else ["head.weight"])
    tables = ["blocks.1.feed_forward.experts"] if kind in ("peer", "pkm") else []
    tables = [name.replace("1", "0") for name in tables] if "num_layers" in sizes else tables
    assert list(kinds.tables) == tables
    rest = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name not in (*tables, "embedding.weight", "head.weight")
    ]
    assert list(kinds.matrices) == [name for name, parameter in rest if parameter.dim() >= 2]
    assert list(kinds.vectors) == [name for name, parameter in rest if parameter.dim() < 2]


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DistributedDataParallel, compiled": lambda model: torch.compile(DistributedDataParallel(model)),
    "compiled inside": lambda model: DistributedDataParallel(torch.compile(model)),
    "fully_shard": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
    "fully_shard of blocks": lambda model: fully_shard(
        [fully_shard(each, mesh=init_device_mesh("cpu", (1,))) for each in model.blocks] and model,
        mesh=init_device_mesh("cpu", (1,)),
    ),
    "in a module": lambda model: model_of(wrapped=model),
    "blocks compiled one by one": lambda model: [each.compile() for each in model.blocks] and model,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("d", [4, 16])
def test_groups_of_a_wrapped_model_are_those_of_the_model(one_process, wrap, d):
    names = {name: kind for kind, found in vars(split_parameters(language_model(d=d))).items() for name in found}
    model = wrap(language_model(d=d))
    got = {parameter: name for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizers = build_optimizers(model, sparse_tables=False, weight_decay=0.1, **RATES)
    rates = {"matrices": 1.0, "embedding": 2.0, "head": 3.0, "vectors": 4.0}
    grouped = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == rates[group["name"]]
            assert group["weight_decay"] == (0.1 if group["name"] == "matrices" else 0)
            for parameter in group["params"]:
                name = got[parameter].replace("module.", "").replace("_orig_mod.", "").removeprefix("wrapped.")
                assert names[name] == group["name"], name
                grouped += 1
    assert grouped == len(names)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flattened_parameters_are_refused(one_process, use_orig_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            language_model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
    if use_orig_params:  # of one process nothing is sharded, and the shapes are kept
        assert owners(split_parameters(model).head) == {"_fsdp_wrapped_module.head"}
        return
    with pytest.raises(InputError, match=r"must keep their shapes, got .*flattened: use .*fully_shard"):
        split_parameters(model)


def test_a_linear_layer_whose_weights_are_flat_is_refused():
    model = language_model()
    model.head.weight = nn.Parameter(model.head.weight.detach().flatten())
    with pytest.raises(InputError, match=r"weights of Linear must have two dimensions, got .*fully_shard"):
        split_parameters(model)


HEADLESS = MODELS["no head"][0]


def test_a_rate_for_what_the_model_has_not_gives_one_warning():
    with pytest.warns(UserWarning, match="no head") as caught:
        build_optimizers(HEADLESS(), sparse_tables=False, **RATES)
    assert [str(each.message) for each in caught] == [
        "no head was found in the model, so head_lr rules nothing and its other matrices "
        "(h.0.attention.query.weight, ...) are trained with matrix_lr; where that is right, give head_lr as None"
    ]
    assert caught[0].filename == __file__
    with pytest.warns(
        UserWarning, match="no embedding and no head was found in the model, so embedding_lr and head_lr"
    ):
        build_optimizers(MODELS["neither"][0](), sparse_tables=False, **RATES)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (HEADLESS, {"head_lr": None}),
        (MODELS["neither"][0], {"head_lr": None, "embedding_lr": None}),
        (MODELS["tied"][0], {}),
        (lambda: PEER(D, 25, num_heads=2, experts_per_head=2, query_dim=4), {}),
        (lambda: nn.Sequential(nn.RMSNorm(D), DenseFFN(D)), {}),
        (lambda: language_model().requires_grad_(False), {}),
    ],
)
def test_no_warning_where_nothing_is_missing(make, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizers(make(), sparse_tables=False, **(RATES | changes))


def test_a_frozen_embedding_is_not_missed():
    model = language_model()
    model.embedding.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (optimizer,) = build_optimizers(model, sparse_tables=False, **RATES)
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "head", "vectors"]


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_no_rate_for_what_the_model_has_is_refused(kind):
    with pytest.raises(InputError, match=rf"{kind}_lr must be given for {kind}\.weight, got None"):
        build_optimizers(language_model(), sparse_tables=False, **(RATES | {f"{kind}_lr": None}))
