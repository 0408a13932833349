"""What the tests of programs share: trained statistics, exact comparison, and a count of the tensors alive."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from normdoctor.models.loaded import flatten


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, and nothing said about TorchScript being deprecated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics as after training, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in norms_of(module).values():
            if norm.running_mean is not None:
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return module.eval()


def norms_of(module: nn.Module) -> dict[str, Any]:
    kind = nn.modules.batchnorm._NormBase
    return {name: inner for name, inner in module.named_modules() if isinstance(inner, kind)}


def leaves(found: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def same(first: Any, second: Any) -> bool:
    """Bit by bit; a NamedTuple of TorchScript gets a class of its own each time."""
    alike = (
        type(first).__name__ == type(second).__name__ and dict(flatten(first)).keys() == dict(flatten(second)).keys()
    )
    return alike and all(map(torch.equal, leaves(first), leaves(second)))


def run(module: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)  # for dropout
    with torch.no_grad():
        return module(*args, **kwargs)


def alive(shape: tuple[int, ...]) -> int:
    """How many tensors of this shape there are."""
    # by type: isinstance would ask a weak proxy, whose object may be gone, for its class
    return sum(issubclass(type(entry), Tensor) and tuple(entry.shape) == shape for entry in gc.get_objects())
