"""The tables of the command line: texts, plans, evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from tinyexperts.data import fetchable_corpora

if TYPE_CHECKING:
    from tinyexperts import planning, training
    from tinyexperts.evaluation import Answer, Evaluation
    from tinyexperts.evaluation.facts import AnsweredQuestion

_GIB = 2**30


def print_texts() -> None:
    """Print the corpora that `data fetch` downloads."""
    table = Table(title="tinyexperts data fetch NAME ...", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("text")
    table.add_column("MB", justify="right")
    table.add_column("license")
    for name, source in fetchable_corpora().items():
        megabytes = "--max-mb" if source.megabytes is None else f"{source.megabytes:g}"
        table.add_row(name, source.description, megabytes, source.license)
    Console().print(table)


def print_plans(config: training.TrainConfig, devices: planning.Devices, plans: list[planning.MeshPlan]) -> None:
    """Print a column for each mesh, and the quickest that fits, or what would make one fit."""
    console = Console()
    _print_fitting_width(console, config, devices, plans)
    fitting = [mesh for mesh in plans if mesh.fits(devices)]
    if fitting:
        best = min(fitting, key=lambda mesh: mesh.step_seconds)
        console.print(
            f"The quickest that fits: --distributed.mesh {best.replicate} {best.table}, ruled by {best.bound}. "
            "Weights, moments and exchanges are counted, speeds are assumed.",
            highlight=False,
        )
        return
    from tinyexperts.planning import smaller_plans

    console.print("No mesh fits, with a tenth of the memory left for what is not counted. One change alone would give:")
    table = Table("change", "mesh", "GiB a rank", "fits")
    for options, mesh in smaller_plans(config, devices).items():
        cells = f"{mesh.replicate} x {mesh.table}", f"{mesh.memory.total / _GIB:.2f}"
        table.add_row(options, *cells, "yes" if mesh.fits(devices) else "no")
    console.print(table if table.rows else "nothing that is counted here.")
    console.print(
        "More devices hold more, while each has 64 columns of a table: beyond that a wider model, or fewer experts.",
        highlight=False,
    )


def _print_fitting_width(
    console: Console, config: training.TrainConfig, devices: planning.Devices, plans: list[planning.MeshPlan]
) -> None:
    """Print several tables if one would be too wide: a number must not be cut off."""
    table = _table_of_plans(config, devices, plans)
    if len(plans) > 1 and Measurement.get(console, console.options.update(width=10_000), table).maximum > console.width:
        half = (len(plans) + 1) // 2
        _print_fitting_width(console, config, devices, plans[:half])
        _print_fitting_width(console, config, devices, plans[half:])
    else:
        console.print(table)


def _table_of_plans(config: training.TrainConfig, devices: planning.Devices, plans: list[planning.MeshPlan]) -> Table:
    table = Table(title=f"{devices.count} devices of {devices.memory_bytes / _GIB:.1f} GiB", title_justify="left")
    table.add_column("mesh (replicate x table)", no_wrap=True)
    for mesh in plans:
        table.add_column(f"{mesh.replicate} x {mesh.table}", justify="right", no_wrap=True)
    for name in ("weights", "gathered", "gradients", "moments", "activations", "copies", "total"):
        table.add_row(f"{name}, GiB a rank", *(f"{getattr(mesh.memory, name) / _GIB:.2f}" for mesh in plans))
    table.add_row("fits", *("yes" if mesh.fits(devices) else "no" for mesh in plans), end_section=True)
    for name, sent in (("for the dense part", "dense_part"), ("by columns", "columns"), ("to replicas", "replicas")):
        table.add_row(f"sent {name}, MB a step", *(f"{getattr(mesh.exchanges, sent) / 1e6:,.1f}" for mesh in plans))
    table.add_row("TFLOPs a rank and step", *(f"{mesh.flops / 1e12:.3g}" for mesh in plans), end_section=True)
    for name in ("compute", "memory", "exchange", "step"):
        milliseconds = (1e3 * getattr(mesh, name + "_seconds") for mesh in plans)
        table.add_row(f"{name}, ms", *(f"{value:,.{0 if value >= 100 else 2}f}" for value in milliseconds))
    table.add_row("ruled by", *(mesh.bound for mesh in plans))
    table.add_row("tokens a second", *(f"{config.tokens_per_step / mesh.step_seconds:,.0f}" for mesh in plans))
    return table


def print_evaluation(text: str, evaluation: Evaluation) -> None:
    """Print an evaluation under the name of its text: a table of losses, and the sentences of its tasks."""
    summary = evaluation.summary()
    table = Table(title=text, title_justify="left")
    for column in ("routing", "nats a token", "perplexity", "bits a byte", "nats, new bigrams", "tokens"):
        table.add_column(column, justify="left" if column == "routing" else "right")
    for row in filter(None, (summary, summary.get("whole_sequences"))):
        bits = row["bits_per_byte"]
        table.add_row(
            row["routing"] or "",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            "unknown" if bits is None else f"{bits:.4f}",
            f"{row['loss_by_copy']['new']:.4f}",
            f"{row['num_tokens']:,}",
        )
    console = Console()
    console.print(table)
    for result in evaluation.results.values():
        for sentence in result.sentences():
            console.print(sentence, highlight=False, markup=False)


def print_taught(taught: training.Taught) -> None:
    """Print what a model knew and knows, of what is new and of what is old."""
    console = Console()
    title = f"Taught in {taught.num_passes} passes, {taught.seconds:,.0f} s of training"
    table = Table(title=title, title_justify="left")
    for column in ("held out", "recall", "after", "nats a fact", "after", "nats a token", "after"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    for name, before in taught.before.items():
        cells: list[str] = []
        for measure, factor, digits in (("recall", 100, 1), ("nats_per_fact", 1, 2), ("loss", 1, 3)):
            values = [getattr(known, measure) for known in (before, taught.after[name])]
            unit = " %" if measure == "recall" else ""
            cells += ["" if value is None else f"{factor * value:.{digits}f}{unit}" for value in values]
        table.add_row(name, *cells)
    console.print(table)
    for name, before in taught.before.items():
        if before.answers:
            _print_answers(f"Asked: {name}", before.answers, taught.after[name].answers)


def _print_answers(title: str, before: Sequence[AnsweredQuestion], after: Sequence[AnsweredQuestion]) -> None:
    table = Table("asked", "truth", "before", "after", title=title, title_justify="left")
    for first, second in zip(before, after, strict=True):
        answers = [f"{'✓' if each.is_right else '✗'} {escape(each.answer)}" for each in (first, second)]
        table.add_row(escape(first.question), escape(first.truth), *answers)
    Console().print(table)


def print_answer(question: str, answer: Answer) -> None:
    """Print an answer with its probability, and a table of the experts behind it."""
    console = Console()
    end = "" if answer.is_whole else " ..."
    console.print(f"{escape(question.rstrip())} [bold]{escape(answer.text)}[/]{end}", highlight=False)
    console.print(f"probability {answer.probability:.1%}", highlight=False)
    if not answer.experts:
        return
    table = Table(title="Experts that the question's last token fires most", title_justify="left")
    for column in ("layer", "head", "expert", "factor of v"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for expert in answer.experts:
        table.add_row(expert.layer, str(expert.head), f"{expert.id:,}", f"{expert.factor:+.3f}")
    console.print(table)


def print_quantized(quantized: training.Quantized) -> None:
    """Print what a run's tables took and gave before and after they were quantized."""
    table = Table("", "before", "after", title="Tables of experts", title_justify="left")
    pair = quantized.before, quantized.after
    table.add_row("bits", *(str(tables.bits) for tables in pair))
    table.add_row("MB of tables", *(f"{tables.table_bytes / 1e6:,.2f}" for tables in pair))
    table.add_row("bytes that a token reads of them", *(f"{tables.bytes_per_token:,}" for tables in pair))
    table.add_row("tokens a second, one text at a time", *(f"{tables.tokens_per_second:,.0f}" for tables in pair))
    before, after = (tables.evaluation and tables.evaluation.summary() for tables in pair)
    if before and after:
        table.add_row("nats a token on held-out text", *(f"{each['loss']:.4f}" for each in (before, after)))
        table.add_row("perplexity", *(f"{each['perplexity']:.4f}" for each in (before, after)))
        for split, known in (before.get("facts") or {}).items():
            both = known["all"], after["facts"][split]["all"]
            table.add_row(f"recall, {split}", *(f"{100 * each['recall']:.1f} %" for each in both))
            table.add_row(f"nats a fact, {split}", *(f"{each['nats']:.3f}" for each in both))
    console = Console()
    for remark in quantized.remarks:
        console.print(remark, highlight=False, markup=False)
    console.print(table)


def print_tasks(measures: Mapping[str, Mapping[str, float]]) -> None:
    """Print a line for each measure of each task, with its standard error where that is known."""
    table = Table("task", "measure", "value", "standard error")
    for task, found in measures.items():
        for name, value in found.items():
            if not name.endswith("_stderr"):
                error = found.get(f"{name}_stderr")
                table.add_row(task, name, f"{value:.4g}", "" if error is None else f"{error:.2g}")
    Console().print(table)
