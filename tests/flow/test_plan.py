"""What folds into what, through what, and why the rest stays: one net for each sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normdoctor.flow.graph import Fixed, Node, Op, Value
from normdoctor.flow.plan import FoldPlan, Outcome
from normdoctor.layers import NormKind
from normdoctor.places import Verdict


def only(plan: FoldPlan) -> Outcome:
    (outcome,) = plan.outcomes
    return outcome


def relu(net: Any, x: Value) -> Value:
    return net.op(Op.ACTIVATION, x, name="relu", homogeneous=True)


def left(net: Any, *outputs: Value, **options: Any) -> tuple[str, str]:
    net.finish(*outputs)
    outcome = only(net.check(**options))
    assert outcome.verdict is Verdict.LEFT
    return outcome.code, outcome.reason


# What folds


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_into_the_convolution_before_it(net: Any, bias: bool, groups: int) -> None:
    net.norm(net.conv(net.input(4, 5, 5), 4, bias=bias, groups=groups))
    net.finish()
    outcome = only(net.check())
    assert (outcome.verdict, [node.op for node in outcome.into]) == (Verdict.BACKWARD, [Op.CONV])


@pytest.mark.parametrize("groups", [1, 2])
def test_into_a_transposed_convolution_by_its_second_axis(net: Any, groups: int) -> None:
    x = net.input(4, 5, 5)
    net.norm(net.op(Op.CONV_TRANSPOSE, x, net.normal(4, 3, 2, 2), groups=groups, padded=True))
    net.finish()
    assert only(net.check()).verdict is Verdict.BACKWARD


def test_forward_into_an_unpadded_convolution_behind_a_relu(net: Any) -> None:
    x = net.norm(relu(net, net.conv(net.input(4, 6, 6))))
    net.conv(x, groups=2)
    net.finish()
    outcome = only(net.check())
    assert (outcome.verdict, outcome.into) == (Verdict.FORWARD, (net.graph.nodes[-1],))


def test_forward_into_a_linear_layer_through_flatten(net: Any) -> None:
    x = net.norm(relu(net, net.conv(net.input(4, 6, 6))))
    net.linear(net.op(Op.RESHAPE, x, shape=("n", 64)))
    net.finish()
    assert only(net.check()).verdict is Verdict.FORWARD


def test_into_every_convolution_of_a_concatenation(net: Any) -> None:
    x = net.input(4, 6, 6)
    net.norm(net.op(Op.CONCAT, net.conv(x, 2), net.conv(x, 3, bias=False), axis=1))
    net.finish()
    outcome = only(net.check())
    assert outcome.verdict is Verdict.BACKWARD and len(outcome.into) == 2


def test_the_sum_of_two_convolutions_is_shifted_once(net: Any) -> None:
    x = net.input(4, 6, 6)
    net.norm(net.op(Op.ADD, net.conv(x, bias=False), net.conv(x, bias=False)))
    net.finish()
    plan = net.check()
    assert only(plan).verdict is Verdict.BACKWARD
    assert [new.slot for new in plan.new_inputs()].count(2) == 1


def test_one_norm_behind_another_goes_with_it(net: Any) -> None:
    net.norm(net.norm(net.conv(net.input(4, 6, 6))))
    net.finish()
    assert {outcome.verdict for outcome in net.check().outcomes} == {Verdict.BACKWARD}


def test_norms_that_no_weight_takes_become_one(net: Any) -> None:
    net.norm(net.norm(net.input(4, 6, 6)))
    net.finish()
    first, second = net.check().outcomes
    assert (first.verdict, first.into) == (Verdict.MERGED, (second.norm,))
    assert second.verdict is Verdict.LEFT


def test_a_matrix_product_without_a_bias_gets_an_addition(net: Any) -> None:
    x = net.input(5)
    net.norm(net.op(Op.MATMUL, x, net.normal(5, 3), takes_bias=False))
    net.finish()
    plan = net.check()
    assert only(plan).verdict is Verdict.BACKWARD and list(plan.appended) == [net.graph.nodes[0]]


def test_the_addition_behind_a_matrix_product_is_its_bias(net: Any) -> None:
    x = net.op(Op.MATMUL, net.input(5), net.normal(5, 3), takes_bias=False)
    net.norm(net.op(Op.ADD, x, net.normal(3)))
    net.finish()
    plan = net.check()
    assert only(plan).verdict is Verdict.BACKWARD and not plan.appended


def test_a_constant_on_the_left_of_a_product_has_rows_for_channels(net: Any) -> None:
    net.norm(net.op(Op.MATMUL, net.normal(3, 4), net.input(4, 7), takes_bias=False))
    net.finish()
    assert only(net.check()).verdict is Verdict.BACKWARD


def test_written_out_by_another_framework(net: Any) -> None:
    x = net.conv(net.input(4, 6, 6))
    shape = (4, 1, 1)
    x = net.op(Op.MULTIPLY, net.op(Op.SUBTRACT, x, net.normal(*shape)), net.normal(*shape))
    net.op(Op.ADD, x, net.normal(*shape))
    net.finish()
    plan = net.check()
    assert only(plan).verdict is Verdict.BACKWARD and len(plan.bypassed) == 3


def test_frozen_arithmetic_is_a_constant(net: Any) -> None:
    x = net.conv(net.input(4, 6, 6))
    deviation = net.op(Op.SQRT, net.op(Op.ADD, net.constant(np.ones((4, 1, 1))), net.constant(1e-5)))
    scaled = net.op(Op.DIVIDE, x, deviation)
    y = net.op(Op.ADD, scaled, net.normal(4, 1, 1))
    net.finish(y)
    assert only(net.check()).verdict is Verdict.BACKWARD


def test_a_weight_that_two_sites_share_is_copied(net: Any) -> None:
    weight, x = net.normal(4, 4, 3, 3), net.input(4, 6, 6)
    net.norm(net.op(Op.CONV, x, weight))
    net.op(Op.CONV, x, weight)
    net.finish()
    plan = net.check()
    assert only(plan).verdict is Verdict.BACKWARD
    assert [new.copied for new in plan.new_inputs()] == [True, False]


def test_a_bias_that_is_the_norms_own_beta(net: Any) -> None:
    shared, x = net.normal(4), net.input(4, 6, 6)
    x = net.op(Op.CONV, x, net.normal(4, 4, 3, 3), shared)
    parameters = (net.normal(4), shared, net.normal(4), net.constant(np.ones(4)))
    net.op(Op.BATCH_NORM, x, *parameters, eps=1e-5)
    net.finish()
    assert only(net.check()).verdict is Verdict.BACKWARD


def test_maximum_pooling_passes_positive_scales_only(nets: Any) -> None:
    for positive in (True, False):
        net = nets(1)
        net.norm(net.op(Op.MAX_POOL, net.conv(net.input(4, 6, 6))), positive=positive)
        net.finish()
        outcome = only(net.check())
        assert outcome.code == ("" if positive else "negative-scale")


def test_gain_and_bias_of_a_layernorm_move_when_asked(net: Any) -> None:
    x = net.op(Op.LAYER_NORM, net.input(3, 6), net.normal(6), net.normal(6))
    net.linear(x)
    net.linear(x, bias=False)
    net.finish()
    assert only(net.check()).code == "own-statistics"
    plan = net.check(layernorm=True)
    assert only(plan).verdict is Verdict.FORWARD and len(only(plan).into) == 2
    neutral = {new.slot: set(new.values) for new in plan.new_inputs() if new.node.op is Op.LAYER_NORM}
    assert neutral == {1: {1.0}, 2: {0.0}}


def test_the_gain_of_an_rmsnorm_that_adds_one(net: Any) -> None:
    x = net.input(3, 6)
    squared = net.op(Op.REDUCE_MEAN, net.op(Op.MULTIPLY, x, x), axes=(2,), keepdims=True)
    core = net.op(Op.DIVIDE, x, net.op(Op.SQRT, squared))
    gain = net.op(Op.ADD, net.normal(6), net.constant(1.0))
    net.linear(net.op(Op.MULTIPLY, core, gain), bias=False)
    net.finish(net.graph.nodes[-1].y)
    assert not net.check().outcomes
    assert only(net.check(layernorm=True)).verdict is Verdict.FORWARD


def test_a_layernorm_that_others_read_keeps_its_gain(net: Any) -> None:
    x = net.op(Op.LAYER_NORM, net.input(3, 6), net.normal(6), net.normal(6))
    net.linear(x)
    net.op(Op.ACTIVATION, x, name="sigmoid")
    assert left(net, layernorm=True)[0] == "nonlinear"


def test_constants_that_a_fold_brings_together_are_one_map_then(net: Any) -> None:
    x = net.norm(net.op(Op.ADD, net.input(4, 6, 6), net.normal(4, 1, 1)))
    net.finish(net.norm(net.op(Op.DIVIDE, x, net.normal(4, 1, 1))))
    plan = net.check()
    assert len(plan.bypassed) == 3


def test_a_constant_in_code_is_passed_and_stays(net: Any) -> None:
    x = net.op(Op.ADD, net.op(Op.MULTIPLY, net.conv(net.input(4, 6, 6)), net.constant(0.5)), net.constant(1.25))
    net.norm(x)
    net.finish()
    for node in net.graph.nodes[1:3]:
        node.fixed = Fixed("constant-in-code", "it is written in code")
    plan = net.check()
    assert only(plan).verdict is Verdict.BACKWARD and list(plan.bypassed) == net.graph.nodes[3:]


def test_only_the_gain_of_a_written_out_layernorm_moves(net: Any, make_layer: Any) -> None:
    x = net.input(3, 6)
    centred = net.op(Op.SUBTRACT, x, net.op(Op.REDUCE_MEAN, x, axes=(2,), keepdims=True))
    scaled = net.op(Op.MULTIPLY, centred, net.constant(0.5))
    gain = net.op(Op.MULTIPLY, scaled, net.normal(6))
    gain.producer.layer = make_layer(kind=NormKind.LAYER, name="ln")
    net.linear(net.op(Op.ADD, gain, net.normal(6)))
    net.finish()
    assert only(net.check()).code == "own-statistics"
    plan = net.check(layernorm=True)
    assert only(plan).verdict is Verdict.FORWARD and scaled.producer not in plan.bypassed


# What stays, and why


def test_behind_a_relu_there_is_nothing_to_fold_into(net: Any) -> None:
    y = net.norm(relu(net, net.conv(net.input(4, 6, 6))))
    code, reason = left(net, y)
    assert code == "nonlinear" and "relu" in reason and "leaves the network" in reason


def test_before_a_padded_convolution(net: Any) -> None:
    net.conv(net.norm(net.input(4, 6, 6)), padding=1)
    assert left(net)[0] == "padding"


def test_an_output_of_the_convolution_that_is_promised(net: Any) -> None:
    x = net.conv(net.input(4, 6, 6))
    assert left(net, x, net.norm(x))[0] == "graph-output"


def test_a_skip_connection_reads_the_convolution_too(net: Any) -> None:
    x = net.conv(net.input(4, 6, 6))
    net.op(Op.ADD, x, net.norm(x))
    assert left(net)[0] == "several-consumers"


def test_two_norms_behind_one_convolution(net: Any) -> None:
    x = net.conv(net.input(4, 6, 6))
    net.norm(x)
    net.norm(x)
    net.finish()
    assert {outcome.code for outcome in net.check().outcomes} == {"several-consumers"}


def test_a_linear_layer_whose_width_is_the_number_of_channels(net: Any) -> None:
    x = net.linear(net.input(5, 7), 5)
    assert x.shape == ("n", 5, 5)
    assert left(net, net.norm(x))[0] == "wrong-axis"


def test_a_norm_in_training_mode(net: Any) -> None:
    y = net.norm(net.conv(net.input(4, 6, 6)), training=True)
    net.finish(y)
    assert only(net.check()).code == "training-mode"


def test_training_mode_is_overruled_for_inference(net: Any) -> None:
    from normdoctor.flow.plan import plan_folds

    net.norm(net.conv(net.input(4, 6, 6)), training=True)
    net.norm(net.input(4, 6, 6, name="other"), training=True)
    net.finish()
    plan = plan_folds(net.graph, evaluation=True)
    assert [outcome.verdict for outcome in plan.outcomes] == [Verdict.BACKWARD, Verdict.LEFT]
    assert list(plan.attributes.values()) == [{"training": False}]


def test_without_running_statistics(net: Any) -> None:
    x = net.conv(net.input(4, 6, 6))
    net.graph.add(
        Node(Op.BATCH_NORM, [x, net.normal(4), net.normal(4), None, None], [Value("y", x.shape)], {"eps": 0.1})
    )
    from normdoctor.flow.plan import plan_folds

    net.finish()
    assert only(plan_folds(net.graph)).code == "no-running-statistics"


@pytest.mark.parametrize("var", [np.nan, np.inf * 0, -1.0])
def test_statistics_that_are_no_numbers(net: Any, var: float) -> None:
    x = net.conv(net.input(4, 6, 6))
    y = net.op(Op.BATCH_NORM, x, *(net.normal(4) for _ in range(3)), net.constant([var, 1, 1, 1]), eps=1e-5)
    from normdoctor.flow.plan import plan_folds

    net.finish(y)
    assert only(plan_folds(net.graph)).code == "not-finite"


def test_a_weight_that_is_computed_from_the_input(net: Any) -> None:
    x = net.input(4, 6, 6)
    weight = net.op(Op.REDUCE_MEAN, net.input(4, 4, 3, 3, name="w"), axes=(0,), keepdims=False)
    assert left(net, net.norm(net.op(Op.CONV, x, weight)))[0] == "computed-weight"


def test_what_must_not_be_changed_says_why(net: Any) -> None:
    y = net.norm(net.conv(net.input(4, 6, 6)))
    net.graph.nodes[0].fixed = Fixed("shared-module", "it is called twice")
    code, reason = left(net, y)
    assert code == "shared-module" and "it is called twice" in reason


def test_what_is_excluded_stays_and_decompose_leaves_one_product_and_one_sum(net: Any) -> None:
    y = net.norm(net.conv(net.input(4, 6, 6)))
    net.finish(y)
    norm = net.graph.nodes[1]
    plan = net.check(excluded={norm: ("overflow", "too large")})
    assert (only(plan).verdict, only(plan).code, plan.changes_nothing) == (Verdict.LEFT, "overflow", True)


def test_decomposed_into_one_product_and_one_sum(net: Any) -> None:
    net.finish(net.norm(net.input(4, 6, 6)))
    plan = net.check(decompose=True)
    assert only(plan).verdict is Verdict.DECOMPOSED and list(plan.decomposed) == net.graph.nodes


def test_a_chain_without_end_is_given_up(net: Any) -> None:
    x = net.conv(net.input(4, 6, 6))
    for _ in range(300):
        x = net.op(Op.IDENTITY, x)
    assert left(net, net.norm(x))[0] == "too-far"


def test_paths_that_part_and_join_again_end(net: Any) -> None:
    one = net.constant(np.ones(4))
    x = net.op(Op.BATCH_NORM, net.input(4, 6, 6), one, net.normal(4), net.normal(4), one, eps=0.0)
    for _ in range(20):
        x = net.op(Op.ADD, net.op(Op.IDENTITY, x), net.op(Op.IDENTITY, x))
    net.conv(x)
    assert left(net)[0] == "too-far"
