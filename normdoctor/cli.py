"""The command line: options → one API call → one renderer → an exit code.

0: nothing at or above --fail-on. 1: findings at or above it, a fold whose proof failed, a recalibration that is worse.
2: could not do it. 2 wins over 1 wins over 0.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from normdoctor import __version__
from normdoctor.commands.common import choice, complain, stdout
from normdoctor.commands.compare import compare
from normdoctor.commands.fold import fold
from normdoctor.commands.inspect import inspect
from normdoctor.commands.recalibrate import recalibrate
from normdoctor.errors import NormDoctorError

if TYPE_CHECKING:
    pass

# What each command needs is imported inside it: --help and errors must not pay for numpy or rich tables.

app = typer.Typer(
    name="normdoctor",
    help="Inspect, judge, repair and fold the norm layers of trained PyTorch and ONNX models.",
    epilog="Exit codes: 0 fine, 1 findings at or above --fail-on a failed proof or a worse result, 2 could not do it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class ListFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"
    MARKDOWN = "markdown"


def main() -> None:
    """The console script."""
    try:
        app()
    except NormDoctorError as error:
        if not error.told_elsewhere:
            complain(error)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normdoctor {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


app.command()(inspect)


@app.command()
def rules(
    output_format: Annotated[ListFormat, choice("--format", ListFormat, "How to write the list.")] = ListFormat.CONSOLE,
) -> None:
    """List every rule: code, name, severity and what it says."""
    from normdoctor.reports import rule_book

    with stdout() as stream:
        if output_format is ListFormat.JSON:
            stream.write(rule_book.as_json())
        elif output_format is ListFormat.MARKDOWN:
            stream.write(rule_book.as_markdown())
        else:
            rule_book.write_table(stream)


@app.command()
def explain(
    code: Annotated[str, typer.Argument(help="A rule's code or name: S104, warmup-residue.")],
) -> None:
    """Explain one rule: what it means, when it is harmless, what to do, where it comes from."""
    from normdoctor.reports import rule_book
    from normdoctor.selection import find_rule

    rule = find_rule(code)
    with stdout() as stream:
        rule_book.write_explanation(rule, stream)


app.command()(compare)
app.command()(recalibrate)
app.command()(fold)
