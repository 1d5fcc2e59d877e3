"""The commands. Six that a newcomer needs, the rest under "more"."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from prefopt import __version__
from prefopt.errors import EXIT_CODES, DataError, PrefoptError

if TYPE_CHECKING:
    from prefopt.config import Document, RunConfig, Stage
    from prefopt.plugins import Plugins

MORE = ("validate", "resume", "explain", "data", "judge", "schema")
FEW_COLLECTIONS = 100_000
"""New objects before garbage is looked for: a short command would spend a fifth of its time on that."""
EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."


class Verbs(TyperGroup):
    """A group whose help shows the six verbs of a newcomer first."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        first = {name: command for name, command in self.commands.items() if name not in MORE}
        rest = {name: command for name, command in self.commands.items() if name in MORE}
        for title, commands in (("Commands", first), ("More", rest)):
            with formatter.section(title):
                formatter.write_dl([(name, command.get_short_help_str(90)) for name, command in commands.items()])


app = typer.Typer(
    name="prefopt",
    help="Train language models from preferences, and find out which method is best for you.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help would double the start-up time
    cls=Verbs,
)
show = typer.Typer(help="Print what a run will do.", no_args_is_help=True)
plugins = typer.Typer(help="List, check and create plugins.", no_args_is_help=True)
bench = typer.Typer(help="Compare methods under equal conditions.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(show, name="show")
app.add_typer(plugins, name="plugins")
data = typer.Typer(help="Look at data before anything is trained.", no_args_is_help=True)
app.add_typer(data, name="data")
judge = typer.Typer(help="Let judges label rows and compare systems, and measure the judges.", no_args_is_help=True)
app.add_typer(judge, name="judge")

ConfigFile = Annotated[Path, typer.Argument(help="A YAML configuration.", metavar="RUN.YAML")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, as section.key=value.", metavar="[KEY=VALUE]...")
]


def main() -> None:
    """The entry point: problems go to standard error, their kind becomes the exit code."""
    gc.set_threshold(FEW_COLLECTIONS)
    try:
        app()
    except PrefoptError as error:
        for problem in error.problems:
            print(f"{error.title}: {problem}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prefopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _read(path: Path, overrides: list[str] | None, look: bool = True) -> tuple[RunConfig, Plugins, Document]:
    """A configuration, the plugins it may use, and the document it was read from; with `look`, checked for what can be
    seen without a model."""
    from prefopt.config import allowed_in, read_document, run_from
    from prefopt.plugins import load
    from prefopt.preflight import check

    document = read_document(path, overrides or ())
    found = load(allowed_in(document), whole=False)
    config = run_from(document, found.find)
    if look:
        check(config, found.registry, where=document.where, beside=path.parent)
    return config, found, document


def _pipeline(path: Path, overrides: list[str] | None) -> tuple[list[Stage], Plugins] | None:
    """The stages of a pipeline, checked, and the plugins they may use; None for the configuration of one run."""
    from prefopt.config import allowed_in, holds_stages, read_document

    document = read_document(path, overrides or ())
    if not holds_stages(document):
        return None
    from prefopt.pipeline import checked
    from prefopt.plugins import load

    found = load(allowed_in(document), whole=False)
    return checked(document, found, path.parent), found


@contextmanager
def _located(document: Document) -> Iterator[None]:
    """Gives problems met while running the places of the keys they name."""
    try:
        yield
    except PrefoptError as error:
        from prefopt.config import located

        raise located(error, document.where) from None


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


# --- the verbs a newcomer needs --------------------------------------------------------------------------------------


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")] = Path("."),
    recipe: Annotated[str, typer.Option(help="What to set up; `first` runs on any machine.")] = "first",
) -> None:
    """Write configurations to start from."""
    from prefopt.cli.start import write_recipe

    for line in write_recipe(folder, recipe):
        typer.echo(line)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a model as a configuration says, or the models of its stages one after another."""
    if staged := _pipeline(config, overrides):
        from prefopt.pipeline import run_stages

        for line in run_stages(*staged, warn=_warn, say=_progress):
            typer.echo(line)
        return
    run, found, document = _read(config, overrides)
    from prefopt.session import train as start

    with _located(document):
        result = start(run, found, warn=_warn)
    typer.echo(f"{result.outcome}: {result.model}")
    if result.verdict:
        typer.echo(result.verdict)


@bench.command("run")
def bench_run(
    suite: Annotated[Path, typer.Argument(help="A YAML suite.", metavar="SUITE.YAML")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where to; default runs/bench-NAME.")] = None,
) -> None:
    """Run a suite: finished cells are kept, the rest is trained and measured, a report is written."""
    from prefopt.bench.suite import run_suite

    for line in run_suite(suite, overrides or (), out):
        typer.echo(line)


@show.command("batch")
def show_batch(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the first step as text, roles and masks: what exactly is trained on."""
    run, found, document = _read(config, overrides)
    from prefopt.cli.show import first_batch

    with _located(document):
        for line in first_batch(run, found):
            typer.echo(line)


@plugins.command("list")
def plugins_list(
    everything: Annotated[bool, typer.Option("--all", help="The core's own components too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List what the installed plugins offer."""
    from prefopt.cli.listing import listing
    from prefopt.plugins import load

    typer.echo(listing(load(), everything, as_json))


@plugins.command("doctor")
def plugins_doctor() -> None:
    """Say which plugins could not be loaded and why, which clash, and what could be better."""
    from prefopt.cli.listing import examine
    from prefopt.plugins import load

    healthy, lines = examine(load())
    for line in lines:
        typer.echo(line)
    if not healthy:
        raise typer.Exit(4)


@plugins.command("new")
def plugins_new(
    name: Annotated[str, typer.Argument(help="Name of the method, such as `my_method`.")],
    folder: Annotated[Path, typer.Option(help="Where to put the plugin's folder.")] = Path("."),
) -> None:
    """Write an installable plugin with one method, whose tests fail until its loss is written."""
    from prefopt.cli.start import write_plugin

    for line in write_plugin(name, folder):
        typer.echo(line)


# --- more ------------------------------------------------------------------------------------------------------------


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a configuration, the first rows of its data, and its plugins; nothing is trained or written."""
    from prefopt.preflight import describe, verdicts

    if staged := _pipeline(config, overrides):
        for stage in staged[0]:
            typer.echo(f"valid: stage {stage.name}: {describe(stage.config, staged[1].registry)}")
        return
    run, found, _ = _read(config, overrides)
    typer.echo(f"valid: {describe(run, found.registry)}")
    for line in verdicts(run):
        typer.echo(line)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Secrets that were not written to it.", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Continue a run from its last checkpoint, to the same bytes it would have had."""
    from prefopt.cli.resume import read_back

    run, found, document = read_back(folder, overrides or ())
    from prefopt.session import train as start

    with _located(document):
        result = start(run, found, resume=True, warn=_warn)
    typer.echo(f"{result.outcome}: {result.model}")
    if result.verdict:
        typer.echo(result.verdict)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="Name of a component, such as `dpo`.")],
    kind: Annotated[str | None, typer.Option(help="Its kind, where several kinds share the name.")] = None,
) -> None:
    """Explain a method or another component: formula, paper, needs, settings, known differences."""
    from prefopt.cli.listing import explanation
    from prefopt.plugins import load

    typer.echo(explanation(load(), name, kind))


@data.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(help="A YAML configuration, or a file of rows.", metavar="RUN.YAML|FILE")],
    overrides: Overrides = None,
    rejects: Annotated[Path | None, typer.Option(help="Write every bad row to this file, as JSONL.")] = None,
) -> None:
    """Read every row: what the rows are taken for, what is odd, and every bad row by class with its place."""
    from prefopt.cli.data import CONFIGS, check_rows, file_rows, finish
    from prefopt.errors import ConfigError

    if path.suffix in CONFIGS:
        run, _, _ = _read(path, overrides, look=False)
        from prefopt.preflight import opened

        sections = opened(run)
    elif overrides:
        raise ConfigError("overrides belong to a configuration, and this is a file of rows", where=str(path))
    else:
        sections = {str(path): file_rows(path)}
    found = [reject for name, rows in sections.items() for reject in check_rows(name, rows, typer.echo)]
    if not finish(found, rejects):
        raise typer.Exit(DataError.exit_code)


JudgingFile = Annotated[Path, typer.Argument(help="A YAML configuration.", metavar="JUDGING.YAML")]


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def _progress(line: str) -> None:
    typer.echo(line, err=True)


@judge.command("label")
def judge_label(config: JudgingFile, overrides: Overrides = None) -> None:
    """Write rows with a judge's soft labels and votes. What is labelled already is not asked again."""
    from prefopt.cli.judge import write_labels

    _print(write_labels(config, overrides or (), _progress))


@judge.command("evaluate")
def judge_evaluate(config: JudgingFile, overrides: Overrides = None) -> None:
    """Measure judges on pairs whose better side is known: accuracy, calibration, biases, cost."""
    from prefopt.cli.judge import write_evaluation

    _print(write_evaluation(config, overrides or (), _progress))


@judge.command("compare")
def judge_compare(config: JudgingFile, overrides: Overrides = None) -> None:
    """Compare systems by a judge: win rates, also at equal length, and a ranking."""
    from prefopt.cli.judge import write_comparison

    _print(write_comparison(config, overrides or (), _progress))


@app.command()
def schema() -> None:
    """Print the JSON schema of a run with the installed plugins, for completion in editors."""
    from prefopt.cli.start import schema_text

    typer.echo(schema_text())
