"""`normdoctor fold`. 0: done, also where nothing could be folded. 1: the proof failed. 2: could not do it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from normdoctor.commands.common import choice, complain, stdout
from normdoctor.errors import UsageError, VerificationError

RUNNING, PLAN, RESULT = "Models that are code", "What is folded", "The result"
"""The parts of the help."""


class Export(StrEnum):
    ONNX = "onnx"


class FoldFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"
    MARKDOWN = "markdown"


def fold(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="ONNX, .pt2, TorchScript, a pickled module, weights.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The folded model; MODEL.folded.EXT by default.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only the plan: what would fold into what, what stays and why.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    evaluation: Annotated[
        bool,
        typer.Option("--eval", help="Meant for inference, though saved in training mode.", rich_help_panel=PLAN),
    ] = False,
    layernorm: Annotated[
        bool,
        typer.Option(
            "--layernorm",
            help="Move gain and bias of LayerNorm and RMSNorm onward.",
            rich_help_panel=PLAN,
        ),
    ] = False,
    decompose: Annotated[
        bool, typer.Option("--decompose", help="Turn what stays into one Mul and one Add.", rich_help_panel=PLAN)
    ] = False,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Let torch load the file, which may run code in it.", rich_help_panel=RUNNING),
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="PKG.MODULE:NAME",
            help="What builds the module of these weights.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    arch_args: Annotated[
        str | None,
        typer.Option("--arch-args", metavar="JSON", help="Its keyword arguments.", rich_help_panel=RUNNING),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Which model of the file: state_dict_ema.", rich_help_panel=RUNNING),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input-shape",
            metavar="SHAPE",
            help="[NAME=]1,3,224,224[:int64]; repeat it for several inputs.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    export: Annotated[
        Export | None, choice("--export", Export, "Export to ONNX, norms kept, and fold that.", RESULT)
    ] = None,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="ONNX opset of the export.", rich_help_panel=RESULT)
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Export for this batch size only.", rich_help_panel=RESULT)
    ] = False,
    state_dict: Annotated[
        bool,
        typer.Option("--state-dict", help="Write only the folded module's state_dict.", rich_help_panel=RESULT),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prove it on these inputs: .npz by input name, or .npy.", rich_help_panel=RESULT
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not run the original beside the result.", rich_help_panel=RESULT)
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random inputs.", rich_help_panel=RESULT)] = 0,
    output_format: Annotated[
        FoldFormat, choice("--format", FoldFormat, "How to write the report.", RESULT)
    ] = FoldFormat.CONSOLE,
    every_norm: Annotated[
        bool, typer.Option("--all", help="Show every norm in the table.", rich_help_panel=RESULT)
    ] = False,
) -> None:
    """Fold every BatchNorm that can be folded exactly, and prove it; the input is never touched."""
    from normdoctor.folding import fold as fold_model
    from normdoctor.reports import write_folding

    if str(output) == "-":
        raise UsageError("-: a model is written to a file", "Give its name with -o, or leave -o out.")
    failure = None
    try:
        report = fold_model(
            Path(model),
            output=output,
            export=None if export is None else "onnx",
            opset=opset,
            static=static,
            trust=trust,
            arch=arch,
            arch_args=arch_args,
            key=key,
            input_shape=input_shape or (),
            data=data,
            eval=evaluation,
            layernorm=layernorm,
            decompose=decompose,
            state_dict=state_dict,
            dry_run=dry_run,
            verify=not no_verify,
            overwrite=overwrite,
            seed=seed,
        ).report
    except VerificationError as error:
        report, failure = error.report, error
    with stdout() as stream:
        write_folding(report, output_format, stream, every_norm=every_norm)
    if failure is not None:
        complain(failure)
        raise typer.Exit(1)
