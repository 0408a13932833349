"""See whether normdoctor finds every norm layer of models with random weights, and nothing else.

    python benchmarks/recognition.py [--only TEXT ...] [--write]

Builds small models of many families (recognition_nets.py, and recognition_transformers.py where transformers is
installed), saves each in every format that it can be saved in, and compares what normdoctor reads with the live
module: no norm missed, none invented, names as in named_modules(), the kind where the format tells it. What is a
norm is decided by torch's base classes and by the lists of class names in recognition_truth.py, which know nothing
of normdoctor's own. Exit status 1 if anything is off.
"""

from __future__ import annotations

import sys

# The nets are beside this folder, not installed.
sys.path.extend(__file__.rpartition("benchmarks")[0] + folder for folder in ("fixtures", ""))

import argparse
import json
import logging
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import recognition_nets
import torch
from recognition_nets import Case
from recognition_truth import Norm, norms_of
from safetensors.torch import save_file
from torch import Tensor, nn

import normdoctor as nd

INTRODUCTION = """\
# Which norm layers normdoctor recognises

Written by `python benchmarks/recognition.py --write`. Each model has random weights and is read in every format
it can be saved in. A cell counts the norms that should be found, and says what is off; ✓ where nothing is: no
norm missed, none invented, every name as in `named_modules()`, every kind right where the format tells it.
"""

Save = Callable[[nn.Module, Case, Path], Path | nn.Module]


# Formats -------------------------------------------------------------------------------------------------


