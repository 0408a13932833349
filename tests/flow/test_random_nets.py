"""The law of folding on random nets: whatever folds, the function stays the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from normdoctor.flow.graph import Fixed, Op, Value
from normdoctor.places import Verdict


def grow(net: Any, random: np.random.Generator) -> None:
    """A random net of convolutions, linear layers, norms, and everything that may stand between them."""
    live: list[Value] = [net.input(4, 6, 6)]

    def pick() -> Value:
        # Mostly the newest value, so that chains get long; now and then an old one, so that paths part.
        return live[-1] if random.random() < 0.9 else live[random.integers(len(live))]

    for _ in range(random.integers(4, 14)):
        x = pick()
        known = [length for length in x.shape or () if isinstance(length, int)]
        rank = len(x.shape or ())
        if (
            rank > 1
            and len(known) == rank - 1
            and (x.shape or ())[0] == "n"
            and min(known) > 0
            and np.prod(known) < 4000
        ):
            choices = steps(net, random, x)
            live.append(choices[random.integers(len(choices))]())


def steps(net: Any, random: np.random.Generator, x: Value) -> list[Callable[[], Value]]:
    """What may come next."""
    shape: Any = x.shape
    rank, known = len(shape), shape[1:]
    channels = shape[1]
    choices: list[Callable[[], Value]] = [
        *[lambda: net.norm(x, positive=random.random() < 0.6)] * 8,
        lambda: net.linear(x, bias=random.random() < 0.5),
        lambda: net.op(Op.ACTIVATION, x, name="relu", homogeneous=True),
        lambda: net.op(Op.ACTIVATION, x, name="sigmoid"),
        lambda: net.op(Op.IDENTITY, x),
        lambda: net.op(Op.NEGATE, x),
        lambda: net.op(Op.ADD, x, net.normal(*[channels if axis == 1 else 1 for axis in range(1, rank)])),
        lambda: net.op(Op.ADD, x, net.normal(*[1] * random.integers(rank))),
        lambda: net.op(Op.MULTIPLY, net.normal(1, channels, *[1] * (rank - 2)), x),
        lambda: net.op(Op.SUBTRACT, net.normal(1, channels, *[1] * (rank - 2)), x),
        lambda: net.op(Op.DIVIDE, x, net.normal(1)),
        lambda: net.op(Op.SUBTRACT, x, net.normal(1, channels, *[1] * (rank - 2))),
        lambda: net.op(Op.LAYER_NORM, x, net.normal(shape[-1]), net.normal(shape[-1])),
        lambda: net.op(Op.OTHER_NORM, x, net.normal(channels), net.normal(channels)),
        lambda: gemm(net, random, x),
        lambda: net.op(Op.MATMUL, x, net.normal(shape[-1], 3), takes_bias=False),
        lambda: net.op(Op.CONCAT, x, net.conv(x, kernel=1) if rank > 2 else net.linear(x, shape[-1]), axis=1),
        lambda: net.op(Op.ADD, x, net.norm(x)),
        lambda: net.op(Op.SUBTRACT, x, net.norm(x)),
        lambda: net.op(Op.MULTIPLY, x, net.norm(x)),
    ]
    if rank > 2:
        groups = 2 if channels % 2 == 0 and random.random() < 0.5 else 1
        order = (0, *(1 + random.permutation(rank - 1)).tolist())
        choices += [
            lambda: net.op(Op.TRANSPOSE, x, order=order),
            lambda: net.op(Op.RESHAPE, x, shape=("n", int(np.prod(known)))),
            lambda: net.op(Op.RESHAPE, x, shape=("n", channels, int(np.prod(known[1:])))),
            lambda: net.op(Op.REDUCE_MEAN, x, axes=(rank - 1,), keepdims=bool(random.integers(2))),
            lambda: net.op(Op.REDUCE_SUM, x, axes=(rank - 1,), keepdims=bool(random.integers(2))),
            lambda: net.op(Op.REDUCE_MAX, x, axes=(rank - 1,), keepdims=bool(random.integers(2))),
            lambda: net.op(Op.MATMUL, net.normal(3, shape[-2]), x, takes_bias=False),
            lambda: net.op(Op.PAD, x, axes=tuple(range(2, rank)), value=float(random.integers(2))),
        ]
        if min(known[1:]) > 2 and rank < 5:
            choices += [lambda: net.conv(x, bias=random.random() < 0.5, groups=groups)] * 5
            choices += [
                lambda: net.conv(x, 2 * groups, 3, groups=groups, padding=1),
                lambda: net.op(Op.MAX_POOL, x, pad=int(random.integers(2))),
                lambda: net.op(Op.AVERAGE_POOL, x, pad=1, counts_padding=True),
                lambda: net.op(Op.AVERAGE_POOL, x),
                lambda: net.op(
                    Op.CONV_TRANSPOSE,
                    x,
                    net.normal(channels, 2, *[2] * (rank - 2)),
                    None,
                    groups=groups,
                    padded=True,
                ),
                lambda: net.op(
                    Op.CONV_TRANSPOSE,
                    x,
                    net.normal(channels, 3, *[1] * (rank - 2)),
                    net.normal(3 * groups),
                    groups=groups,
                ),
            ]
        if rank == 4 and channels % 4 == 0:
            choices.append(lambda: net.op(Op.DEPTH_TO_SPACE, x, block=2, order="CRD"))
    if channels > 2:
        choices += [
            lambda: net.op(Op.SLICE, x, axis=1, start=1, end=channels, step=2),
            lambda: net.op(Op.SPLIT, x, axis=1, outputs=(2, channels - 2)),
            lambda: net.op(Op.GATHER, x, net.constant(0), axis=rank - 1),
            lambda: net.op(Op.EXPAND, net.op(Op.RESHAPE, x, shape=("n", 1, *known)), shape=("n", 2, *known)),
        ]
    return choices


def gemm(net: Any, random: np.random.Generator, x: Value) -> Value:
    """A product in any of its forms."""
    turned, width = bool(random.integers(2)), (x.shape or ())[-1]
    weight = net.normal(3, width) if turned else net.normal(width, 3)
    bias = (None, net.normal(3), net.normal(1, 3), net.normal(1), net.normal())[random.integers(5)]
    return net.op(
        Op.MATMUL, x, weight, bias, transpose_b=turned, alpha=0.5, beta=float(random.integers(3)), takes_bias=True
    )


def test_the_folded_net_is_the_same_function(nets: Any) -> None:
    verdicts: Counter[Verdict] = Counter()
    passed: Counter[Op] = Counter()
    into: Counter[Op] = Counter()
    for seed in range(250):
        net = nets(seed)
        grow(net, np.random.default_rng(seed))
        graph = net.finish()
        for node in graph.nodes:
            if node.op in (Op.ADD, Op.MULTIPLY, Op.SUBTRACT, Op.DIVIDE) and seed % 3 == 0:
                node.fixed = Fixed("constant-in-code", "it is written in code")
        plan = net.check(layernorm=True, decompose=seed % 2 == 0)
        assert not any(node.fixed for node in (*plan.bypassed, *(new.node for new in plan.new_inputs())))
        for outcome in plan.outcomes:
            verdicts[outcome.verdict] += 1
            passed.update(node.op for node in outcome.through)
            into.update(node.op for node in outcome.into)
    assert verdicts.keys() == set(Verdict)
    assert verdicts[Verdict.BACKWARD] > 50 and verdicts[Verdict.FORWARD] > 20, verdicts
    assert into.keys() >= {Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL, Op.BATCH_NORM}, into
