"""Blueprints for convolutional hosts: size, shape, groups of their norms, and that all of a seed can learn."""

import pytest
import torch

from esper import keys as k
from esper.seeds.blueprints import registry
from esper.seeds.blueprints.cnn import norm_groups

NAMES = ("noop", "norm", "attention", "depthwise", "conv_light", "conv_heavy", "conv_expand")
KEYS = k.host_keys(k.root(0), 2)
WIDTHS = (8, 16, 32, 64, 128)


def features(c):
    return k.normal(k.root(2), 2, c, 6, 6)


def test_the_registered_kinds():
    assert registry.names("cnn")[: len(NAMES)] == NAMES


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("noop", (0, 0, 0, 0, 0)),
        ("norm", (17, 33, 65, 129, 257)),
        ("attention", (32, 128, 512, 2_048, 8_192)),
        ("depthwise", (152, 432, 1_376, 4_800, 17_792)),
        ("conv_light", (592, 2_336, 9_280, 36_992, 147_712)),
        ("conv_heavy", (1_184, 4_672, 18_560, 73_984, 295_424)),
        ("conv_expand", (4_688, 18_592, 74_048, 295_552, 1_180_928)),
    ],
)
def test_parameter_counts(name, parameters):
    assert tuple(registry.parameter_count(registry.get("cnn", name), c) for c in WIDTHS) == parameters


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 1), (16, 1), (32, 2), (48, 2), (64, 4), (96, 4), (256, 16), (1024, 32)]
)
def test_groups_hold_at_least_sixteen_channels(channels, groups):
    assert norm_groups(channels) == groups


@pytest.mark.parametrize("c", [2, 8, 16, 32, 48, 64])
@pytest.mark.parametrize("name", NAMES)
def test_features_keep_their_shape_and_change(name, c):
    blueprint = registry.get("cnn", name)
    x = features(c)
    y = blueprint.apply(blueprint.init(KEYS, c, torch.float32)[0].to_dict(), x)
    assert y.shape == x.shape
    assert torch.equal(y, x) == (name == "noop")


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_parameter_of_a_planted_seed_receives_a_gradient(name):
    blueprint = registry.get("cnn", name)
    params = blueprint.init(KEYS, 16, torch.float32)[0].to_dict()
    gradients = torch.func.grad(lambda p: (blueprint.apply(p, features(16)) * features(16).roll(1)).sum())(params)
    assert all(g.abs().sum() > 0 for g in torch.utils._pytree.tree_leaves(gradients))


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_seed_is_drawn_from_its_own_key(name):
    blueprint = registry.get("cnn", name)
    both, second = blueprint.init(KEYS, 8, torch.float32), blueprint.init(KEYS[1:], 8, torch.float32)
    assert (both[1] == second[0]).all()
    drawn = [leaf for leaf in both.values(True, True) if leaf.std() > 0 and leaf[0].numel() > 1]
    assert all(not torch.equal(leaf[0], leaf[1]) for leaf in drawn)
    beginnings = {tuple((leaf[0] / leaf[0].flatten()[0]).flatten()[1:5].mul(1e4).round().tolist()) for leaf in drawn}
    assert len(beginnings) == len(drawn)
    assert bool(drawn) == (name != "norm")


@pytest.mark.parametrize("name", NAMES[1:])
def test_backward_survives_channels_last_features_without_gradient(name):
    blueprint = registry.get("cnn", name)
    params = blueprint.init(KEYS, 16, torch.float32)[0]
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in params.flatten_keys(".").items()}
    nested = params.flatten_keys(".").replace(leaves).unflatten_keys(".").to_dict()
    blueprint.apply(nested, features(16).to(memory_format=torch.channels_last)).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())
