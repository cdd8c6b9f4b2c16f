"""The parameters of a language model by kind, and the optimizers made of them.

Tables (one row an expert) get a learning rate of their own and no weight decay; hidden matrices, the token embedding,
the head and the vectors (norm gains, biases) get AdamW with a rate by kind, and only the matrices decay.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.optim import AdamW, Optimizer

from tinyexperts.errors import InputError, require_at_least
from tinyexperts.layers.feed_forward import FeedForward
from tinyexperts.layers.table_layer import TableLayer
from tinyexperts.ops.expert_mlp.deferred import supports_deferred
from tinyexperts.optim.embedding_and_head import find_embedding_and_head
from tinyexperts.optim.row_sparse_adam import RowSparseAdam

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
_FLATTENED = "what FullyShardedDataParallel has flattened: use torch.distributed.fsdp.fully_shard"


@dataclass(frozen=True, kw_only=True)
class ParameterKinds:
    """A model's trainable parameters by kind, each once, under the names of `model.named_parameters()`."""

    tables: dict[str, nn.Parameter]
    """One row an expert, of which a step touches few."""
    matrices: dict[str, nn.Parameter]
    """Those of two dimensions or more that are nothing else."""
    embedding: dict[str, nn.Parameter]
    """The token embedding, also where it is the head too."""
    head: dict[str, nn.Parameter]
    """The matrix of the logits."""
    vectors: dict[str, nn.Parameter]
    """Norm gains and biases."""


def split_parameters(model: nn.Module) -> ParameterKinds:
    """Split the trainable parameters by kind, also those of modules that are wrapped, compiled or nested.

    Tables are those that FeedForward layers name. Outside of these layers:

    The embedding: nn.Embedding and nn.EmbeddingBag, those of positions too; modules called `embedding`; and the result
    of a module's get_input_embeddings().

    The head: the result of a module's get_output_embeddings(); modules called `head` or `lm_head`; and each nn.Linear
    that makes as many numbers as an embedding has rows and whose result no other layer takes. (The up projection of an
    MLP may be as wide as the vocabulary, but a down projection takes its result.)

    Tied weights count once, as embedding. Of the rest, parameters with two dimensions or more are matrices, the others
    vectors: biases, also those of a head.

    Args:
        model (nn.Module): any model.

    Returns:
        The parameters by kind.

    Raises:
        InputError: FullyShardedDataParallel has flattened the parameters.
    """
    return _split(model, *find_embedding_and_head(model))


def _split(model: nn.Module, embedding: set[nn.Parameter], head: set[nn.Parameter]) -> ParameterKinds:
    tables: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, FeedForward):
            tables.update(module.parameter_groups().tables)
        elif isinstance(module, nn.Linear | nn.Embedding) and module.weight.dim() != 2:
            raise InputError(f"the weights of {type(module).__name__} must have two dimensions, got {_FLATTENED}")
    kinds = ParameterKinds(tables={}, matrices={}, embedding={}, head={}, vectors={})
    for name, parameter in model.named_parameters():
        if isinstance(parameter, FlatParameter):
            raise InputError(f"parameters must keep their shapes, got {_FLATTENED}")
        if not parameter.requires_grad:
            continue
        if parameter in tables:
            kinds.tables[name] = parameter
        elif parameter in embedding:
            kinds.embedding[name] = parameter
        elif parameter in head:
            kinds.head[name] = parameter
        elif parameter.dim() >= 2:
            kinds.matrices[name] = parameter
        else:
            kinds.vectors[name] = parameter
    return kinds


