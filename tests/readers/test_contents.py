"""What people keep in a checkpoint beside, around and instead of one flat state_dict."""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from normdoctor.layers import Checkpoint, NormKind

Reread = Callable[..., Checkpoint]


def net() -> nn.Module:
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 4, 3), bn1=nn.BatchNorm2d(4), body=nn.Sequential(nn.LayerNorm(6), nn.PReLU(5)))
    )


def state(model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    return dict((model or net()).state_dict())


def names(checkpoint: Checkpoint) -> list[str]:
    return [layer.name for layer in checkpoint.layers]


PLAIN = ["bn1", "body.0"]
CONTAINERS = [
    "state_dict", "model", "model_state_dict", "module", "net", "network", "ema", "model_ema", "state_dict_ema",
    "ema_state_dict", "teacher", "student", "generator", "G_ema", "weights", "params", "best", "0",
]  # fmt: skip


@pytest.mark.parametrize("key", CONTAINERS)
def test_one_model_under_a_key(key: str, reread: Reread) -> None:
    checkpoint = reread({key: state(), "epoch": 3, "arch": "resnet", "loss": 0.25, "best_acc1": torch.tensor(0.5)})
    assert names(checkpoint) == PLAIN
    averaged = checkpoint.models[0].averaged if checkpoint.models[0].layers else checkpoint.models[-1].averaged
    assert (averaged is not None) == ("ema" in key.lower())


@pytest.mark.parametrize(
    "keys", [("model", "ema"), ("teacher", "student"), ("generator", "discriminator"), ("state_dict", "state_dict_ema")]
)
def test_several_models_are_kept_apart(keys: tuple[str, str], reread: Reread) -> None:
    checkpoint = reread({key: state() for key in keys})
    assert names(checkpoint) == [f"{key}:{name}" for key in keys for name in PLAIN]
    assert [model.key for model in checkpoint.models] == list(keys)
    assert [layer.path for layer in checkpoint.layers] == [*PLAIN, *PLAIN]
    assert checkpoint.format == "PyTorch checkpoint of 2 models (zip)"
    assert {ref.name for ref in checkpoint.list_references()} == {f"{key}:{name}" for key in keys for name in state()}


def test_a_nested_state_dict_is_one_model(reread: Reread) -> None:
    tree = {
        "conv": {"weight": torch.zeros(4, 1, 3, 3)},
        "layer1": {"0": {"bn": state(nn.BatchNorm2d(4))}, "1": {"bn": state(nn.BatchNorm2d(5))}},
        "norm": state(nn.LayerNorm(6)),
    }
    for content in (tree, {"model": tree}):
        checkpoint = reread(content)
        assert names(checkpoint) == ["layer1.0.bn", "layer1.1.bn", "norm"]
        assert len([model for model in checkpoint.models if model.layers]) == 1


def test_a_list_of_state_dicts(reread: Reread) -> None:
    assert names(reread([state(), state()])) == [f"{place}:{name}" for place in "01" for name in PLAIN]
    assert names(reread({"folds": [state(), state()]})) == [f"folds.{i}:{name}" for i in "01" for name in PLAIN]


def test_the_same_state_dict_under_two_keys_is_one(reread: Reread) -> None:
    shared = state()
    assert names(reread({"state_dict": shared, "best": shared})) == PLAIN


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_modules_in_a_checkpoint(legacy: bool, reread: Reread) -> None:
    """As YOLO writes them: half-precision modules beside settings and an optimizer that was stripped."""
    content = {"epoch": -1, "model": net().half().eval(), "ema": net(), "optimizer": None, "train_args": {"lr": 0.1}}
    checkpoint = reread(content, legacy=legacy)
    assert names(checkpoint) == [f"{key}:{name}" for key in ("model", "ema") for name in PLAIN]
    assert [layer.eps for layer in checkpoint.layers] == [1e-5] * 4
    assert [layer.training for layer in checkpoint.layers] == [False, False, True, True]
    assert checkpoint.models[1].averaged == "stored under ema"


class Trainer:
    """No module, but an object that has some."""

    def __init__(self) -> None:
        self.module = net()
        self.updates = 7
        self.inner = argparse.Namespace(weights=state())


def test_models_inside_other_objects(reread: Reread) -> None:
    assert names(reread(Trainer())) == [*(f"module:{name}" for name in PLAIN), *(f"inner.weights:{n}" for n in PLAIN)]
    assert names(reread({"trainer": Trainer()}))[0] == "trainer.module:bn1"


def test_dictionary_classes(reread: Reread) -> None:
    by_default = defaultdict(dict, {"model": OrderedDict(state())})
    assert names(reread(by_default)) == PLAIN
    assert names(reread({"queue": deque([1]), "model": state()})) == PLAIN


WRAPPED = {
    "DataParallel": ("module.{}", PLAIN),
    "torch.compile": ("_orig_mod.{}", PLAIN),
    "both": ("module._orig_mod.{}", PLAIN),
    "both the other way": ("_orig_mod.module.{}", PLAIN),
    "FSDP": ("_fsdp_wrapped_module.{}", PLAIN),
    "fairscale": ("_fpw_module.{}", PLAIN),
    "Lightning": ("model.{}", PLAIN),
    "Lightning of net": ("net.{}", PLAIN),
    "a backbone": ("backbone.{}", [f"backbone.{name}" for name in PLAIN]),
}


@pytest.mark.parametrize("pattern, paths", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_kept_for_display_and_dropped_for_matching(pattern: str, paths: list[str], reread: Reread) -> None:
    checkpoint = reread({pattern.format(name): tensor for name, tensor in state().items()})
    assert names(checkpoint) == [pattern.format(name) for name in PLAIN]
    assert [layer.path for layer in checkpoint.layers] == paths


def test_wrappers_in_the_middle(reread: Reread) -> None:
    inside = "blocks.0._checkpoint_wrapped_module.{}", "blocks.1._fsdp_wrapped_module._orig_mod.{}"
    checkpoint = reread({p.format(name): tensor for p in inside for name, tensor in state().items()})
    assert names(checkpoint) == [p.format(name) for p in inside for name in PLAIN]
    assert [layer.path for layer in checkpoint.layers] == [f"blocks.{i}.{name}" for i in "01" for name in PLAIN]


def test_really_wrapped_modules(reread: Reread) -> None:
    compiled = torch.compile(net())
    for wrapped in (nn.DataParallel(net()), compiled, nn.DataParallel(compiled)):
        for content in (wrapped, wrapped.state_dict()):
            layers = reread(content).layers
            assert [layer.path for layer in layers] == PLAIN
            assert {layer.name for layer in layers} < {name for name, _ in wrapped.named_modules()}


def training_state(model: nn.Module) -> dict[str, Any]:
    """A checkpoint with all that a trainer adds, after a step of Adam on each parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "model": state(model),
        "optimizer": optimizer.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "optim_g": optimizer.state_dict(),
        "anything": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "scaler": {"scale": torch.ones(4), "bias": torch.ones(4)},
        "callbacks": {"EarlyStopping": {"norm": {"weight": torch.ones(4), "bias": torch.ones(4)}}},
        "exp_avg": {"bn.weight": torch.ones(4), "bn.bias": torch.ones(4)},
        "rng_state": torch.get_rng_state(),
    }


def test_training_state_is_not_taken_for_a_model(reread: Reread) -> None:
    checkpoint = reread(training_state(net()))
    assert names(checkpoint) == PLAIN
    unnamed = [ref for ref in checkpoint.list_references() if not ref.name]
    assert len(unnamed) > 20  # a write has to know whose memory they are, all the same


@pytest.mark.parametrize("name", ["amp_norm", "optim_net.bn", "exp_avg_pool.norm", "callbacks_norm"])
def test_a_parameter_may_be_named_like_training_state(name: str, reread: Reread) -> None:
    assert names(reread({f"{name}.weight": torch.ones(4), f"{name}.bias": torch.zeros(4)})) == [name]


def test_lightning(reread: Reread) -> None:
    checkpoint = reread(
        {
            "epoch": 4,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"model.{name}": tensor for name, tensor in state().items()},
            "loops": {"fit_loop": {"state_dict": {}, "norm": {"weight": torch.ones(3), "bias": torch.ones(3)}}},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [torch.optim.SGD(net().parameters(), momentum=0.9).state_dict()],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.1},
        }
    )
    assert names(checkpoint) == [f"model.{name}" for name in PLAIN]
    assert [layer.path for layer in checkpoint.layers] == PLAIN


def test_deepspeed(reread: Reread) -> None:
    checkpoint = reread({"module": state(), "buffer_names": [], "ds_config": {}, "dp_world_size": 2})
    assert names(checkpoint) == PLAIN
    shard = {"optimizer_state_dict": {"zero_stage": 2, "single_partition_of_fp32_groups": [torch.ones(99)]}}
    (note,) = reread(shard).notes
    assert "ZeRO" in note and "not separable" in note


@pytest.mark.parametrize("name", ["_flat_param", "layers.0._fsdp_wrapped_module._flat_param", "flat_param_0"])
def test_flat_fsdp_parameters_are_named(name: str, reread: Reread) -> None:
    checkpoint = reread({"module": {name: torch.ones(1000), "layers.0.bn.running_mean": torch.ones(4)}})
    (note,) = checkpoint.notes
    assert name in note and "not separable" in note


def test_averaged_models(reread: Reread) -> None:
    averaged = AveragedModel(net())
    for updates, said in ((0, None), (1, None), (3, "n_averaged = 3")):
        averaged.n_averaged.fill_(updates)
        for content in (averaged.state_dict(), {"state_dict": averaged.state_dict()}, copy.deepcopy(averaged)):
            checkpoint = reread(content)
            assert checkpoint.models[0].averaged == said
            assert [layer.path for layer in checkpoint.layers] == PLAIN


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.BatchNorm1d(4)
        self.right = self.left
        self.block = nn.Sequential(nn.LayerNorm(3))
        self.again = self.block


@pytest.mark.parametrize("content", [Siamese(), Siamese().state_dict()], ids=["module", "state_dict"])
def test_a_shared_layer_is_reported_once(content: Any, reread: Reread) -> None:
    left, inner = reread(content).layers
    assert (left.name, left.aliases) == ("left", ("right",))
    assert inner.name == "block.0"


def test_shared_weights_with_statistics_of_their_own_are_two_layers(reread: Reread) -> None:
    a, b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    b.weight, b.bias = a.weight, a.bias
    assert names(reread(nn.ModuleList([a, b]))) == ["0", "1"]


def test_a_model_of_nothing_but_a_norm(reread: Reread) -> None:
    for content in (nn.BatchNorm1d(3), state(nn.BatchNorm1d(3))):
        (layer,) = reread(content).layers
        assert (layer.name, layer.kind, layer.channels) == ("", NormKind.BATCH, 3)


@pytest.mark.parametrize("content", [None, {}, [], 3, "text", {"epoch": 1}, torch.ones(3), {"a": {"b": []}}], ids=repr)
def test_files_without_norms(content: Any, reread: Reread) -> None:
    assert reread(content).layers == ()


def test_folded_models_are_recognised_as_such(reread: Reread) -> None:
    with_bias, without = nn.Conv2d(3, 4, 3).state_dict(), nn.Conv2d(3, 4, 3, bias=False).state_dict()
    assert "probably folded" in reread({f"c.{k}": v for k, v in with_bias.items()}).notes[0]
    assert "nothing was folded" in reread({f"c.{k}": v for k, v in without.items()}).notes[0]


def test_the_root_folder_of_the_zip_is_the_stem_of_its_name(save: Callable[..., Path], reread: Reread) -> None:
    for name in ("modèle 1.pt", "data.pkl.pt", "a.b.ckpt", "archive"):
        assert names(reread(state(), name=name)) == PLAIN
