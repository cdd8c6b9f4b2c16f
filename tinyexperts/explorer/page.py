"""The sections of the explorer's page: the grid of use, questions with their experts, facts without theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinyexperts.comparison.findings import difference_cells, format_interval
from tinyexperts.data.shards.reader import TokenSplit
from tinyexperts.evaluation import FiredExpert
from tinyexperts.explorer.figures import experts_per_pixel, knock_out_curves, use_grid
from tinyexperts.explorer.knock_out import KnockOut
from tinyexperts.explorer.questions import Question, promoted_tokens
from tinyexperts.explorer.taught_rows import TaughtRows
from tinyexperts.explorer.text_sample import SampleUse, passage
from tinyexperts.model import Transformer
from tinyexperts.report.numbers import MISSING, percent, signed
from tinyexperts.report.page import Finding, Findings, Section
from tinyexperts.report.table import Table

EXPERTS_PER_HEAD = 3
"""The experts of a head that a question shows."""
_PROMOTED, _PASSAGES = 5, 3
_SPACES = str.maketrans({" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"})


@dataclass(frozen=True, kw_only=True)
class Explored:
    """A model with the measurements of its experts that a page shows."""

    model: Transformer
    held_out: TokenSplit
    """The held-out texts, and the tokenizer."""
    questions: Sequence[Question]
    is_chosen: bool
    """True if the questions are the best answered ones, and not a caller's."""
    texts: Sequence[np.ndarray]
    """The sample of training texts."""
    use: SampleUse
    knock_out: KnockOut | None
    """None: the data set has no facts."""
    taught: Mapping[str, TaughtRows] | None = None
    """What teaching did to the tables, by the layer's name; None: the run was not taught."""

    @property
    def sample(self) -> str:
        """The sample in words."""
        return f"a drawn sample of {len(self.texts):,} training texts ({sum(map(len, self.texts)):,} tokens)"


def findings_of(explored: Explored) -> Findings:
    """Return the findings about an explored model, with their sections."""
    questions = [_question_section(explored, number) for number in range(len(explored.questions))]
    found, doubts = explored.knock_out, []
    if found is not None and found.num_right < len(found.statements):
        doubts.append(
            f"The model answers {found.num_right} of the {len(found.statements)} facts of the knock-out right; the "
            "others are those that it answers best."
        )
    if questions:
        questions.insert(0, Section(title="How to read the questions", notes=_reading(explored)))
    return Findings(
        findings=[
            *_about_questions(explored),
            *_about_use(explored.use),
            *_about_teaching(explored.taught or {}),
            *_about_knock_out(found),
        ],
        doubts=doubts,
        sections=[
            _use_section(explored),
            *_teaching_section(explored.taught or {}),
            *questions,
            *_knock_out_section(explored),
        ],
    )


def _about_questions(explored: Explored) -> list[Finding]:
    known = [question for question in explored.questions if question.truth is not None]
    if not known:
        return []
    right = f"{sum(question.is_right for question in known)} of {len(known)}"
    if explored.is_chosen:
        return [Finding(text=f"Of each attribute the best answered held-out question is shown: {right} are right.")]
    return [Finding(text=f"Of the questions whose truth the data set has, the model answers {right} right.")]


def _about_use(use: SampleUse) -> list[Finding]:
    return [
        Finding(
            text=f"{percent(usage.usage)} of the {usage.num_experts:,} experts of {name} are used by the sample, with "
            f"an unevenness of {usage.unevenness:.2f} nats."
        )
        for name, usage in use.usage.items()
    ]


def _about_teaching(taught: Mapping[str, TaughtRows]) -> list[Finding]:
    return [
        Finding(
            text=f"Teaching changed {rows.changed.sum():,} of the {len(rows.change):,} experts of {name}. Of what old "
            f"texts retrieve, {percent(rows.share(rows.old, rows.changed))} are among them."
        )
        for name, rows in taught.items()
    ]


