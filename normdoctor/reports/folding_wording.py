"""A fold in words, the same in the reports for people: console and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from normdoctor.folding.records import Difference, FoldReport, FoldRow, Proof, ProofState
from normdoctor.places import Verdict
from normdoctor.reports.wording import plural, short

INTERESTING = (Verdict.LEFT, Verdict.DECOMPOSED, Verdict.MERGED, Verdict.FORWARD, Verdict.BACKWARD)
"""Which norms are shown where not all are."""

NAMED = 4


def most_interesting(rows: Sequence[FoldRow], room: int | None) -> list[FoldRow]:
    """At most `room` rows in the order of the graph, those that stay before those that fold; all where it is None."""
    if room is None or len(rows) <= room:
        return list(rows)
    order = {verdict.value: place for place, verdict in enumerate(INTERESTING)}
    ranked = sorted(range(len(rows)), key=lambda place: (order.get(rows[place].verdict, 0), place))
    return [rows[place] for place in sorted(ranked[:room])]


def verdict_line(report: FoldReport) -> str:
    """12 norms: 10 folded backward, 1 merged, 1 left; or that there is nothing."""
    if not report.rows:
        return "No norm that could be folded was found: the model computes what it did."
    counts = [f"{count} {verdict}" for verdict, count in report.counts.items() if count]
    line = f"{plural(len(report.rows), 'norm')}: {', '.join(counts)}"
    if not report.folded and not report.counts[Verdict.DECOMPOSED.value]:
        line += ". Nothing could be folded"
        line += ", so the output is an unchanged copy" if report.unchanged else ""
        line += "."
    return line


def kinds_line(rows: Sequence[FoldRow]) -> str:
    """35 BatchNorm, 2 LayerNorm."""
    counts = Counter(row.kind for row in rows)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "no norms"


def left_groups(rows: Sequence[FoldRow]) -> list[tuple[str, str, list[str]]]:
    """(reason code, sentence, names of the norms) for what was not absorbed, the commonest reason first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.code or row.left:
            groups.setdefault((row.code, row.reason), []).append(row.norm)
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [(code, reason, names) for (code, reason), names in ranked]


def named(names: Sequence[str]) -> str:
    """A few names, and how many more."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def savings_line(report: FoldReport) -> str:
    """Parameters and operators before and after."""
    (before, after), (nodes_before, nodes_after) = report.parameters, report.nodes
    parts = []
    if before != after:
        parts.append(f"{before:,} -> {after:,} stored numbers ({after - before:+,})")
    if nodes_before != nodes_after:
        parts.append(f"{nodes_before:,} -> {nodes_after:,} operators ({nodes_after - nodes_before:+,})")
    return ", ".join(parts)


def remarks(report: FoldReport) -> Iterator[str]:
    """The largest gain, copies of shared weights, what float16 cannot hold, and the notes."""
    largest = report.largest_gain
    if largest is not None and largest.gain:
        yield f"largest gain {short(largest.gain)} ({largest.norm})"
    if report.copies:
        yield (
            f"{plural(len(report.copies), 'weight')} shared with other sites, copied for the fold: "
            f"{named(report.copies)}"
        )
    if report.overflows:
        count = sum(len(overflow.channels) for overflow in report.overflows)
        largest_value = max(overflow.largest for overflow in report.overflows)
        names = named([overflow.weight for overflow in report.overflows])
        yield (
            f"float16 cannot hold {plural(count, 'channel')} of {plural(len(report.overflows), 'folded weight')} "
            f"(up to {short(largest_value)}, its limit is 65,504): {names}"
        )
    yield from (f"note: {note}" for note in report.notes)


def proof_line(proof: Proof) -> str:
    """What the proof came to, before its table."""
    line = proof.state.value
    if proof.state in (ProofState.VERIFIED, ProofState.FAILED) or proof.differences:
        how = ", ".join(filter(None, (proof.engine, proof.inputs)))
        line += f" against the original ({how})" if how else " against the original"
    if proof.reason:
        line += f": {proof.reason}"
    if proof.first_norm:
        line += f"; the first norm at which the two part is {proof.first_norm}"
    return line


def proof_rows(proof: Proof) -> list[tuple[str, str, str, str, str]]:
    """Output, shape, error, noise and a remark for each output, the worst first."""
    ranked = sorted(proof.differences, key=lambda found: (found.ok, -found.error))
    return [
        (found.output, "x".join(map(str, found.shape)) or "1", f"{found.error:.2g}", _noise(found), _remark(found))
        for found in ranked
    ]


def _noise(found: Difference) -> str:
    return "?" if found.noise is None else f"{found.noise:.2g}"


def _remark(found: Difference) -> str:
    parts = [] if found.ok else ["FAILED"]
    if not found.ok and found.channel is not None:
        parts.append(f"worst in channel {found.channel}")
    if found.note:
        parts.append(found.note)
    return ", ".join(parts)


def noise_line(proof: Proof) -> str:
    """How the two numbers are to be read."""
    if not proof.differences:
        return ""
    line = "error: largest, relative to the channel's size; noise: that of the original's own rounding"
    return line + (f" (not measured: {proof.noise_reason})" if proof.noise_reason else "")