def build_optimizers(
    model: nn.Module,
    *,
    sparse_tables: bool,
    matrix_lr: float,
    embedding_lr: float | None,
    head_lr: float | None,
    vector_lr: float,
    table_lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.95),
    table_betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    table_second_moment: str = "element",
    table_rounding_seed: int | None = None,
) -> list[Optimizer]:
    """Build one AdamW and, for tables with sparse gradients, one RowSparseAdam: fused where all tables allow it.

    Every group carries "name" (tables, matrices, embedding, head or vectors) and "peak_lr", which
    `scale_learning_rates` multiplies. Kinds without parameters make no group. A rate for an embedding or a head that
    the model lacks gives a warning if matrices outside of FeedForward layers are trained.

    Args:
        model (nn.Module): any model.
        sparse_tables (bool): True if the tables' gradients are sparse. Otherwise the tables are a group of the AdamW,
            without weight decay.
        matrix_lr (float): peak learning rate of the hidden matrices.
        embedding_lr (float | None): that of the token embedding; None if the model has none.
        head_lr (float | None): that of the head; None if the model has none.
        vector_lr (float): that of the vectors.
        table_lr (float): that of the tables.
        betas (tuple[float, float]): (beta1, beta2) of Adam, for everything but the tables.
        table_betas (tuple[float, float]): (beta1, beta2) of the tables.
        eps (float): added to Adam's denominator.
        weight_decay (float): decoupled decay of the matrices: a step shrinks them by learning rate * weight_decay.
        table_second_moment (str): "element" or "row", as in RowSparseAdam.
        table_rounding_seed (int | None): tables, which must be bf16, are rounded stochastically with this seed of
            RowSparseAdam; None: to nearest. For sparse tables.

    Returns:
        The AdamW, then the RowSparseAdam; only those that have parameters.

    Raises:
        InputError: a table_rounding_seed without sparse tables, or what RowSparseAdam refuses; parameters that
            split_parameters refuses, a quantized table, which nothing trains, or a rate of None
            for a kind that the model has.
    """
    _refuse_quantized_tables(model)
    if table_rounding_seed is not None and not sparse_tables:
        raise InputError("table_rounding_seed is for sparse tables, got sparse_tables=False")
    embedding, head = find_embedding_and_head(model)
    kinds = _split(model, embedding, head)
    for kind, rate in (("embedding", embedding_lr), ("head", head_lr)):
        if rate is None and (found := getattr(kinds, kind)):
            raise InputError(f"{kind}_lr must be given for {', '.join(found)}, got None")
    missing = [(embedding, embedding_lr, "embedding"), (head, head_lr, "head")]
    _warn_of_missing([kind for found, rate, kind in missing if rate is not None and not found], kinds, model)

    def group(name: str, lr: float | None, **options: Any) -> list[dict[str, Any]]:
        parameters = list(getattr(kinds, name).values())
        return [{"name": name, "params": parameters, "lr": lr, "peak_lr": lr, **options}] if parameters else []

    tables = group("tables", table_lr, betas=table_betas)
    dense = [
        *group("matrices", matrix_lr, weight_decay=weight_decay),
        *group("embedding", embedding_lr),
        *group("head", head_lr),
        *group("vectors", vector_lr),
        *([] if sparse_tables else tables),
    ]
    optimizers: list[Optimizer] = []
    if dense:
        parameters = [parameter for each in dense for parameter in each["params"]]
        fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
        optimizers.append(AdamW(dense, betas=betas, eps=eps, weight_decay=0.0, fused=fused))
    if sparse_tables and tables:
        fused = all(supports_deferred(table) for table in kinds.tables.values())
        optimizers.append(
            RowSparseAdam(
                tables,
                eps=eps,
                second_moment=table_second_moment,
                fused=fused,
                stochastic_rounding=table_rounding_seed is not None,
                seed=table_rounding_seed or 0,
            )
        )
    return optimizers


def _refuse_quantized_tables(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, TableLayer) and module.table_bits is not None:
            raise InputError(
                f"a quantized table is not trained, got one of {module.table_bits} bits in "
                f"{name or type(module).__name__}: train the model that it was made of, or make optimizers of your own "
                "for the other parameters"
            )


def _warn_of_missing(missing: list[str], kinds: ParameterKinds, model: nn.Module) -> None:
    """Warn of rates without parameters, unless only FeedForward layers are trained, which have neither kind."""
    in_layers = {p for module in model.modules() if isinstance(module, FeedForward) for p in module.parameters()}
    others = [name for name, parameter in kinds.matrices.items() if parameter not in in_layers]
    if missing and others:
        rates = " and ".join(f"{kind}_lr" for kind in missing)
        warnings.warn(
            f"no {' and no '.join(missing)} was found in the model, so {rates} rule{'s' * (len(missing) == 1)} nothing "
            f"and its other matrices ({others[0]}{', ...' * (len(others) > 1)}) are trained with matrix_lr; where that "
            f"is right, give {rates} as None",
            stacklevel=3,
        )


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set the learning rate of every group to `factor` times its peak.

    Args:
        optimizers (Iterable[Optimizer]): those of `build_optimizers`.
        factor (float): a schedule's value.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def expected_touched_share(num_tokens_per_step: int, retrieved_per_token: int, num_experts: int) -> float:
    """Return the expected share of a table's rows that a step touches, for ids drawn uniformly: 1 - (1 - 1/N)^(M P).

    Real routers are less even and touch fewer rows. Below about a quarter sparse gradients and RowSparseAdam are
    faster; with the fused step of the CPU they are at any share.

    Args:
        num_tokens_per_step (int): M, all sequences of all accumulated batches of one optimizer step.
        retrieved_per_token (int): P, experts a token.
        num_experts (int): N, rows of the table.

    Returns:
        The share, between 0 and 1.

    Raises:
        InputError: a negative number of tokens or experts a token, or no experts.
    """
    for name, value in (("num_tokens_per_step", num_tokens_per_step), ("retrieved_per_token", retrieved_per_token)):
        if value < 0:
            raise InputError(f"{name} must not be negative, got {value}")
    require_at_least(1, "num_experts", num_experts)
    if num_experts == 1:
        return float(num_tokens_per_step * retrieved_per_token > 0)
    # 1 - (1 - 1/N)^n loses every digit for a large N: log1p and expm1 keep them.
    return -math.expm1(num_tokens_per_step * retrieved_per_token * math.log1p(-1 / num_experts))
