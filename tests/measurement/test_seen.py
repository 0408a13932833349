"""The kernel that looks at a norm's input, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normdoctor.looking.with_torch import seen

SHAPES = {
    "vectors": (64, 6),
    "sequences": (16, 6, 37),
    "maps": (16, 6, 9, 9),
    "small maps": (32, 6, 2, 2),
    "one pixel": (64, 6, 1, 1),
    "volumes": (8, 6, 5, 5, 5),
    "one sample": (1, 6, 20, 20),
    "more than one chunk": (12, 6, 80, 80),
}

WIDE, NARROW = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)

OFFSETS = [(dtype, offset) for dtype in (*WIDE, *NARROW) for offset in (0.0, 1.0, -10.0, 1e2)]
OFFSETS += [(dtype, offset) for dtype in WIDE for offset in (1e4, 1e6)]  # in 16 bits these are all one number


def values(shape: tuple[int, ...], offset: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of s.d. 0.5 to 3 by channel, offset by as many of them; rounded to the type, which is what the norm sees."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 3, shape[1], dtype=torch.float64).view(1, -1, *(1 for _ in shape[2:]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((x + offset) * scale).to(dtype)


def moments(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance by channel, by two passes in float64."""
    wide = x.double().transpose(0, 1).reshape(x.shape[1], -1).numpy()
    return wide.mean(1), np.square(wide - wide.mean(1, keepdims=True)).mean(1)


def distance(x: torch.Tensor, **options: torch.Tensor) -> float:
    """The largest mean shift in standard deviations or |ln variance ratio|."""
    mean, var = moments(x)
    found = seen(x, **options).moments
    assert found.count == x.numel() // x.shape[1]
    assert found.mean.dtype == found.m2.dtype == np.float64
    return float(max(np.max(np.abs(found.mean - mean) / np.sqrt(var)), np.max(np.abs(np.log(found.variance() / var)))))


@pytest.mark.parametrize(("dtype", "offset"), OFFSETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: str, dtype: torch.dtype, offset: float) -> None:
    x = values(SHAPES[shape], offset, dtype)
    wanted = 1e-12 if dtype == torch.float64 and offset < 1e4 else 1e-9 if dtype == torch.float64 else 1e-6
    assert distance(x) <= wanted


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_a_shift_changes_nothing(offset: float) -> None:
    """A good one, one that is stale, and one from elsewhere."""
    x = values((16, 6, 9, 9), offset, torch.float32)
    mean = torch.from_numpy(moments(x)[0]).float()
    for shift in (mean, 1.01 * mean + 0.3, torch.full((6,), 1e4), torch.zeros(6)):
        assert distance(x, shift=shift) <= 1e-6


def test_offsets_that_differ_by_channel() -> None:
    x = values((16, 6, 9, 9), 0.0, torch.float32)
    x[:, 1] += 1e5
    x[:, 4] -= 30
    x[:, 5] *= 1e-20
    assert distance(x) <= 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e5, 1e-30])
@pytest.mark.parametrize("shape", [(1, 3), (7, 3), (5, 3, 11, 11)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_constant_channels_have_no_variance(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.full(shape, value, dtype=dtype)
    found = seen(x).moments
    np.testing.assert_array_equal(found.mean, x.double().numpy().reshape(-1)[:3])
    np.testing.assert_array_equal(found.m2, 0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bits_do_not_overflow(dtype: torch.dtype) -> None:
    """The sum and the squares of these pass 65504."""
    x = values((8, 6, 20, 20), 2.0, torch.float64).mul(1000).to(dtype)
    assert distance(x) <= 1e-6


def test_broken_values_stay_in_their_channels() -> None:
    x = values((8, 6, 9, 9), 50.0, torch.float32)
    mean, var = moments(x)
    x[3, 2, 4, 4] = torch.nan
    x[5, 4, 0, 0] = torch.inf
    with np.errstate(invalid="ignore"):
        found = seen(x)
    sound = [0, 1, 3, 5]
    np.testing.assert_allclose(found.moments.mean[sound], mean[sound], rtol=1e-7)
    np.testing.assert_allclose(found.moments.variance()[sound], var[sound], rtol=1e-6)
    assert np.isnan(found.moments.mean[2]) and not np.isfinite(found.moments.mean[4])
    assert not np.isfinite(found.moments.m2[[2, 4]]).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_means_of_samples(shape: str, offset: float) -> None:
    x = values(SHAPES[shape], offset, torch.float32)
    wide = x.double().reshape(*x.shape[:2], -1)
    wanted = wide.mean(2).numpy()
    found = seen(x).sample_means
    assert found is not None and found.shape == x.shape[:2]
    deviation = np.abs(found - wanted) / np.sqrt(moments(x)[1])
    assert deviation.max() <= 1e-6
    assert seen(x, samples=False).sample_means is None


def test_layouts() -> None:
    x = values((6, 6, 9, 9), 3.0, torch.float32)
    plain = seen(x).moments
    for other in (x.to(memory_format=torch.channels_last), x.flip(3).flip(3), x.transpose(2, 3)):
        found = seen(other).moments
        np.testing.assert_allclose(found.mean, plain.mean, rtol=1e-7)
        np.testing.assert_allclose(found.m2, plain.m2, rtol=1e-6)


def test_the_input_stays_as_it_is() -> None:
    for offset in (0.0, 1e5):
        for shape in ((64, 6), (8, 6, 3, 3), (8, 6, 20, 20)):
            x = values(shape, offset, torch.float32).requires_grad_()
            before = x.detach().clone()
            seen(x)
            assert torch.equal(x, before) and x.grad is None


def test_repeatable() -> None:
    x = values((12, 6, 80, 80), 5.0, torch.float32)
    one, two = seen(x), seen(x.clone())
    np.testing.assert_array_equal(one.moments.mean, two.moments.mean)
    np.testing.assert_array_equal(one.moments.m2, two.moments.m2)
