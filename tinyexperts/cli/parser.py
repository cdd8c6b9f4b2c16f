"""The verbs that there are, and how the typed words reach them; a verb imports what it needs when it is chosen."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

import tinyexperts
from tinyexperts.cli import data_verbs, hub_verbs, model_verbs, study_verbs, training_verbs
from tinyexperts.errors import InputError

Verb: TypeAlias = Callable[..., None]


@dataclass(frozen=True)
class ConfiguredVerb:
    """A verb with the options of a configuration, whose class takes an import: made when the verb is chosen."""

    description: str | None
    make: Callable[[], Verb]


@dataclass(frozen=True)
class Group:
    """A verb with verbs of its own."""

    description: str
    verbs: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    word: str = "verb"
    """The word for one of them."""


Entry: TypeAlias = Verb | ConfiguredVerb | Group


# The names of training/recipes.py, whose import takes torch; a test compares them.
RECIPES = {
    "peer": "PEER: 65,536 single-neuron experts in the middle block, 4 heads x 16 active a token.",
    "dense": "A plain transformer with dense layers only, to compare the others with.",
    "expert-choice-moe": "A mixture of 16 experts in the middle block, which choose their tokens (expert choice).",
    "product-key-memory": "A product-key memory: 65,536 values in the middle block, 4 heads x 32 active a token.",
    "gpu": "PEER with 1,048,576 experts in bf16 in one of 12 blocks of width 512, for a GPU; it has run on none.",
}


def _of_recipes(make: Callable[[str], Verb]) -> dict[str, Entry]:
    return {name: ConfiguredVerb(description, functools.partial(make, name)) for name, description in RECIPES.items()}


# The names and summaries of study/all_studies.py, whose import takes torch; a test compares them.
STUDIES = {
    "isoflop": "Figure 1 and Table 1 of the paper: dense, expert-choice MoE, PKM and PEER at equal training FLOPs.",
    "num-experts": "The paper's ablation of N at 8 x 16 active experts: do more experts help?",
    "active-experts": "The paper's ablation of h x k: do more active experts help?",
    "query-norm": "The paper's ablation of query batch normalization, by the number of experts.",
    "usage": "The paper's table of perplexity, usage and unevenness by the number of experts, by query norm.",
    "placement": "Which block should carry the experts? The paper takes the middle one.",
    "optimizer": "Row-sparse or dense Adam on the tables, and at which learning rate? The paper does not say.",
    "granularity": "Sizes, tokens and active experts all vary, for the law L(P, D, G) that the paper builds on.",
    "variants": "Gated experts, other router weights, norms and sub-keys, more blocks: one change at a time.",
    "facts": "Facts that dense, expert-choice MoE, PKM and PEER store at equal training FLOPs.",
    "lifelong": "New facts taught to trained models, round by round: what is learned, and what is left of the old.",
}


def _studies() -> dict[str, Entry]:
    return {
        name: ConfiguredVerb(summary, functools.partial(study_verbs.study_command, name))
        for name, summary in STUDIES.items()
    }


VERBS = Group(
    "Train, measure and use language models with PEER layers.",
    {
        "data": Group(
            "Download texts, prepare data sets of tokens, verify them.",
            {
                "fetch": data_verbs.fetch,
                "fetch-tasks": data_verbs.fetch_tasks,
                "prepare": ConfiguredVerb(data_verbs.prepare.__doc__, data_verbs.prepare),
                "verify": data_verbs.verify,
            },
        ),
        "train": Group(
            "Train a language model from a recipe, whose --help lists every setting.",
            _of_recipes(training_verbs.train_recipe),
            word="recipe",
        ),
        "teach": ConfiguredVerb(training_verbs.teach.__doc__, training_verbs.teach),
        "plan": Group(
            "Predict the memory, the communication and the time that a recipe takes on several devices.",
            _of_recipes(training_verbs.plan_recipe),
            word="recipe",
        ),
        "evaluate": model_verbs.evaluate,
        "generate": model_verbs.generate,
        "ask": model_verbs.ask,
        "inspect": model_verbs.inspect,
        "quantise": model_verbs.quantise,
        "export": hub_verbs.export,
        "import": hub_verbs.import_model,
        "serve": hub_verbs.serve,
        "study": Group(
            "Train and compare several models, and write reports.",
            {
                "demo": ConfiguredVerb(study_verbs.demo.__doc__, study_verbs.demo),
                "report": study_verbs.report,
                "status": study_verbs.study_status,
                "run": study_verbs.run_of_study,
                **_studies(),
            },
        ),
        "bench": Group(
            "Measure the layers on this machine.",
            {
                "layer": ConfiguredVerb(study_verbs.bench_layer.__doc__, study_verbs.bench_layer),
                "tables": ConfiguredVerb(study_verbs.bench_tables.__doc__, study_verbs.bench_tables),
            },
        ),
    },
)


def run_verb(words: Sequence[str]) -> None:
    """Run the verb that the first words name, with the options that follow.

    Raises:
        InputError: no such verb, or a configuration that is refused.
        SystemExit: the help was shown, or an option was refused.
    """
    entry: Entry = VERBS
    program, rest = "tinyexperts", list(words)
    if rest == ["--version"]:
        print(f"tinyexperts {tinyexperts.__version__}")
        return
    while isinstance(entry, Group):
        word = rest.pop(0) if rest else None
        if word in ("-h", "--help"):
            _print_help(program, entry)
            return
        entry, program = _chosen(program, entry, word), f"{program} {word}"
    verb = entry.make() if isinstance(entry, ConfiguredVerb) else entry
    try:
        tyro.cli(
            verb,
            prog=program,
            description=_description(entry),
            args=rest,
            config=(tyro.conf.AvoidSubcommands,),
            registry=_plain_refusals(),
        )
    except _RefusedConfig as error:
        raise InputError(str(error)) from None


def _chosen(program: str, group: Group, word: str | None) -> Entry:
    if word and word in group.verbs:
        return group.verbs[word]
    known = f"{program} has the {group.word}s {', '.join(group.verbs)}, and {program} --help describes them"
    if word is None:
        raise InputError(f"a {group.word} is missing: {known}")
    near = difflib.get_close_matches(word, group.verbs, n=1)
    raise InputError(f"no {group.word} {word!r}{f', did you mean {near[0]!r}?' if near else ':'} {known}")


def _print_help(program: str, group: Group) -> None:
    metavar = group.word.upper()
    parser = argparse.ArgumentParser(prog=program, usage=f"{program} {metavar} ...", description=group.description)
    verbs_of_group = parser.add_subparsers(title=f"{group.word}s, each with its own --help", metavar=metavar)
    for name, entry in group.verbs.items():
        verbs_of_group.add_parser(name, help=_description(entry).partition("\n")[0].replace("%", "%%"))
    parser.print_help()


def _description(entry: Entry) -> str:
    text = entry.description if isinstance(entry, Group | ConfiguredVerb) else entry.__doc__
    return inspect.cleandoc(text or "").partition("\nArgs:")[0].rstrip()


class _RefusedConfig(Exception):
    """An InputError of a configuration on its way through the parser, which would draw a box around a ValueError."""


def _plain_refusals() -> ConstructorRegistry:
    """Return rules that build dataclasses as tyro does, and keep what they refuse one sentence."""
    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def as_tyro_does(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True  # the next answer is to be that of tyro's own rules
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None

        @functools.wraps(spec.instantiate)
        def instantiate(**fields: Any) -> Any:
            try:
                return spec.instantiate(**fields)
            except InputError as error:
                raise _RefusedConfig(str(error)) from error

        return dataclasses.replace(spec, instantiate=instantiate)

    return registry
