"""The report: its numbers are the folders' own, its verdict follows from them, nothing in them harms the page."""

# The page's true minus and multiplication signs are compared as they are.
# ruff: noqa: RUF001

from __future__ import annotations

import json
import math
import re
from collections import Counter
from datetime import UTC, datetime
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tinyexperts.comparison.report import write_report
from tinyexperts.errors import InputError

CREATED = datetime(2030, 1, 2, 3, 4, tzinfo=UTC)
VOID = {"meta", "link", "br", "img"}


def make_run(
    root: Path,
    method: str,
    seed: int,
    loss: float,
    *,
    seconds: float = 80.0,
    flops: float = 3.2e12,
    new: float = 4.9,
    stood_earlier: float = 3.0,
    completion: str = "pass",
) -> Path:
    """A run folder of eleven validations, its loss falling on a line from 8 to `loss`."""
    folder = root / f"{method}-seed{seed}"
    folder.mkdir()
    spent = [
        {"step": 10 * i, "num_tokens": 100_000 * i, "training_flops": flops * i / 10, "seconds": seconds * i / 10}
        for i in range(11)
    ]
    lines = [{"split": "validation", "loss": 8 + (loss - 8) * i / 10, **at} for i, at in enumerate(spent)]
    lines += [{"split": "train", "loss": 5.0, "tokens_per_second": 1.0, **at} for at in spent[1:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    is_peer = method == "peer"
    write(folder / "config.json", {"seed": seed, "note": "</pre><script>config</script>"})
    write(
        folder / "run.json",
        {
            "command": f"tinyexperts train {method} --seed {seed}",
            "versions": {"torch": "2.13.0", "python": "3.11.2"},
            "num_parameters": {"active": 790_000, "total": 9_162_752 if is_peer else 790_000},
            "training_flops_per_token": {"router": 250_000 if is_peer else 0, "total": 3_250_000},
            "num_steps": 100,
        },
    )
    usage = []
    if is_peer:
        share = np.array([0.5, 0.25, 0.25, 0.0] * 4) / 4
        np.save(folder / "expert-usage-blocks.2.npy", share)
        entry = {
            "layer": "blocks.2",
            "num_experts": 16,
            "usage": 0.75,
            "unevenness": 0.347,
            "gini": 0.375,
            "num_dead": 4,
        }
        usage = [{**entry, "file": "expert-usage-blocks.2.npy"}]
    write(
        folder / "evaluation.json",
        {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": 1.789,
            "num_tokens": 161_234,
            "num_bytes": 550_000,
            "num_documents": 30,
            "context_length": 256,
            "routing": None,
            "expert_usage": usage,
            "loss_by_copy": {"new": new, "stood_earlier": stood_earlier, "share_stood_earlier": 0.37},
        },
    )
    write(folder / "samples.json", [{"prompt": "def ", "completion": completion}])
    return folder


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def report(root: Path, runs: list[Path]) -> str:
    write_report(runs, root / "report.html", command="make demo", title="Twins", created=CREATED)
    return (root / "report.html").read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """The words of a piece of HTML, tags left out, white space made one."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def verdict(page: str) -> str:
    return text_of(re.search(r'<section class="verdict".*?</section>', page, re.DOTALL)[0])


def rows(page: str, label: str) -> list[list[str]]:
    """The body rows of the table in the region of that label."""
    region = re.search(rf'aria-label="{label}">(.*?)</table>', page, re.DOTALL)[1]
    body = region.split("<tbody>")[1]
    return [
        [text_of(cell) for cell in re.findall(r"<t[dh][ >].*?</t[dh]>|<td></td>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    ]


def test_report_table_of_runs_shows_each_value_of_the_folders(tmp_path: Path) -> None:
    page = report(tmp_path, [make_run(tmp_path, "dense", 0, 4.2), make_run(tmp_path, "peer", 0, 4.15, seconds=100)])
    dense, peer = rows(page, "Runs")
    assert dense == [
        *("dense", "0", "4.200", "66.69", "1.789", "4.900", "3.000", "790 k", "790 k", "3.16 MB"),
        *("3.20 × 10¹²", "0.0 %", "1.00 M", "80", "12,500"),
    ]
    assert peer == [
        *("PEER", "0", "4.150", "63.43", "1.789", "4.900", "3.000", "790 k", "9.16 M", "36.7 MB"),
        *("3.20 × 10¹²", "7.7 %", "1.00 M", "100", "10,000"),
    ]
    assert rows(page, "Expert usage") == [["PEER", "0", "blocks.2", "16", "75.0 %", "0.35", "0.38", "4"]]
    assert "tinyexperts train peer --seed 0" in page
    assert "torch 2.13.0; python 3.11.2</p>" in page


def test_report_compares_seed_by_seed_also_at_equal_time(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "dense", 0, 4.2, new=4.9), make_run(tmp_path, "peer", 0, 4.1, seconds=100, new=4.8)]
    runs += [make_run(tmp_path, "dense", 1, 4.2), make_run(tmp_path, "peer", 1, 4.12, seconds=100)]
    first, second, mean = rows(report(tmp_path, runs), "PEER against dense")
    # At second 80, PEER is at four fifths of its way from 8 to 4.1, and dense at its end.
    assert first == ["0", "4.200", "4.100", "−0.100", "−0.100", "+0.000", "+0.680", "80", "1.000", "0.80", "1.25"]
    assert second[:4] == ["1", "4.200", "4.120", "−0.080"]
    assert mean[3:] == ["−0.090", "−0.050", "+0.000", "+0.688", "", "1.000", "0.80", "1.25"]


def test_verdict_of_a_win_names_the_mean_each_seed_and_what_is_lost(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "dense", seed, 4.2) for seed in (0, 1)]
    runs += [make_run(tmp_path, "peer", 0, 4.149, seconds=100, stood_earlier=3.1)]
    runs += [make_run(tmp_path, "peer", 1, 4.151, seconds=100, stood_earlier=3.05)]
    said = verdict(report(tmp_path, runs))
    assert said.startswith(
        "At equal training FLOPs, not equal time, PEER's held-out loss is 0.050 nats a token lower than dense's "
        "in the mean of 2 seeds (seed 0: −0.051, seed 1: −0.049). Where PEER loses: "
    )
    assert "0.80 times dense's tokens a second" in said
    assert "took 1.25 times as long" in said
    assert "bigram stood earlier is 0.075 nats higher" in said
    assert "11.6 times the parameters" in said
    assert "new tokens" not in said


def test_verdict_of_a_loss_says_higher(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "dense", seed, 4.2) for seed in (0, 1)]
    runs += [make_run(tmp_path, "peer", 0, 4.251), make_run(tmp_path, "peer", 1, 4.249)]
    assert "PEER's held-out loss is 0.050 nats a token higher than dense's" in verdict(report(tmp_path, runs))


@pytest.mark.parametrize(
    ("losses", "mean"),
    [((4.1, 4.25), "−0.025"), ((4.14, 4.16), "−0.050"), ((4.2, 4.2), "+0.000")],
    ids=["signs differ", "zero inside the interval", "nothing"],
)
def test_verdict_cannot_tell_where_seeds_disagree(tmp_path: Path, losses: tuple[float, float], mean: str) -> None:
    runs = [make_run(tmp_path, "dense", seed, 4.2) for seed in (0, 1)]
    runs += [make_run(tmp_path, "peer", seed, loss) for seed, loss in enumerate(losses)]
    said = verdict(report(tmp_path, runs))
    assert said.startswith("Can't tell at this scale: at equal training FLOPs, not equal time,")
    assert f"{mean} nats a token in the mean" in said
    assert "lower" not in said


def test_verdict_of_one_seed_or_of_a_loss_that_is_not_finite_decides_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "dense", 0, 4.2), make_run(tmp_path, "peer", 0, 4.1)]
    assert verdict(report(tmp_path, runs)).startswith("Can't tell from one seed: ")
    runs += [make_run(tmp_path, "dense", 1, 4.2), make_run(tmp_path, "peer", 1, math.nan)]
    page = report(tmp_path, runs)
    assert verdict(page).startswith("Can't tell at this scale")
    assert rows(page, "Runs")[3][2] == "not finite"


def test_verdict_says_when_the_flops_were_not_equal(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "dense", seed, 4.2) for seed in (0, 1)]
    runs += [make_run(tmp_path, "peer", seed, 4.1, flops=3.2e12 * 1.03) for seed in (0, 1)]
    said = verdict(report(tmp_path, runs))
    assert said.startswith("At unequal training FLOPs (PEER spent 1.03 times dense's),")
    assert "equal training FLOPs, not equal time" not in said


def test_report_escapes_what_the_model_wrote(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>&amp;\x00\x1b\ud800</pre>"
    run = make_run(tmp_path, "dense", 0, 4.2, completion=attack)
    write(run / "samples.json", [{"prompt": "<script>prompt</script>", "completion": attack}])
    page = report(tmp_path, [run])
    assert "<script" not in page.lower()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;\ufffd\ufffd\ufffd&lt;/pre&gt;" in page
    assert "&lt;script&gt;prompt&lt;/script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_report_says_what_is_missing_and_still_shows_the_rest(tmp_path: Path) -> None:
    dense, peer = make_run(tmp_path, "dense", 0, 4.2), make_run(tmp_path, "peer", 0, 4.1)
    (dense / "evaluation.json").unlink()
    (peer / "expert-usage-blocks.2.npy").write_bytes(b"not an array")
    (peer / "run.json").write_text("{", encoding="utf-8")
    with (peer / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"split": "train", "st')
    page = report(tmp_path, [dense, peer, tmp_path / "peer-seed7"])
    missing = text_of(re.search(r'aria-label="What is missing or doubtful".*?</section>', page, re.DOTALL)[0])
    assert "dense-seed0: evaluation.json is missing." in missing
    assert "peer-seed0: run.json can't be read" in missing
    assert "peer-seed0: expert-usage-blocks.2.npy can't be read" in missing
    assert "peer-seed0: line 22 of metrics.jsonl is broken and was left out." in missing
    assert missing.count("peer-seed7") == 1
    assert verdict(page) == "PEER and dense share no seed that was evaluated for both, so they can't be compared."
    assert [row[:3] for row in rows(page, "Runs")] == [
        ["dense", "0", "–"],
        ["PEER", "0", "4.100"],
        ["PEER", "7", "–"],
    ]


def test_report_warns_where_evaluations_are_not_alike(tmp_path: Path) -> None:
    dense, peer = make_run(tmp_path, "dense", 0, 4.2), make_run(tmp_path, "peer", 0, 4.1)
    evaluation = json.loads((peer / "evaluation.json").read_text(encoding="utf-8"))
    write(peer / "evaluation.json", {**evaluation, "num_tokens": 1000})
    page = report(tmp_path, [dense, peer])
    assert (
        "different numbers of held-out tokens, so compare with care (dense-seed0: 161,234, peer-seed0: 1,000)" in page
    )


def test_report_says_which_routing_gave_which_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path, "expert-choice-moe", 0, 4.2)
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    whole = {"routing": "whole sequences", "loss": 4.0, "perplexity": 54.6}
    write(run / "evaluation.json", {**evaluation, "routing": "threshold", "whole_sequences": whole})
    said = text_of(report(tmp_path, [run]))
    assert "expert-choice-moe-seed0: routing in the evaluation above: threshold." in said
    assert "With the other routing (whole sequences) its held-out loss is 4.000 nats, perplexity 54.60." in said


def test_report_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run folder, got none"):
        write_report([], tmp_path / "report.html", command="make demo")


class Structure(HTMLParser):
    """Collects ids, references to them and where tags fail to nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.references: set[str] = set()
        self.addresses: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids[value] += 1
            self.references.update(re.findall(r"url\(#([^)]*)\)", value or ""))
            if name.endswith("href") and value.startswith("#"):
                self.references.add(value[1:])
            elif name.endswith(("href", "src")):
                self.addresses.append(value)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{tag} at {self.getpos()}")


def test_report_is_self_contained_well_nested_and_the_same_each_time(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, m, seed, loss) for m, loss in (("dense", 4.2), ("peer", 4.1)) for seed in (0, 1)]
    page = report(tmp_path, runs)
    structure = Structure()
    structure.feed(page)
    assert structure.wrong == []
    assert structure.open == []
    assert [name for name, count in structure.ids.items() if count > 1] == []
    assert structure.references
    assert structure.references <= structure.ids.keys()
    assert structure.addresses == ["data:,"]
    assert page.count("<figure>") == page.count("<svg ") == page.count('role="img"') == 6
    assert report(tmp_path, runs) == page


def test_figures_say_where_the_curves_end_and_how_many_experts_are_unused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "dense", 0, 4.2), make_run(tmp_path, "dense", 1, 4.4)]
    runs += [make_run(tmp_path, "peer", 0, 4.1), make_run(tmp_path, "peer", 1, 4.2)]
    labels = re.findall(r'aria-label="([^"]*(?:chart|Histogram)[^"]*)"', report(tmp_path, runs))
    assert labels[0] == "Line chart: held-out loss against training FLOPs. It ends at dense 4.30, PEER 4.15."
    assert labels[3].endswith("It ends at seed 0 −0.100, seed 1 −0.200, mean −0.150.")
    assert (
        labels[4] == "Histogram of 16 experts by router weight: 25.0 percent unused, the rest from 1 to 2 even shares."
    )