def _teaching_section(taught: Mapping[str, TaughtRows]) -> list[Section]:
    if not taught:
        return []
    cells = []
    for name, rows in taught.items():
        free = rows.is_free
        squared = rows.change**2
        cells.append(
            (
                *(name, f"{len(rows.change):,}", f"{rows.changed.sum():,}"),
                percent(rows.share(rows.new, rows.changed)),
                percent(rows.share(rows.old, rows.changed)),
                f"{free.sum():,}",
                f"{(free & rows.changed).sum():,}",
                percent(rows.share(rows.new, free)),
                percent(rows.share(squared, free)),
            )
        )
    table = Table(
        name="taught-rows",
        title="Experts that teaching changed",
        columns=(
            *("Layer", "Experts", "Changed", "New texts: retrievals of changed", "Old texts: retrievals of changed"),
            *("Retrieved by no old text", "Of these changed", "New texts: retrievals of these"),
            "Share of the change in these",
        ),
        rows=tuple(cells),
        note="Counted over samples of the new texts and of those of the first run. The change is the sum over experts "
        "of the square of its length, each relative to that of the expert before.",
    )
    return [Section(title="What teaching changed", tables=(table,))]


def _about_knock_out(found: KnockOut | None) -> list[Finding]:
    if found is None or not found.counts:
        return []
    place = found.counts.index(16) if 16 in found.counts else -1  # of more a token has hardly any
    count = found.counts[place]
    own, others, drawn = (rise[place].mean() for rise in (found.fired.own, found.fired.others, found.drawn.own))
    difference = found.own_minus_others(count)
    meaning = {
        "higher": "the fact loses more than others do",
        "lower": "other facts lose more than the fact itself",
        "undecided": "the interval holds zero, so no difference is shown",
    }[difference.outcome]
    return [
        Finding(
            text=f"Without the {count} experts that fire most at its answer, the loss of a fact rises by {signed(own)} "
            f"nats, and that of other facts by {signed(others)}. The difference is {signed(difference.mean)} nats "
            f"(95 % interval {format_interval(difference)}, {len(found.statements)} facts): {meaning}. Without {count} "
            f"random ones instead, the loss of the fact rises by {signed(drawn)}."
        )
    ]


def _use_section(explored: Explored) -> Section:
    drawings = [
        use_grid(
            name, usage, [[e.id for e in question.strongest(name, EXPERTS_PER_HEAD)] for question in explored.questions]
        )
        for name, usage in explored.use.usage.items()
    ]
    blocks = {experts_per_pixel(usage.num_experts) for usage in explored.use.usage.values()}
    pixels = " or ".join("one expert" if block == 1 else f"the mean of {block} x {block} experts" for block in blocks)
    marked = " The experts that each question below shows are marked." if explored.questions else ""
    return Section(
        title="The grid of use",
        notes=(
            f"Use is an expert's share of the router weight over {explored.sample}. A pixel is {pixels}. "
            "It has no color where none is used, and the full color from 100 even shares (100 / N) on; the scale is "
            "logarithmic. Expert (i, j) is in row i and column j: its key is sub-key i of the first half with sub-key "
            f"j of the second.{marked}",
        ),
        drawings=tuple(drawings),
    )


def _reading(explored: Explored) -> tuple[str, ...]:
    return (
        f"Each table has the {EXPERTS_PER_HEAD} experts of each head that the question's last token fires most. An "
        "expert (u, v) adds factor times v to the stream; the factor is its router weight times its activation.",
        "Promotes: the tokens whose logits the expert's output would raise most if it went straight to the head. This "
        "is approximate: the blocks that follow are left out, and of the final norm all but its gain. "
        "\N{OPEN BOX} is a space, \N{DOWNWARDS ARROW WITH CORNER LEFTWARDS} the end of a line, "
        "\N{REPLACEMENT CHARACTER} a part of a character.",
        f"Texts that fire it most: those of {explored.sample}, without those that begin with the question. The "
        "token that fires the expert is between angle quotes; the number before a text is the factor there.",
    )


def _question_section(explored: Explored, number: int) -> Section:
    question = explored.questions[number]
    answer = question.answer
    end = "" if answer.is_whole else " (cut off)"
    note = f'Answer: "{answer.text}"{end}, with a probability of {percent(answer.probability)}.'
    if question.truth is not None:
        note += f' Truth: "{question.truth.value}". The answer is {"right" if question.is_right else "wrong"}.'
    tables = []
    for name in explored.use.usage:
        rows = tuple(_row(explored, question, expert) for expert in question.strongest(name, EXPERTS_PER_HEAD))
        table = Table(
            name=f"question-{number + 1}-{name}",
            title=f"Experts of {name} that question {number + 1} fires most",
            columns=(
                *(
                    "Head",
                    "Expert (i,\N{NO-BREAK SPACE}j)",
                    "Router weight",
                    "Activation",
                    "Factor of v",
                    "Promotes (approximately)",
                ),
                *(("Changed by", "Retrievals by old texts") if explored.taught else ()),
                "Texts that fire it most",
            ),
            rows=rows,
            note=f"Layer: {name}." if len(explored.use.usage) > 1 else "",
        )
        tables.append(table)
    return Section(title=f"Question {number + 1}: {question.text}", notes=(note,), tables=tuple(tables))


