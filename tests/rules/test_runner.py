"""The runner: skips, assumptions, the untrained model, settings; and that no record makes a rule stumble."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normdoctor.findings import DEBIAS_COMMAND, Evidence, Observation, Severity, rule
from normdoctor.layers import Checkpoint, Container, Danger, LoadCall, Model, NormKind
from normdoctor.measured import Measured, Measurement, Preprocessing, Recalibrated
from normdoctor.moments import Moments
from normdoctor.places import Activation, Fate, Neighbour, Place, Producer
from normdoctor.reports.json import drift_of, plain
from normdoctor.rules import RULES
from normdoctor.rules.runner import Settings, examine, fill_in

BARE = dict.fromkeys(("eps", "momentum", "training", "affine", "track_running_stats"))
WARM = {"momentum": 0.001, "num_batches_tracked": 1000, "running_var": {0: 0.4}}


def codes_of(report: Any) -> set[str]:
    return {finding.code for finding in report.findings}


def skipped(report: Any) -> dict[str, set[str]]:
    """What rules lack beside data and graph."""
    return {skip.code: set(skip.missing) for skip in other_skips(report)}


def other_skips(report: Any) -> tuple[Any, ...]:
    return tuple(skip for skip in report.skips if not {"measured", "place"} & set(skip.missing))


# what is missing


def ran(**said: Any) -> Measurement:
    return Measurement(data="calib.npy", samples=1000, batches=31, order=("bn",), **said)


@pytest.mark.parametrize("kind", [NormKind.GROUP, NormKind.INSTANCE, NormKind.LAYER])
def test_a_kind_that_cannot_be_measured_needs_no_data_where_there_was_some(kind: NormKind, judge) -> None:
    layer = {"kind": kind, "running_mean": None, "running_var": None, "num_batches_tracked": None}
    assert "measured" in {name for skip in judge(layer).skips for name in skip.missing}
    report = judge(layer, measurement=ran())
    assert not [skip for skip in report.skips if "measured" in skip.missing]
    assert report.drift is None, "without statistics there is no verdict on them"


def test_norms_without_statistics_keep_a_verdict_on_the_others(judge) -> None:
    report = judge({}, {"kind": NormKind.GROUP}, measurement=ran(left={"bn0": "never reached"}))
    assert report.drift is not None and report.drift.left == {"bn0": "never reached"}
    assert not [skip for skip in report.skips if "measured" in skip.missing]


def test_a_bare_state_dict_skips_the_rules_about_eps_momentum_and_mode(judge) -> None:
    report = judge(BARE)
    assert skipped(report) == {
        "C301": {"training"},
        "C302": {"momentum"},
        "C303": {"momentum"},
        "C304": {"momentum"},
        "C305": {"eps"},
        "C306": {"training"},
        "C314": {"training"},
        "C315": {"momentum"},
    }
    assert report.findings == ()


def test_without_assumptions_what_needs_eps_or_momentum_is_skipped(judge) -> None:
    assumed, strict = skipped(judge(BARE)), skipped(judge(BARE, assume=False))
    assert set(strict) - set(assumed) == {"S104", "S106", "S115", "A205", "A207"}
    assert strict["S104"] == {"momentum"} and strict["A207"] == {"eps"}


def test_nothing_is_skipped_where_everything_is_known(judge) -> None:
    assert other_skips(judge({})) == ()


def test_declared_absences_are_no_gaps(judge) -> None:
    gone = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
    assert other_skips(judge({"weight": None, "bias": None, "affine": False})) == ()
    assert other_skips(judge(gone | {"track_running_stats": False})) == ()
    assert other_skips(judge({"kind": NormKind.LAYER, "bias": None})) == ()


def test_a_missing_tensor_is_a_skip_for_that_layer_only(judge) -> None:
    report = judge({}, {"running_var": None}, codes={"S101", "S102"})
    assert {(skip.code, skip.layer, skip.missing) for skip in report.skips} == {
        ("S101", "bn1", ("running_var",)),
        ("S102", "bn1", ("running_var",)),
    }


def test_a_rule_that_came_to_no_layer_is_skipped_once(judge) -> None:
    (skip,) = judge({"eps": None}, {"eps": None}, codes={"S106"}, assume=False).skips
    assert skip.layer is None and skip.missing == ("eps",)


def test_unequal_lengths_are_one_error_and_stop_nothing(judge) -> None:
    report = judge({"weight": np.ones(12), "running_mean": np.full(16, np.nan)}, {"running_var": {3: np.nan}})
    assert {(f.code, f.layer) for f in report.findings} == {("C311", "bn0"), ("S101", "bn1")}
    assert ("S101", "bn0", ("equal lengths",)) in {(s.code, s.layer, s.missing) for s in report.skips}


# what is assumed


def test_assumed_momentum_is_named_and_capped_at_warning(judge) -> None:
    known = {"momentum": 0.1, "num_batches_tracked": 5, "running_var": np.linspace(0.7, 2.0, 16)}
    (sure,) = judge(known, codes={"S104"}).findings
    (guess,) = judge(known | {"momentum": None}, codes={"S104"}).findings
    assert (sure.severity, sure.assumed) == (Severity.ERROR, {})
    assert (guess.severity, guess.assumed) == (Severity.WARNING, {"momentum": 0.1})
    assert "Assumes torch's default momentum 0.1" in guess.message and "--momentum" in guess.message
    assert sure.evidence["residue"] == guess.evidence["residue"]


def test_a_value_from_the_user_is_no_assumption(judge) -> None:
    (finding,) = judge(WARM | {"momentum": None}, codes={"S104"}, momentum=0.001).findings
    assert (finding.severity, finding.assumed) == (Severity.ERROR, {})
    assert "Assumes" not in finding.message


def test_a_value_from_the_user_does_not_replace_what_the_file_says(judge) -> None:
    (finding,) = judge(WARM, codes={"S104"}, momentum=0.5).findings
    assert finding.evidence["momentum"] == 0.001


def test_what_the_user_says_of_eps_reaches_the_rules_about_it(judge) -> None:
    assert codes_of(judge(BARE, codes={"C305", "C303"}, eps=0.5, momentum=0.99)) == {"C305", "C303"}


def test_a_rule_with_assumptions_switched_off_still_takes_the_users_value(judge) -> None:
    report = judge(BARE | {"running_var": {6: 2e-7}}, codes={"S106"}, eps=1e-5, assume=False)
    assert codes_of(report) == {"S106"}


# what is said of whom


def test_unwanted_layers_are_seen_but_not_named(judge) -> None:
    layers = [{"num_batches_tracked": 4321}, *[{} for _ in range(4)], {"running_var": {2: np.nan}}]
    everything = judge(*layers)
    some = judge(*layers, wanted=lambda layer: layer.name in ("bn0", "bn1"))
    assert {f.layer for f in everything.findings} == {"bn0", "bn5"}
    assert {f.layer for f in some.findings} == {"bn0"}, "compared with siblings that are not shown"
    assert [layer.name for layer in some.layers] == ["bn0", "bn1"]


def test_an_untrained_model_is_said_once_and_silences_what_needs_training(judge) -> None:
    fresh = {
        "weight": np.ones(16),
        "bias": np.zeros(16),
        "running_mean": np.zeros(16),
        "running_var": np.ones(16),
        "num_batches_tracked": 0,
    }
    report = judge(fresh, fresh, fresh | {"weight": np.zeros(16)})
    assert [(f.code, f.layer) for f in report.findings] == [("S100", None)]
    assert {"S103", "A203"} <= codes_of(judge(fresh, fresh | {"weight": np.zeros(16)}, {})) | {"A203"}
    assert codes_of(judge(fresh, {})) >= {"S103"}


def test_findings_come_worst_first(judge) -> None:
    report = judge(
        {"running_var": {3: np.nan}}, {"running_var": {3: np.nan, 4: np.nan}}, {"momentum": 0.99}, {"momentum": 0.0}
    )
    assert [f.severity for f in report.findings] == sorted((f.severity for f in report.findings), reverse=True)
    assert [f.layer for f in report.findings if f.code == "S101"] == ["bn1", "bn0"]


def test_thresholds_can_be_set_and_are_in_the_evidence(judge) -> None:
    layer = {"running_mean": {1: 30.0}}
    (finding,) = judge(layer, codes={"S108"}).findings
    assert finding.evidence["limits"] == {"info": 10.0, "warning": 100.0, "share": 0.05}
    assert judge(layer, codes={"S108"}, limits={"S108": {"info": 50.0}}).findings == ()
    (raised,) = judge(layer, codes={"S108"}, limits={"S108": {"warning": 20.0}}).findings
    assert raised.severity is Severity.WARNING
    assert raised.evidence["limits"]["warning"] == 20.0


@pytest.mark.parametrize("rule_", [rule_ for rule_ in RULES if rule_.limits], ids=lambda rule_: rule_.code)
def test_limits_are_plain_numbers(rule_) -> None:
    assert all(isinstance(value, (int, float)) for value in rule_.limits.values())
    json.dumps(rule_.limits, allow_nan=False)


def test_evidence_levels_follow_from_what_a_rule_needs() -> None:
    levels = {rule_.code: rule_.evidence_level for rule_ in RULES}
    assert levels["S101"] is Evidence.TENSORS
    assert levels["G501"] is levels["A208"] is levels["N404"] is Evidence.GRAPH
    assert levels["D601"] is levels["D611"] is levels["T704"] is Evidence.DATA
    assert levels["S104"] is levels["S106"] is levels["C303"] is Evidence.HYPER


def test_the_fix_names_the_file_as_the_shell_wants_it(judge) -> None:
    (finding,) = judge(WARM, codes={"S104"}, path="runs/my model.pt").findings
    assert "recalibrate 'runs/my model.pt'" in finding.fix
    assert "-o 'runs/my model.recalibrated.pt'" in finding.fix


@pytest.mark.parametrize(("momentum", "option"), [(None, "--momentum VALUE"), (0.001, "--momentum 0.001")])
def test_the_command_adds_the_momentum_that_the_file_lacks(judge, momentum: float | None, option: str) -> None:
    silent = {"momentum": None, "num_batches_tracked": 20, "running_var": np.linspace(1.0, 1.5, 16)}
    (finding,) = judge(silent, codes={"S104"}, path="m.pt", momentum=momentum).findings
    assert f"--method debias {option} -o" in finding.fix


def test_a_live_module_is_repaired_through_the_api() -> None:
    live = Checkpoint(path="Net", format="live", container=Container.MEMORY, models=())
    assert fill_in(DEBIAS_COMMAND, live) == 'normdoctor.recalibrate(module, method="debias")'


def test_a_rule_without_documentation_or_reference_is_refused() -> None:
    def documented(layer: Any, context: Any) -> Any:
        """A check."""
        yield Observation(message="x")

    def silent(layer: Any, context: Any) -> Any:
        yield Observation(message="x")

    told = {
        "severity": Severity.INFO,
        "confidence": next(iter(RULES)).confidence,
        "why": "Because.",
        "fix": "do it",
    }
    assert rule("X999", "x", reference="https://example.org", **told)(documented).title == "A check."
    with pytest.raises(ValueError, match="X999"):
        rule("X999", "x", reference="https://example.org", **told)(silent)
    with pytest.raises(ValueError, match="X999"):
        rule("X999", "x", reference="", **told)(documented)


def test_eps_assumed_for_one_rule_does_not_reach_another(build) -> None:
    """A rule sees only the assumptions it declares: S105 looks at momentum and must not be told 0.1."""
    seen = {}

    def spy(layer: Any, context: Any) -> Any:
        seen[layer.name] = (layer.eps, layer.momentum)
        return iter(())

    needs_eps = replace(next(rule_ for rule_ in RULES if rule_.code == "S106"), check=spy)
    layer = build(**BARE, name="bn")
    checkpoint = Checkpoint(
        path="m.pt", format="", container=Container.MEMORY, models=(Model(key=None, layers=(layer,)),)
    )
    needs_momentum = replace(needs_eps, needs=("running_var", "momentum"))
    for rule_, expected in ((needs_eps, (1e-5, None)), (needs_momentum, (None, 0.1))):
        examine(checkpoint, [rule_], Settings())
        assert seen == {"bn": expected}
    assert (layer.eps, layer.momentum) == (None, None)


# nothing makes a rule stumble

FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, 1.0, -1e-5, 1e-5, 2.0**-149, 2.0**-147, 65504.0, 3e38, float("nan"), float("inf")]),
    st.floats(0.125, 4.0, width=32),
)
VECTORS = ("weight", "bias", "running_mean", "running_var")


@st.composite
def layers(draw: Any) -> dict[str, Any]:
    channels = draw(st.sampled_from([1, 3, 8, 16, 33]))
    given_: dict[str, Any] = {"channels": channels, "kind": draw(st.sampled_from(list(NormKind)))}
    for name in VECTORS:
        length = draw(st.sampled_from([channels] * 6 + [channels + 1, 0]))
        how = draw(st.sampled_from(["absent", "healthy", "constant", "any", "any"]))
        if how == "absent":
            given_[name] = None
        elif how == "constant":
            given_[name] = np.full(length, draw(FLOATS))
        elif how == "any":
            given_[name] = np.array(draw(st.lists(FLOATS, min_size=length, max_size=length)), dtype=np.float32)
    given_["num_batches_tracked"] = draw(
        st.sampled_from([None, 0, 1, 7, 216, 5000, 2**53, -3, np.array(2.5), np.array(np.nan), np.array(np.inf)])
    )
    given_["alpha"] = draw(st.sampled_from([None, np.array(0.5), np.array(np.nan), np.zeros(3), np.zeros(0)]))
    given_["inner_shift"] = draw(
        st.sampled_from([None, np.array(-0.5), np.array(np.inf), np.full(1, 3.0), np.zeros(0)])
    )
    given_["groups"] = draw(st.sampled_from([None, 1, channels, -3]))
    given_["stored_names"] = draw(st.sampled_from([{}, {"weight": "gamma"}]))
    given_["wrappers"] = draw(st.sampled_from([(), ("module",)]))
    given_["eps"] = draw(st.sampled_from([None, 0.0, 0, 1e-5, 1e-12, 1e-3, 7.0, -1e-5, float("nan"), float("inf")]))
    given_["momentum"] = draw(
        st.sampled_from([None, "cumulative", 0, 0.0, 0.1, 1e-9, 0.99, 1, 1.0, 2.0, -0.1, float("nan")])
    )
    for flag in ("training", "affine", "track_running_stats", "requires_grad", "zero_centred", "zero_centred_by_class"):
        given_[flag] = draw(st.sampled_from([None, True, False]))
    given_["origin"] = draw(st.sampled_from([None, "BatchNormalization", "x.FrozenBatchNorm2d", "x.BatchNorm2d"]))
    given_["aliases"] = draw(st.sampled_from([(), ("other",)]))
    if draw(st.booleans()):
        given_["dtypes"] = {
            name: draw(st.sampled_from(["float16", "bfloat16", "float64", "int8"]))
            for name in VECTORS
            if given_.get(name, 0) is not None and (name in given_ or name in ("weight", "bias"))
        }
    if draw(st.booleans()):
        given_["measured"] = draw(seen(channels))
    if draw(st.booleans()):
        given_["place"] = draw(places(channels))
    return given_


NUMBERS = st.one_of(FLOATS, st.sampled_from([1e300, 1e-300, 5e-324]))


@st.composite
def seen(draw: Any, channels: int) -> Measured:
    """Anything that a run on data could leave behind."""
    length = draw(st.sampled_from([channels] * 6 + [1, channels + 1]))

    def vector() -> Any:
        return np.array(draw(st.lists(NUMBERS, min_size=length, max_size=length)), dtype=np.float64)

    def or_none(value: Any) -> Any:
        return draw(st.sampled_from([None, value]))

    return Measured(
        moments=Moments(draw(st.sampled_from([0, 1, 64, 10**9])), vector(), vector()),
        samples=draw(st.sampled_from([0, 1, 8, 1000])),
        batches=draw(st.sampled_from([1, 2, 31])),
        mean_spread=or_none(vector()),
        var_spread=or_none(vector()),
        effective=or_none(vector()),
        active=or_none(vector()),
        gate=draw(st.sampled_from([None, "relu", "gelu"])),
        starved=draw(st.sampled_from([None, 0.0, 0.5])),
        saturated=draw(st.sampled_from([None, 0.0, 0.9])),
        input_sd=draw(st.sampled_from([None, 1.0, float("nan"), 1e300])),
        tanh_fit=draw(st.sampled_from([None, 0.99, -1.0])),
        linear_fit=draw(st.sampled_from([None, 0.5, -9.0])),
        tanh_alpha=draw(st.sampled_from([None, 0.5])),
    )


@st.composite
def places(draw: Any, channels: int) -> Place:
    """Anything that a graph could say of the surroundings."""
    length = draw(st.sampled_from([channels] * 6 + [1, channels + 1]))

    def vector() -> Any:
        values = draw(st.none() | st.lists(NUMBERS, min_size=length, max_size=length))
        return None if values is None else np.array(values, dtype=np.float64)

    def neighbours() -> tuple[Neighbour, ...]:
        return draw(st.lists(st.sampled_from(NEIGHBOURS), max_size=3).map(tuple))

    def fate() -> Fate | None:
        return draw(st.sampled_from(FATES))

    producer = Producer(neighbour=NEIGHBOURS[0], alone=draw(st.booleans()), bias=vector(), largest=vector())
    name = draw(st.sampled_from(["relu", "relu6", "clip", "silu", "leaky_relu", "sigmoid", "tanh", "softplus"]))
    low, high = draw(st.sampled_from([(-math.inf, math.inf), (0.0, 6.0), (-1.0, 1.0), (3.0, -3.0), (math.nan, 1e300)]))
    return Place(
        calls=draw(st.sampled_from([0, 1, 3])),
        before=neighbours(),
        after=neighbours(),
        producer=draw(st.sampled_from([None, producer])),
        activation=draw(st.sampled_from([None, Activation(name=name, low=low, high=high)])),
        positions=draw(st.sampled_from([None, 0, 1, 49])),
        joins_branches=draw(st.booleans()),
        padded=draw(st.sampled_from([(), ("conv2",)])),
        dropouts=draw(st.sampled_from([(), (("", 0.5), ("drop2", math.nan), ("drop3", 1.0))])),
        fate=fate(),
        gain_fate=fate(),
        inferred=draw(st.booleans()),
    )


NEIGHBOURS = tuple(
    Neighbour(op=op) for op in ("convolution", "activation", "BatchNorm", "max-pooling", "matrix product", "input")
)
FATES = (
    None,
    Fate(verdict="folded backward", into=("conv1",), saved=64),
    Fate(verdict="left", code="padding", reason="Zeros."),
    Fate(verdict="left"),
    Fate(verdict="decomposed"),
)

MEASUREMENTS = st.one_of(
    st.none(),
    st.builds(
        Measurement,
        data=st.just("calib.npy"),
        samples=st.sampled_from([0, 1, 1000]),
        batches=st.sampled_from([0, 1, 31]),
        order=st.just(("bn0",)),
        disagreement=st.sampled_from([None, 0.0, 1.0]),
        output_change=st.sampled_from([None, 0.3, float("inf")]),
        order_dependence=st.sampled_from([None, 0.0, 0.3, float("nan")]),
        accuracy=st.sampled_from([None, 0.9]),
        preprocessing=st.sampled_from(
            [(), tuple(Preprocessing(words=w, divergence=d) for w, d in (("as given", 1e5), ("times 255", 0.0)))]
        ),
        recalibrated=st.sampled_from([None, Recalibrated(accuracy=0.1), Recalibrated(entropy_before=0.0, entropy=1.0)]),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    several=st.lists(layers(), min_size=1, max_size=4),
    precision=st.sampled_from([None, "fp16", "bf16", "int8"]),
    assume=st.booleans(),
    measurement=MEASUREMENTS,
    train_batch=st.sampled_from([None, 1, 32]),
)
def test_no_record_makes_a_rule_fail_or_say_what_json_cannot(
    several, precision, assume, measurement, train_batch, judge
) -> None:
    report = judge(
        *several,
        precision=precision,
        assume=assume,
        measurement=measurement,
        train_batch=train_batch,
        averaged="n_averaged = 3",
        load_calls=(LoadCall("posix.system", Danger.OTHER),),
    )
    channels = {layer.name: max([0, layer.channels, *layer.lengths.values()]) for layer in report.layers}
    for finding in report.findings:
        json.dumps({"evidence": finding.evidence, "channels": finding.channels}, allow_nan=False)
        assert finding.message.endswith((".", "?")) and "{" not in finding.message
        assert "nan " not in finding.message
        if finding.layer is not None:
            assert list(finding.channels) == sorted(set(finding.channels))
            assert all(0 <= channel < channels[finding.layer] for channel in finding.channels)
        if finding.assumed:
            assert finding.severity <= Severity.WARNING
        if "Inferred from names" in finding.message:
            assert finding.severity is Severity.INFO
    json.dumps(plain(drift_of(report.drift)) if report.drift else None, allow_nan=False)
    named = [(finding.code, finding.layer) for finding in report.findings if finding.layer is not None]
    assert len(named) == len(set(named)), "one finding per rule and layer"


@pytest.mark.parametrize("updates", [-(10**9), -1, 0, 10**18, -1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("momentum", [None, 0.1, 0.0, 1.0, -1.0, 2.0, "cumulative"])
def test_counters_that_count_nothing_make_no_rule_stumble(judge, updates: float, momentum: Any) -> None:
    judge({"num_batches_tracked": updates, "momentum": momentum})
