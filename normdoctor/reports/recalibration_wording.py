"""A recalibration in words, the same in the reports for people: console and Markdown."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from normdoctor.layers import median
from normdoctor.recalibration.debias import Repair
from normdoctor.recalibration.judging import Accuracy, Entropy, Judgement, Verdict
from normdoctor.recalibration.records import DebiasReport, LayerChange, MeasuredReport
from normdoctor.reports.recalibration_extent import (
    ENOUGH,
    LEAST,
    LITTLE_RATIO,
    LITTLE_SHIFT,
    Extent,
    broken_channels,
    extent_of,
    is_little,
    known_values,
    log_ratio,
    median_layer,
    size,
    worst_first,
)
from normdoctor.reports.wording import percent, plural, short
from normdoctor.rules.calibration_data import too_little_data

NOTEWORTHY_SHIFT = 0.5
"""Standard deviations by which a single channel may move unmentioned in a layer that changed little."""

METHOD_WORDS = {
    "exact": "exact: self-consistent, every norm measured with those before it repaired",
    "one-pass": "one-pass: what training mode sees, with dropout off",
    "blend": "blend: stored statistics mixed with those of the data",
    "debias": "debias: the initial 0 and 1 taken out of the buffers",
}

COLUMNS_MEAN = (
    "shift, max: change of the mean in old s.d., median and largest channel; variance: new / old; values: independent "
    "ones a channel; s.e.: of the new means in s.d.; residual: what is off when run again"
)


# --- numbers ---


def number(value: float | None) -> str:
    """At most six characters; nothing for None.

    >>> number(math.inf), number(0.0123), number(None)
    ('inf', '0.012', '')
    """
    if value is None:
        return ""
    return short(value) if math.isfinite(value) else str(value)


def batches(count: int) -> str:
    return f"{count:,} batch" + ("" if count == 1 else "es")


def ratio_words(value: float) -> str:
    """
    >>> ratio_words(1.038), ratio_words(250.0), ratio_words(math.nan)
    ('1.04', '250', 'nan')
    """
    return f"{value:.2f}" if 0.1 <= value < 10 else number(value)


def duration(seconds: float) -> str:
    """
    >>> duration(0.8), duration(75.0), duration(7260.0)
    ('0.8 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def near_percent(share: float) -> str:
    """A share in percent that is 0 or 100 only where it is exactly that.

    >>> near_percent(0.97345), near_percent(0.99999), near_percent(1.0)
    ('97.3 %', 'more than 99.9 %', '100 %')
    """
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    if share > 0.9995:
        return "more than 99.9 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "less than 0.1 %"


# --- what was measured ---


def data_line(report: MeasuredReport) -> str:
    """The data and how much of it was used."""
    line = f"{report.data}; {plural(report.samples, 'sample')} in {batches(report.batches)}"
    return line + ("; stopped early, --until was reached" if report.stopped_early else "")


def time_line(report: MeasuredReport) -> str:
    """How long measuring took, empty where that is not known."""
    if report.seconds <= 0:
        return ""
    rate = report.samples / report.seconds
    return f"measured in {duration(report.seconds)}, {f'{rate:,.0f}' if rate >= 10 else number(rate)} samples/s"


def method_line(report: MeasuredReport) -> str:
    """How it was measured, in a few words."""
    line = METHOD_WORDS[report.method]
    if report.prior is not None:
        line += f"; the stored count as {report.prior:,g} samples beside {report.samples:,}"
    return line


# --- how much changed ---


def change_lines(report: MeasuredReport) -> Iterator[str]:
    """How far the stored statistics were from those of the data, over all."""
    rows, extent = report.rows, extent_of(report.rows)
    if extent is Extent.NOTHING:
        yield "No norm was measured."
        return
    if count := broken_channels(rows):
        layers = sum(bool(row.broken) for row in rows)
        yield f"{plural(count, 'channel')} of {plural(layers, 'layer')} held NaN, infinite or negative statistics."
    furthest = worst_first(rows)[0]
    if extent is Extent.LITTLE:
        shift, ratio = max(row.shift for row in rows), max(map(log_ratio, rows))
        line = (
            f"changed little: no layer's median mean moved by more than {_upward(shift)} s.d., nor its median variance "
            f"by more than {_upward(100 * math.expm1(ratio))} %."
        )
        yield f"{line} {_meaning_of_little(report)}".rstrip()
        single = max(rows, key=lambda row: size(row.worst_shift))
        if not single.worst_shift < NOTEWORTHY_SHIFT:
            yield f"Single channels moved further: by up to {number(single.worst_shift)} s.d. in {single.layer}."
        return
    (shift, ratio), moved = median_layer(rows), sum(not is_little(row) for row in rows)
    share = f"{moved:,} of {plural(len(rows), 'layer')}"
    where = f"changed little but in {share}, where" if extent is Extent.SOME else f"changed: in {share}"
    broken = ", or a channel was broken" if broken_channels(rows) else ""
    yield (
        f"{where} the median channel moved by more than {LITTLE_SHIFT:g} s.d. or {percent(LITTLE_RATIO - 1)} of its "
        f"variance{broken}. Typical layer: {number(shift)} s.d., variance ratio {ratio_words(ratio)}; furthest "
        f"{furthest.layer}: {number(furthest.shift)} s.d., ratio {ratio_words(furthest.ratio)}."
    )


MOVED_OUTPUTS = 0.2
"""A change of the outputs by more of their size (L2) is not little, however little each layer moved."""


def _upward(value: float) -> str:
    """Two significant digits, never below the value."""
    if value < 1e-9:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return number(math.ceil(value / step - 1e-9) * step)


def _meaning_of_little(report: MeasuredReport) -> str:
    """What small changes say of the model, where they say anything."""
    if report.method == "blend":
        return "A blend keeps a share of what was stored: this does not tell whether that fits the data."
    judgement = report.judgement
    if judgement is not None and (
        judgement.broken_before or (judgement.accuracy and judgement.accuracy.verdict is not Verdict.ALIKE)
    ):
        return ""
    if judgement is not None and judgement.output_change is not None and judgement.output_change > MOVED_OUTPUTS:
        return "Yet the outputs moved: small changes of many layers add up."
    return "The stored statistics fit this data: the model was healthy on it."


def values_cell(row: LayerChange) -> str:
    """How many independent values a channel had; empty where that is not known."""
    if row.effective is None or row.effective < 100 or not math.isfinite(row.effective):
        return number(row.effective)
    return f"{row.effective:,.0f}"


def residual_cell(row: LayerChange) -> str:
    """The larger of what mean and log variance were off by; empty where the result was not run."""
    return number(max((value for value in (row.residual_shift, row.residual_ratio) if value is not None), default=None))


# --- how sure it is ---


@dataclass(frozen=True)
class Scarcity:
    """Too little data, in words."""

    words: str
    severe: bool
    """Whether nothing can be said of some layer."""


def scarcity(report: MeasuredReport) -> Scarcity | None:
    """Whether the data holds too few independent values for the statistics of any layer."""
    known = known_values(report.rows)
    few = {layer: values for layer, values in known.items() if values < ENOUGH}
    total = plural(len(report.rows), "layer")
    if few:
        layer = min(few, key=lambda name: few[name])
        values = few[layer]
        words = (
            f"too little data: it is worth {number(values)} independent values a channel in {layer}, and fewer than "
            f"{ENOUGH:g} in {len(few):,} of {total}. A variance is then uncertain by about "
            f"{percent(math.sqrt(2 / max(values, 1.0)))}, a mean by {number(1 / math.sqrt(max(values, 1.0)))} s.d. "
            f"{_more_data(report, values)}"
        )
        return Scarcity(words, values < LEAST)
    if unknown := len(report.rows) - len(known):
        words = (
            f"how sure this is cannot be told in {unknown:,} of {total}: one sample does not show how much alike its "
            f"values are. {_more_data(report, None)}"
        )
        return Scarcity(words, report.samples < LEAST)
    return None


def _more_data(report: MeasuredReport, values: float | None) -> str:
    needed = 1000 if values is None else _rounded_up(report.samples * ENOUGH / max(values, 1.0))
    if report.method == "blend":
        return f"What is stored softens this; {needed:,} samples would do without."
    return f"Give about {needed:,} samples of all classes, or lean on what is stored: --method blend --prior N."


def _rounded_up(count: float) -> int:
    """To two significant digits."""
    step = int(10 ** max(len(str(math.ceil(count))) - 2, 0))
    return math.ceil(count / step) * step


# --- better or worse ---


def judgement_lines(report: MeasuredReport) -> Iterator[tuple[str, str]]:
    """(what, words) on the outputs before and after."""
    judgement = report.judgement
    if judgement is None:
        yield "outputs", "not compared (--no-verify)"
        return
    if judgement.accuracy is not None:
        yield "accuracy", accuracy_words(judgement.accuracy)
    elif judgement.scores is None:
        yield "accuracy", f"not judged, {judgement.why_no_scores}"
    else:
        yield "accuracy", "not judged, the data has no labels (--labels)"
    if judgement.scores is not None:
        yield "entropy", entropy_words(judgement.entropy)
    if judgement.agreement is not None:
        words = f"{near_percent(judgement.agreement)} of {plural(judgement.samples, 'sample')}"
        yield "same answer", words if judgement.accuracy is None else f"{words}, right or wrong"
    yield "outputs", _outputs_words(judgement)
    if judgement.broken_before or judgement.broken_after:
        yield (
            "NaN or Inf",
            (f"{plural(judgement.broken_before, 'value')} of the outputs before, {judgement.broken_after:,} after"),
        )
    for finding in report.findings:
        if finding.code == too_little_data.code:
            continue  # said loudly, see `scarcity`
        yield f"{finding.severity} {finding.code}", f"{finding.message} Fix: {finding.fix}"


def accuracy_words(accuracy: Accuracy) -> str:
    """84.1 % -> 87.3 % (+3.2 +/- 0.4 points, p 1e-9, 3,000 samples): significantly better"""
    gain, error = 100 * (accuracy.after - accuracy.before), 100 * accuracy.standard_error
    digits = 1 if error >= 0.1 or not error else 2
    before, after = (f"{100 * share:.{digits}f} %" for share in (accuracy.before, accuracy.after))
    samples = plural(accuracy.samples, "sample")
    if not accuracy.gained and not accuracy.lost:
        return f"{before} before and after: no answer of {samples} became right or wrong"
    p_value = f"p {short(accuracy.p_value)}" if accuracy.p_value > 0 else "p below 1e-300"
    return (
        f"{before} -> {after} ({gain:+.{digits}f} +/- {error:.{digits}f} points, {p_value}, {samples}): "
        f"{accuracy.verdict.value}"
    )


def entropy_words(entropy: Entropy | None) -> str:
    """Of the predicted classes. More or less of it is neither good nor bad by itself."""
    if entropy is None:
        return "not known, a score is NaN or infinite"
    if entropy.before == entropy.after:
        return f"{entropy.before:.3g} nats before and after"
    change = "" if entropy.change is None else f"{entropy.change:+.2g} %; "
    return f"{entropy.before:.3g} -> {entropy.after:.3g} nats ({change}reported, not judged)"


def _outputs_words(judgement: Judgement) -> str:
    change = judgement.output_change
    if change is None:
        broken = judgement.broken_before or judgement.broken_after
        return "how far they moved cannot be told" + (", they hold NaN or infinite values" if broken else "")
    if change > 2:
        return f"moved by {number(change)} times their size (L2)"
    return f"moved by {percent(change)} of their size (L2)" if change else "moved by nothing"


def is_worse(report: MeasuredReport) -> bool:
    """Whether labels show that the result is significantly worse."""
    accuracy = None if report.judgement is None else report.judgement.accuracy
    return accuracy is not None and accuracy.verdict is Verdict.WORSE


def residual_line(report: MeasuredReport) -> str:
    """How well the new statistics fit the data when the result is run on it; empty where it was not run."""
    shifts = [row.residual_shift for row in report.rows if row.residual_shift is not None]
    ratios = [row.residual_ratio for row in report.rows if row.residual_ratio is not None]
    if not shifts and not ratios:
        return ""
    if not any((*shifts, *ratios)):
        return "run again with the new statistics, every norm sees exactly these"
    parts = [f"means by at most {number(max(shifts, key=size))} s.d."] if shifts else []
    parts += [f"log variances by at most {number(max(ratios, key=size))}"] if ratios else []
    line = f"run again with the new statistics, {' and '.join(parts)} off"
    if report.method == "one-pass":
        return f"{line} (in eval mode norms see other inputs than in training mode; --method exact makes it 0)"
    return line + (" (a blend is not meant to fit the data alone)" if report.method == "blend" else "")


# --- layers left, remarks ---


def left_groups(left: Mapping[str, str] | Iterable[tuple[str, str]]) -> list[tuple[str, str, list[str]]]:
    """("", reason, names) of what stays as it is, the commonest reason first."""
    groups: dict[str, list[str]] = {}
    for name, reason in left.items() if isinstance(left, Mapping) else left:
        groups.setdefault(reason, []).append(name)
    return [("", reason, names) for reason, names in sorted(groups.items(), key=lambda item: -len(item[1]))]


def end_lines(report: MeasuredReport | DebiasReport) -> Iterator[str]:
    """Where the result is, and what became of the input."""
    measured = report if isinstance(report, MeasuredReport) else None
    if measured is not None and measured.dry_run:
        yield "nothing was written (--dry-run)"
    elif report.output is not None:
        yield f"wrote {report.output}" + (", though it is worse" if measured is not None and is_worse(measured) else "")
        if report.backup is not None:
            yield f"what was there before is kept as {report.backup}"
    elif measured is not None:
        yield "no file was written"


def next_command(report: MeasuredReport | DebiasReport) -> str | None:
    """What to run on the result; None where nothing was written."""
    if report.output is None or (isinstance(report, MeasuredReport) and report.dry_run):
        return None
    options = f" {report.options}" if isinstance(report, MeasuredReport) and report.options else ""
    return f"normdoctor inspect {shlex.quote(report.output)}{options}"


# --- debias ---


def largest_residue_first(repairs: Iterable[Repair]) -> list[Repair]:
    return sorted(repairs, key=lambda repair: -repair.residue)


def repair_cells(repair: Repair) -> tuple[str, str, str]:
    """The residue, the median running_var and the updates, before and after."""
    updates = f"{repair.updates:,}"
    if repair.counter is not None and repair.counter != repair.updates:
        updates += f" -> {repair.counter:,}"
    before, after = median_variances(repair)
    return f"{repair.residue:.1%}", f"{before:.3g} -> {after:.3g}", updates


def median_variances(repair: Repair) -> tuple[float, float]:
    before = repair.layer.numbers.var
    assert before is not None
    return median(before), median(repair.running_var)


def debias_remarks(report: DebiasReport) -> Iterator[str]:
    yield from (f"note: {note}" for note in report.notes)
    if not report.recognisable:
        yield "note: no counter was raised; do not debias the result again"