def save_state_dict(model: nn.Module, case: Case, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def untied(model: nn.Module) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory."""
    return {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}


def save_safetensors(model: nn.Module, case: Case, path: Path) -> Path:
    save_file(untied(model), path)
    return path


def save_shards(model: nn.Module, case: Case, path: Path) -> Path:
    """Two files cut in the middle of the tensors, and the index that transformers writes."""
    path.mkdir()
    tensors = list(untied(model).items())
    middle = (len(tensors) + 1) // 2
    places: dict[str, str] = {}
    for number, part in enumerate((tensors[:middle], tensors[middle:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), path / file)
        places.update(dict.fromkeys(dict(part), file))
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def save_module(model: nn.Module, case: Case, path: Path) -> Path:
    torch.save(model, path)
    return path


def live(model: nn.Module, case: Case, path: Path) -> nn.Module:
    return model


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    if case.inputs is None:
        raise Unsaved
    return case.inputs()


def save_trace(model: nn.Module, case: Case, path: Path) -> Path:
    torch.jit.save(torch.jit.trace(model, inputs_of(case), check_trace=False), path)
    return path


def save_export(model: nn.Module, case: Case, path: Path) -> Path:
    torch.export.save(torch.export.export(model, inputs_of(case)), path)
    return path


def save_decomposed(model: nn.Module, case: Case, path: Path) -> Path:
    torch.export.save(torch.export.export(model, inputs_of(case)).run_decompositions(), path)
    return path


class Unsaved(Exception):
    """This model is not saved in this format."""


@dataclass(frozen=True)
class Format:
    """A way of giving a model to normdoctor.

    modules: modules without tensors are kept; widths: and say their width, where only a call of LayerNorm or
    RMSNorm does otherwise. classes: the kind of each layer is told."""

    name: str
    save: Save
    suffix: str = ".pt"
    modules: bool = False
    widths: bool = True
    classes: bool = False

    def keeps(self, norm: Norm) -> bool:
        """Whether a file of this format has enough of the norm to speak of a layer."""
        return norm.has_tensors or (self.modules and (self.widths or norm.kind in ("LayerNorm", "RMSNorm")))


FORMATS = (
    Format("state_dict", save_state_dict),
    Format("safetensors", save_safetensors, ".safetensors"),
    Format("shards", save_shards, ""),
    Format("module", save_module, modules=True, classes=True),
    Format("live", live, modules=True, classes=True),
    Format("traced", save_trace, modules=True, widths=False, classes=True),
    Format("exported", save_export, ".pt2", modules=True, classes=True),
    Format("decomposed", save_decomposed, ".pt2", modules=True),
)


# Comparison ----------------------------------------------------------------------------------------------


OPEN_KINDS = {
    "BatchNorm": ("LayerNorm or GroupNorm",),
    "InstanceNorm": ("LayerNorm or GroupNorm", "BatchNorm"),
    "LayerNorm": ("LayerNorm or GroupNorm", "LayerNorm or RMSNorm"),
    "GroupNorm": ("LayerNorm or GroupNorm",),
    "RMSNorm": ("LayerNorm or RMSNorm",),
}
"""What a norm may be called where neither its class nor its own name tells the kind, and its tensors are alike."""


@dataclass(frozen=True)
class Outcome:
    """What one model in one format came to: the names that are off, of so many norms."""

    norms: int
    missed: tuple[str, ...] = ()
    invented: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    wrong_kind: tuple[str, ...] = ()
    misled: tuple[str, ...] = ()
    """Kinds taken from a layer's name, where there is nothing else, and the name is wrong. No fault, but counted."""
    unread: str | None = None

    @property
    def fine(self) -> bool:
        return not (self.missed or self.invented or self.renamed or self.wrong_kind or self.unread)

    @property
    def cell(self) -> str:
        if self.fine:
            return f"✓ ({len(self.misled)})" if self.misled else "✓"
        if self.unread:
            return "unread"
        parts = {"missed": self.missed, "invented": self.invented, "renamed": self.renamed, "kind": self.wrong_kind}
        return ", ".join(f"{len(names)} {what}" for what, names in parts.items() if names)


CALL_NUMBER = re.compile(r"@\d+$")
"""What torch.export adds to the name of a module at its second call, and normdoctor to the aliases of a layer."""


def compare(model: nn.Module, layers: Iterable[nd.NormLayer], fmt: Format) -> Outcome:
    """A layer may stand under further names of its module; found under none of them it is renamed."""
    expected = {norm.name: norm for norm in norms_of(model) if fmt.keeps(norm)}
    first_names = {module: name for name, module in model.named_modules()}
    aliases = {name: first_names[module] for name, module in model.named_modules(remove_duplicate=False)}
    found: dict[str, nd.NormLayer] = {}
    for layer in layers:
        for name in (layer.name, *(CALL_NUMBER.sub("", alias) for alias in layer.aliases)):
            found.setdefault(aliases.get(name, name), layer)
    missed = {name: norm for name, norm in expected.items() if name not in found}
    invented = {name: layer for name, layer in found.items() if name not in expected}
    renamed = []
    for name, layer in list(invented.items()):
        twin = next((each for each, norm in missed.items() if norm.channels == layer.channels), None)
        if twin is not None:
            renamed.append(f"{twin} → {name}")
            del missed[twin], invented[name]
    wrong, misled = [], []
    for name, norm in expected.items():
        kind = found[name].kind.value if name in found else norm.kind
        told = fmt.classes and not norm.unknown_class
        if kind != norm.kind and (told or kind not in OPEN_KINDS.get(norm.kind, ())):
            by_name = not told and not has_statistics(found[name]) and {kind, norm.kind} <= STORED_ALIKE
            (misled if by_name else wrong).append(f"{name}: {kind}, not {norm.kind}")
    return Outcome(len(expected), tuple(missed), tuple(invented), tuple(renamed), tuple(wrong), tuple(misled))


STORED_ALIKE = {"BatchNorm", "InstanceNorm", "LayerNorm", "GroupNorm", "LayerNorm or RMSNorm"}
"""Without running statistics these are a gain, with a shift or without."""


def has_statistics(layer: nd.NormLayer) -> bool:
    return layer.running_mean is not None or layer.running_var is not None


def examine(case: Case, model: nn.Module, fmt: Format, path: Path) -> Outcome | None:
    """None where torch or safetensors cannot save the model in this format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target = fmt.save(model, case, path)
    except Unsaved:
        return None
    except Exception as error:
        print(f"  {case.name}: {fmt.name} cannot be saved: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        return None
    try:
        with nd.open_checkpoint(target) as checkpoint:
            layers = [layer for each in checkpoint.models for layer in each.layers]
    except nd.NormDoctorError as error:
        return Outcome(len(norms_of(model)), unread=error.message)
    return compare(model, layers, fmt)


# Report --------------------------------------------------------------------------------------------------


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The model in eval mode, its norms with random values."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor))
    return model


def examine_all(case: Case, model: nn.Module, directory: Path) -> list[Outcome | None]:
    outcomes = []
    for fmt in FORMATS:
        outcomes.append(examine(case, model, fmt, directory / f"{fmt.name}{fmt.suffix}"))
        remove(directory)
    return outcomes


def remove(directory: Path) -> None:
    """Empty the folder: the models of one run would take gigabytes."""
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def print_details(case: Case, outcomes: Sequence[Outcome | None]) -> None:
    for fmt, outcome in zip(FORMATS, outcomes, strict=True):
        if outcome is not None and not outcome.fine:
            off = {what: names[:6] for what, names in vars(outcome).items() if what != "norms" and names}
            print(f"  {case.family}, {case.name}, {fmt.name}: {off}", file=sys.stderr)


def summarise(all_outcomes: Sequence[Sequence[Outcome | None]]) -> list[str]:
    """One line per format, and one for all."""
    lines = [
        row(("format", *COUNTED)),
        "| --- |" + " ---: |" * len(COUNTED),
    ]
    total: Counter[str] = Counter()
    for number, fmt in enumerate(FORMATS):
        outcomes = [each[number] for each in all_outcomes]
        count: Counter[str] = Counter()
        for outcome in outcomes:
            if outcome is not None:
                missed = outcome.norms if outcome.unread else len(outcome.missed)
                count["models"] += 1
                count["norms"] += outcome.norms
                count["missed"] += missed
                count["invented"] += len(outcome.invented)
                count["renamed"] += len(outcome.renamed)
                count["wrong kind"] += len(outcome.wrong_kind)
                count["misled"] += len(outcome.misled)
        lines.append(row((fmt.name, *(count[each] for each in COUNTED))))
        total += count
    lines.append(row(("all", *(total[each] for each in COUNTED))))
    return lines


COUNTED = ("models", "norms", "missed", "invented", "renamed", "wrong kind", "misled")


def undecidable(directory: Path) -> list[str]:
    """What a bare state_dict of these makes normdoctor say, beside what the whole module says."""
    lines = [UNDECIDABLE]
    for case in recognition_nets.UNDECIDABLE:
        model = seeded(case.build)
        said = [describe(fmt.save(model, case, directory / fmt.name)) for fmt in FORMATS if fmt.name in SAID]
        lines.append(row((case.name, case.family, *said)))
        remove(directory)
    return lines


SAID = ("state_dict", "module")
UNDECIDABLE = """
## What a bare state_dict does not say

Not counted above. Names and shapes are all there is; the class in a whole module settles each of these.

| layer | why | state_dict says | module says |
| --- | --- | --- | --- |"""


def describe(target: Path | nn.Module) -> str:
    with nd.open_checkpoint(target) as checkpoint:
        return ", ".join(layer.kind.value for model in checkpoint.models for layer in model.layers) or "no norm"


NOTES = """
Notes:

- state_dict, safetensors and shards hold only tensors: a norm without any (InstanceNorm by default, AdaLN) is not
  in them and not expected there. In all other formats it is, where the layer knows its width as torch's own do; a
  class of a user's that neither has tensors nor says its width (`NanoChatRMSNorm`) leaves nothing to inspect, nor
  do InstanceNorm and GroupNorm without tensors in a trace, which has the calls and not the attributes.
- A kind counts as right in a format without classes where it is the open one, "LayerNorm or GroupNorm" say.
- "misled", and a number behind ✓: nothing but the layer's name tells the kind, and the name is wrong (the GroupNorm
  of wav2vec2 is called layer_norm). It is found, and no fault is counted; see the last table.
