"""The parts of a run: data, model, optimizers, and the choices that its configuration leaves to the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from tinyexperts.data import TokenDataset, TokenLoader, TokenSplit
from tinyexperts.errors import InputError
from tinyexperts.layers import PEERConfig, ProductKeyMemoryConfig
from tinyexperts.layers.table_layer import store_tables_in_bf16_
from tinyexperts.model import Transformer
from tinyexperts.ops.row_adam.rounding import NUM_SEEDS
from tinyexperts.optim import LowRankAdam, build_optimizers, expected_touched_share, split_parameters
from tinyexperts.training.compilation import choose_compilation, compile_blocks
from tinyexperts.training.config import (
    DEFAULT_RANK,
    TrainConfig,
    refuse_bf16_tables_of_ranks,
    refuse_quantized_tables,
)
from tinyexperts.training.device import choose_device, choose_precision, report_out_of_memory
from tinyexperts.training.distributed.ranks import ALONE, Ranks
from tinyexperts.training.distributed.sharding import shard_dense_part
from tinyexperts.training.teaching_start import Teaching, begin_teaching

# On devices without a fused step of their own: sparse table gradients where a step is expected to touch a smaller share
# of the rows; above it the dense gradient with a fused AdamW wins. On the CPU the fused step wins at any share.
SPARSE_BELOW_SHARE = 0.25


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
    teaching: Teaching | None = None
    """The parts of a run that teaches."""

    @property
    def asked(self) -> Mapping[str, TokenSplit]:
        """Held-out splits that it is measured on besides its own, by their names in metrics."""
        return {} if self.teaching is None else self.teaching.asked


def make_run(config: TrainConfig, ranks: Ranks = ALONE) -> Run:
    """Open the data and make the model as it is before its first step; nothing is written but a memory's own samples.

    Args:
        config (TrainConfig): the configuration.
        ranks (Ranks): the processes that train the model together.

    Raises:
        InputError: no data set, another vocabulary than the model's, too little text for a window, a device that is
            missing or too small, a quantized table, tables in bf16 on several ranks, FLOPs that pay for no step, ranks
            that do not divide the batch, or the width into 64 columns at least, a compilation that was asked for and
            fails; a base model that is missing or of other sizes, one without a table of which the tables alone are to
            be trained, or teaching by several ranks.
    """
    refuse_quantized_tables(config.model)
    refuse_bf16_tables_of_ranks(config, ranks.size)
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
            if config.optimizer.table_dtype == "bf16":
                store_tables_in_bf16_(model)
        model.to(device)
        if ranks.mesh is not None:
            shard_dense_part(model, ranks)
    teaching = None if config.teaching is None else begin_teaching(config, config.teaching, model, ranks)
    num_passes = 3 + (0 if teaching is None else teaching.passes_for_old)
    flops_per_step = round(num_passes * model.flops_per_token(config.model.context_length) * config.tokens_per_step)
    num_steps = config.num_steps or int((config.training_flops or 0) // flops_per_step)
    if num_steps < 1:
        raise InputError(
            f"training_flops must pay for one step at least, {flops_per_step:.3g}, got {config.training_flops}"
        )
    is_compiled, compilation_choice = choose_compilation(
        "off" if teaching is not None and teaching.row_choice is not None else config.compile,  # it counts by hooks
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
        teaching=teaching,
    )


def choose_table_gradients(config: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Choose between sparse and dense gradients of the tables; return True for sparse, and a sentence that says why."""
    layer, choice = config.model.expert_layer, config.optimizer.table_gradients
    if not isinstance(layer, PEERConfig | ProductKeyMemoryConfig):
        return False, "no tables"
    if config.teaching is not None and config.teaching.train == "low-rank":
        return False, "no table is trained"
    share = expected_touched_share(config.tokens_per_step, layer.num_heads * layer.experts_per_head, layer.num_experts)
    sparse = choice == "sparse"
    if choice == "auto":
        in_bf16 = config.optimizer.table_dtype == "bf16"  # AdamW rounds to nearest
        sparse = in_bf16 or device.type == "cpu" or share < SPARSE_BELOW_SHARE
    kind = "sparse (RowSparseAdam)" if sparse else "dense (AdamW)"
    return sparse, f"table gradients {kind}: a step touches up to {share:.0%} of {layer.num_experts:,} rows"


def _optimizers(run: TrainConfig, model: Transformer, sparse_tables: bool) -> list[Optimizer]:
    config, teaching = run.optimizer, run.teaching
    if teaching is not None and teaching.train == "low-rank":
        if config.weight_decay:
            raise InputError(f"optimizer.weight_decay must be 0 for low-rank, got {config.weight_decay}")
        matrices = split_parameters(model).matrices.values()
        group = {"name": "matrices", "params": list(matrices), "peak_lr": config.matrix_learning_rate}
        return [
            LowRankAdam(
                [group],
                rank=teaching.rank or DEFAULT_RANK,
                lr=config.matrix_learning_rate,
                betas=config.betas,
                seed=run.seed,
            )
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
        table_rounding_seed=run.seed % NUM_SEEDS if config.table_dtype == "bf16" else None,
    )
