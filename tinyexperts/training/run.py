"""The parts of a run: data, model, optimizers, and the choices that its configuration leaves to the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim import Optimizer

from tinyexperts.data import TokenDataset, TokenLoader, TokenSplit
from tinyexperts.errors import InputError
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig
from tinyexperts.model import Transformer
from tinyexperts.optim import LowRankAdam, build_optimizers, expected_touched_share, split_parameters
from tinyexperts.training.checkpoint import load_model
from tinyexperts.training.compilation import choose_compilation, compile_blocks
from tinyexperts.training.config import MemoryConfig, TeachingConfig, TrainConfig
from tinyexperts.training.device import choose_device, choose_precision, report_out_of_memory
from tinyexperts.training.distributed.ranks import ALONE, Ranks
from tinyexperts.training.distributed.sharding import shard_dense_part
from tinyexperts.training.memory import Memory
from tinyexperts.training.own_samples import open_texts
from tinyexperts.training.row_choice import RowChoice
from tinyexperts.training.run_folder import check_tokenizer

# On devices without a fused step of their own: sparse table gradients where a step is expected to touch a smaller share
# of the rows; above it the dense gradient with a fused AdamW wins. On the CPU the fused step wins at any share.
SPARSE_BELOW_SHARE = 0.25
# Batches of old texts by which rows are counted, at most.
_COUNTED_BATCHES = 500


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run before its next step; only the weights and the optimizers' states change."""

    config: TrainConfig
    ranks: Ranks
    dataset: TokenDataset
    loader: TokenLoader
    model: Transformer
    optimizers: list[Optimizer]
    device: torch.device
    precision: str
    num_steps: int
    flops_per_step: int
    table_choice: str
    is_compiled: bool
    compilation_choice: str
    memory: Memory | None = None
    """What a run that teaches goes over again, if anything."""
    row_choice: RowChoice | None = None
    """Which rows a step trains, where those are not all that it retrieves."""
    asked: Mapping[str, TokenSplit] = field(default_factory=dict)
    """Held-out splits that a run that teaches is measured on besides its own, by their names in metrics."""