- An empty cell: the model cannot be saved in this format, or was not tried. Traces and exported programs are made
  of the nets of plain torch and of some of the models of transformers; they call for inputs and take seconds each.
- What transformers calls NoNorm (MobileBERT's scale and shift) and GRN (ConvNeXt V2) are no norm layers here. A
  state_dict has NoNorm under the name LayerNorm and cannot tell; MobileBERT is built with real ones.
- "other" and "no norms" are not families but nets made to mislead.
"""


def transformers_cases() -> tuple[list[Case], str]:
    try:
        import transformers
        from recognition_transformers import cases
    except ImportError:
        return [], "transformers is not installed: its models were skipped"
    return cases(), f"transformers {transformers.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="models and families with TEXT")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/recognition.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cases, version = transformers_cases()
    wanted = [
        case
        for case in (*recognition_nets.CASES, *cases)
        if any(text.lower() in f"{case.family} {case.name}".lower() for text in options.only)
    ]
    start = time.monotonic()
    rows = [
        row(("family", "model", "norms", *(fmt.name for fmt in FORMATS))),
        "| --- | --- | ---: |" + " :---: |" * len(FORMATS),
    ]
    all_outcomes: list[list[Outcome | None]] = []
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for case in wanted:
            try:
                model = seeded(case.build)
            except Exception as error:  # a configuration that this version of transformers does not build
                print(f"  {case.name} cannot be built: {str(error).splitlines()[0][:120]}", file=sys.stderr)
                skipped.append(case.name)
                continue
            outcomes = examine_all(case, model, directory)
            all_outcomes.append(outcomes)
            cells = ("" if outcome is None else outcome.cell for outcome in outcomes)
            rows.append(row((case.family, case.name, len(norms_of(model)), *cells)))
            print_details(case, outcomes)
        last = undecidable(directory)
    fine = all(outcome is None or outcome.fine for outcomes in all_outcomes for outcome in outcomes)
    versions = f"torch {torch.__version__}, {version}, normdoctor {nd.__version__}"
    built = f"{len(all_outcomes)} models of {len({case.family for case in wanted})} families; {versions}."
    if skipped:
        built += f" Not built: {', '.join(skipped)}."
    text = "\n".join([INTRODUCTION, built, "", *summarise(all_outcomes), NOTES, *rows, *last]) + "\n"
    print(text)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