def _row(explored: Explored, question: Question, expert: FiredExpert) -> tuple[str, ...]:
    side = round(explored.use.usage[expert.layer].num_experts ** 0.5)
    passages = []
    for sighting in explored.use.sightings[expert.layer, expert.id]:
        text = explored.texts[sighting.text]
        if not explored.held_out.tokenizer.decode(text[1:].tolist()).startswith(question.text):
            passages.append(
                f"{signed(sighting.factor, 2)} {passage(explored.held_out.tokenizer, text, sighting.place)}"
            )
    return (
        str(expert.head),
        f"({expert.id // side}, {expert.id % side})",
        f"{expert.router_weight:.3f}",
        signed(expert.activation),
        signed(expert.factor),
        _promoted(explored, expert),
        *_taught_cells(explored, expert),
        "\n".join(passages[:_PASSAGES]) or MISSING,
    )


def _taught_cells(explored: Explored, expert: FiredExpert) -> tuple[str, ...]:
    if not explored.taught:
        return ()
    rows = explored.taught[expert.layer]
    return percent(rows.change[expert.id]), f"{rows.old[expert.id]:,.0f}"


def _promoted(explored: Explored, expert: FiredExpert) -> str:
    if not expert.factor:
        return MISSING
    tokenizer, names = explored.held_out.tokenizer, []
    for token in promoted_tokens(explored.model, expert, _PROMOTED):
        is_end = token == tokenizer.end_of_text_id
        names.append("(end of text)" if is_end else tokenizer.decode([token]).translate(_SPACES))
    return " \N{MIDDLE DOT} ".join(names)


def _knock_out_section(explored: Explored) -> list[Section]:
    if (found := explored.knock_out) is None:
        return []
    num_facts, title = len(found.statements), "Facts without their experts"
    if not found.counts:
        note = "For some fact no expert fires, or none is left to draw, so that there is nothing to knock out."
        return [Section(title=title, notes=(note,))]
    rows = []
    for place, count in enumerate(found.counts):
        rises = (found.fired.own, found.fired.others, found.drawn.own, found.drawn.others)
        rows.append(
            (
                str(count),
                *(signed(rise[place].mean()) for rise in rises),
                *difference_cells(found.own_minus_others(count)),
                *difference_cells(found.fired_minus_drawn(count)),
            )
        )
    table = Table(
        name="knock-out",
        title="Rise of the loss of answers without experts",
        columns=(
            *("Experts", "Fired: own fact", "Fired: other facts", "Random: own fact", "Random: other facts"),
            *("Fired, own minus others", "95 % interval", "Own, fired minus random", "95 % interval"),
        ),
        rows=tuple(rows),
        note="Rises are in nats an answer, the mean over facts; intervals are those of paired differences over facts.",
    )
    notes = (
        f"For each of {num_facts} held-out statements of facts, drawn among those that the model answers right, the "
        "experts with the largest factors at the tokens that predict the answer are knocked out: their v is zero. "
        "These tokens are the question's last and the answer's own; factors are summed over them and over heads. The "
        f"figure shows how much the loss of that fact's answer rises, and that of the other {num_facts - 1}, with 95 % "
        "intervals over facts.",
        f"Random: as many experts, {found.num_draws} draws, among those that fire at the answers of the other facts "
        "and not at this one's. They may have fired earlier in the question.",
        f"With all experts, the loss of an answer is {found.losses.mean():.3f} nats.",
    )
    by_fact = _by_fact(explored, found)
    return [
        Section(title=title, notes=notes, drawings=(knock_out_curves(found),), tables=(table,)),
        Section(title=by_fact.title, tables=(by_fact,)),
    ]


def _by_fact(explored: Explored, found: KnockOut) -> Table:
    split = explored.held_out
    rows = []
    for place, number in enumerate(found.statements):
        statement = split.tokenizer.decode(split.document(number)[:-1].tolist())
        rises = (signed(rise) for rise in found.fired.own[:, place].tolist())
        rows.append((statement, f"{found.losses[place]:.3f}", *rises))
    return Table(
        name="knock-out-by-fact",
        title="Each fact without the experts that fire most for it",
        columns=("Statement", "Loss, nats", *(f"Rise without {count}" for count in found.counts)),
        rows=tuple(rows),
        is_folded=True,
    )
