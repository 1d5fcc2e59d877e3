"""Reports about judges and by judges, as tables for a terminal and as one self-contained page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefopt.bench.judging.compare import CompareReport
from prefopt.bench.judging.evaluate import JudgeReport
from prefopt.bench.report import printable, shown
from prefopt.config import dump
from prefopt.engine.folder import write_text
from prefopt.stats import Interval

METRICS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "kappa": "kappa",
    "ties": "ties",
    "calibration_error": "calibration error",
    "brier": "Brier score",
    "position_bias": "position bias",
    "order_consistency": "orders agree",
    "length_bias": "length bias",
    "self_consistency": "self-consistency",
    "attack_success": "attack success",
    "answered": "answered",
}
NOTES = (
    "Means [95 % intervals]: Wilson for shares, bootstrap over pairs for the rest.",
    "Accuracy leaves out pairs that people call a tie, and counts a judge's tie as one half.",
    "Position bias is how much likelier a reply is preferred for being shown first, from -0.5 to 0.5.",
    "Length bias is how much likelier the longer reply is preferred than people prefer it.",
)


@dataclass(frozen=True)
class Table:
    """Text in rows, under a title."""

    title: str
    header: List[str]
    rows: List[List[str]]

    def lines(self) -> Iterator[str]:
        """Aligned for a terminal."""
        rows = [self.header, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.header))]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def judge_tables(report: JudgeReport) -> list[Table]:
    """Judges against people, what they cost, and what they could not say."""
    there = [name for name in METRICS if any(name in judge.metrics for judge in report.judges)]
    rows = [[judge.label, *(_shown(judge.metrics.get(name)) for name in there)] for judge in report.judges]
    spent = list(dict.fromkeys(name for judge in report.judges for name in judge.usage))
    cost = [[judge.label, *(f"{judge.usage.get(name, 0):,.6g}" for name in spent)] for judge in report.judges]
    missing = [[judge.label, reason, str(n)] for judge in report.judges for reason, n in judge.missing.items()]
    tables = [Table(f"Judges on {report.pairs:,} pairs", ["judge", *(METRICS[name] for name in there)], rows)]
    tables += [Table("What it took", ["judge", *spent], cost)] if spent else []
    return tables + ([Table("Without a verdict", ["judge", "reason", "pairs"], missing)] if missing else [])


def _shown(interval: Interval | None) -> str:
    """Without the number of cases."""
    return shown(None if interval is None else interval.model_copy(update={"n": None}))


def compare_tables(report: CompareReport) -> list[Table]:
    """Matches, and the ranking of all systems."""
    header = ["system", "against", "win rate", "at equal length", "answered"]
    rows = [
        [m.system, m.against, _shown(m.win_rate), _shown(m.length_controlled), f"{m.answered:,} of {m.asked:,}"]
        for m in report.matches
    ]
    places = [[str(i), name, _shown(strength)] for i, (name, strength) in enumerate(report.ranking.items(), 1)]
    return [
        Table(f"Matches on {report.prompts:,} prompts", header, rows),
        Table("Ranking", ["place", "system", "strength"], places),
    ]


def write(report: JudgeReport | CompareReport, folder: Path) -> list[str]:
    """Writes `report.json` and `report.html`; gives the lines to print."""
    tables = judge_tables(report) if isinstance(report, JudgeReport) else compare_tables(report)
    title = "Judges" if isinstance(report, JudgeReport) else "Systems"
    notes = NOTES if isinstance(report, JudgeReport) else ("Means [95 % bootstrap intervals over prompts].",)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.html", to_html(title, notes, tables, report))
    lines = [line for table in tables for line in (*table.lines(), "")]
    return [*lines, f"report: {folder / 'report.html'} (and report.json)"]


def to_html(title: str, notes: List[str], tables: List[Table], report: JudgeReport | CompareReport) -> str:
    """One page: no script, no remote asset, everything escaped."""
    environment = Environment(
        loader=PackageLoader("prefopt.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(plain=printable)
    style = environment.get_template("report.css").render()
    return environment.get_template("judges.html").render(
        title=title,
        notes=notes,
        tables=tables,
        commit=report.commit,
        configuration=dump(report.configuration),
        style_hash=b64encode(sha256(style.encode()).digest()).decode(),
    )