def make_run(config: TrainConfig, ranks: Ranks = ALONE) -> Run:
    """Open the data and make the model as it is before its first step; nothing is written but a memory's own samples.

    Args:
        config (TrainConfig): the configuration.
        ranks (Ranks): the processes that train the model together.

    Raises:
        InputError: no data set, another vocabulary than the model's, too little text for a window, a device that is
            missing or too small, FLOPs that pay for no step, ranks that do not divide the batch, or the width into
            64 columns at least, a compilation that was asked for and fails; a base model that is missing or of other
            sizes, one without a table of which the tables alone are to be trained, or teaching by several ranks.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = TokenDataset.open(config.data)
    if dataset.index.vocab_size != config.model.vocab_size:
        raise InputError(
            f"model.vocab_size must be that of {config.data}, {dataset.index.vocab_size} "
            f"(--model.vocab-size {dataset.index.vocab_size}), got {config.model.vocab_size}"
        )
    context = config.model.context_length
    if config.teaching is not None:  # what is new may be shorter than a window
        context = min(context, max(1, dataset.split("train").num_tokens - 1))
    loader = TokenLoader(
        dataset.split("train"),
        batch_size=config.batch_size,
        context_length=context,
        seed=config.seed,
        rank=ranks.rank,
        num_ranks=ranks.size,
    )
    device = choose_device(config.device)
    sparse_tables, table_choice = choose_table_gradients(config, device)
    torch.manual_seed(config.seed)
    with report_out_of_memory(device):
        with torch.device("cpu"):  # the same numbers whatever the device, also torch's default one
            model = Transformer(config.model, sparse_tables=sparse_tables, ranks=ranks.groups)
        model.to(device)
        if ranks.mesh is not None:
            shard_dense_part(model, ranks)
    memory, num_passes, row_choice, asked = None, 3.0, None, {}
    if config.teaching is not None:
        memory = _begin_teaching(config, config.teaching, model, device, ranks)
        if memory is not None:
            passes = [3 if teacher is None else 4 for teacher in memory.teachers]
            num_passes += float(memory.shares @ passes)
        row_choice = _row_choice(config, config.teaching, model, sparse_tables=sparse_tables)
        asked = {name: _asked(config.teaching, data) for name, data in config.teaching.asked.items()}
    flops_per_step = round(num_passes * model.flops_per_token(config.model.context_length) * config.tokens_per_step)
    num_steps = config.num_steps or int((config.training_flops or 0) // flops_per_step)
    if num_steps < 1:
        raise InputError(
            f"training_flops must pay for one step at least, {flops_per_step:.3g}, got {config.training_flops}"
        )
    is_compiled, compilation_choice = choose_compilation(
        "off" if row_choice else config.compile,  # it counts by hooks
        device,
        training_flops=num_steps * flops_per_step,
        is_alone=ranks.size == 1,
    )
    if is_compiled:
        compile_blocks(model)
    return Run(
        config=config,
        ranks=ranks,
        dataset=dataset,
        loader=loader,
        model=model,
        optimizers=_optimizers(config, model, sparse_tables),
        device=device,
        precision=choose_precision(config.precision, device),
        num_steps=num_steps,
        flops_per_step=flops_per_step,
        table_choice=table_choice,
        is_compiled=is_compiled,
        compilation_choice=compilation_choice,
        memory=memory,
        row_choice=row_choice,
        asked=asked,
    )


def _begin_teaching(
    config: TrainConfig, teaching: TeachingConfig, model: Transformer, device: torch.device, ranks: Ranks
) -> Memory | None:
    """Give a model the weights of its base, freeze what is not trained, and return what it remembers by."""
    if ranks.size > 1:
        raise InputError(f"one process teaches a model, got {ranks.size} ranks")
    base = load_model(teaching.base, device=device)
    if base.config != config.model:
        raise InputError(f"the model must be that of {teaching.base}, whose sizes are others")
    model.load_state_dict(base.state_dict())
    if teaching.train != "everything":
        trained = tables_to_teach(model) if teaching.train == "tables" else low_rank_matrices(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    if not teaching.remember:
        return None
    return Memory(
        [_remembered(teaching, memory, base, config.seed) for memory in teaching.remember],
        weight=teaching.remember_weight,
        batch_size=config.batch_size,
        seed=config.seed,
        context=config.model.context_length,
    )


def _remembered(
    teaching: TeachingConfig, memory: MemoryConfig, base: Transformer, seed: int
) -> tuple[TokenSplit, Transformer | None]:
    """Return the texts of a memory, and the model whose predictions on them are kept."""
    teacher = None
    if memory.teacher is not None:
        device = base.embedding.weight.device
        teacher = base if memory.teacher == teaching.base else load_model(memory.teacher, device=device)
        teacher.requires_grad_(False)
    dataset = open_texts(memory, teacher, seed=seed)
    check_tokenizer(teaching.base, dataset)
    return dataset.split("train"), teacher


def _row_choice(
    config: TrainConfig, teaching: TeachingConfig, model: Transformer, *, sparse_tables: bool
) -> RowChoice | None:
    """Count the rows that old texts retrieve, where a step is to train some of its rows alone.

    Raises:
        InputError: dense table gradients.
    """
    if teaching.rows is None or teaching.old_texts is None:
        return None
    if not sparse_tables:
        raise InputError("teaching.rows must go with sparse table gradients (optimizer.table_gradients), got dense")
    dataset = TokenDataset.open(teaching.old_texts)
    check_tokenizer(teaching.base, dataset)
    split, context = dataset.split("train"), config.model.context_length
    loader = TokenLoader(
        split,
        batch_size=config.batch_size,
        context_length=min(context, max(1, split.num_tokens - 1)),
        seed=config.seed,
    )
    num_batches = min(_COUNTED_BATCHES, -(-loader.num_windows // config.batch_size))
    return RowChoice(model, teaching.rows, (loader.batch(number).inputs for number in range(num_batches)))


def _asked(teaching: TeachingConfig, data: Path) -> TokenSplit:
    dataset = TokenDataset.open(data)
    check_tokenizer(teaching.base, dataset)
    return dataset.split("validation")


def tables_to_teach(model: Transformer) -> set[str]:
    """Return the names of the tables of a model.

    Raises:
        InputError: it has none.
    """
    tables = set(split_parameters(model).tables)
    if not tables:
        raise InputError("train must be low-rank or everything for a model without a table of experts, got tables")
    return tables


def low_rank_matrices(model: Transformer) -> set[str]:
    """Return the names of the matrices of attention and of feed-forward layers, without routers."""
    return {name for name in split_parameters(model).matrices if ".router." not in name}


def choose_table_gradients(config: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Choose between sparse and dense gradients of the tables; return True for sparse, and a sentence that says why."""
    layer, choice = config.model.expert_layer, config.optimizer.table_gradients
    if not isinstance(layer, PEERConfig | ProductKeyMemoryConfig):
        return False, "no tables"
    share = expected_touched_share(config.tokens_per_step, layer.num_heads * layer.experts_per_head, layer.num_experts)
    sparse = choice == "sparse"
    if choice == "auto":
        sparse = device.type == "cpu" or share < SPARSE_BELOW_SHARE
    kind = "sparse (RowSparseAdam)" if sparse else "dense (AdamW)"
    return sparse, f"table gradients {kind}: a step touches up to {share:.0%} of {layer.num_experts:,} rows"


def _optimizers(run: TrainConfig, model: Transformer, sparse_tables: bool) -> list[Optimizer]:
    config, teaching = run.optimizer, run.teaching
    if teaching is not None and teaching.train == "low-rank":
        matrices = split_parameters(model).matrices.values()
        group = {"name": "matrices", "params": list(matrices), "peak_lr": config.matrix_learning_rate}
        return [
            LowRankAdam([group], rank=teaching.rank, lr=config.matrix_learning_rate, betas=config.betas, seed=run.seed)
        ]
    return build_optimizers(
        model,
        sparse_tables=sparse_tables,
        matrix_lr=config.matrix_learning_rate,
        embedding_lr=config.embedding_learning_rate,
        head_lr=config.head_learning_rate,
        vector_lr=config.matrix_learning_rate,
        table_lr=config.table_learning_rate,
        betas=config.betas,
        table_betas=config.table_betas,
        weight_decay=config.weight_decay,
        table_second_moment=config.table_second_moment,
    )
