"""Blueprints for transformer hosts: size, shape, what they do when planted, and that none looks ahead."""

import pytest
import torch

from esper import keys as k
from esper.seeds.blueprints import registry

NAMES = ("noop", "norm", "lora", "attention", "mlp")
ZERO_INIT = ("lora", "attention", "mlp")
KEYS = k.host_keys(k.root(0), 2)


def planted(name, d, dtype=torch.float32):
    """The first row of a freshly drawn seed."""
    blueprint = registry.get("transformer", name)
    return blueprint, blueprint.init(KEYS, d, dtype)[0].to_dict()


def grown(name, d):
    """A seed whose every parameter has moved away from its initial value."""
    blueprint, params = planted(name, d, torch.float64)
    leaves, spec = torch.utils._pytree.tree_flatten(params)
    leaves = [
        leaf + 0.3 * k.normal(k.fold(k.root(5), i), *leaf.shape, dtype=leaf.dtype) for i, leaf in enumerate(leaves)
    ]
    return blueprint, torch.utils._pytree.tree_unflatten(leaves, spec)


def features(d, dtype=torch.float64):
    return k.normal(k.root(2), 2, 6, d, dtype=dtype)


def test_the_registered_kinds():
    assert registry.names("transformer")[: len(NAMES)] == NAMES


@pytest.mark.parametrize(
    ("name", "parameters"), [("noop", 0), ("norm", 769), ("lora", 6_144), ("attention", 591_360), ("mlp", 1_181_568)]
)
def test_parameter_counts_at_384_features(name, parameters):
    assert registry.parameter_count(registry.get("transformer", name), 384) == parameters


@pytest.mark.parametrize("d", [64, 384])
@pytest.mark.parametrize("name", NAMES)
def test_features_keep_their_shape(name, d):
    blueprint, params = planted(name, d)
    x = features(d, torch.float32)
    assert blueprint.apply(params, x).shape == x.shape
    assert blueprint.apply(params, x).dtype == x.dtype


@pytest.mark.parametrize("name", ["noop", *ZERO_INIT])
def test_zero_initialised_kinds_start_as_the_identity(name):
    blueprint, params = planted(name, 64)
    x = features(64, torch.float32)
    assert torch.equal(blueprint.apply(params, x), x)


def test_norm_changes_features_at_once():
    blueprint, params = planted("norm", 64)
    x = 3 * features(64, torch.float32)
    expected = x + torch.tanh(torch.tensor(1.0)) * (torch.nn.functional.layer_norm(x, (64,)) - x)
    torch.testing.assert_close(blueprint.apply(params, x), expected)
    assert not torch.allclose(expected, x)


@pytest.mark.parametrize("name", NAMES[1:])
def test_gradients_reach_a_planted_seed_and_then_all_of_it(name):
    def loss(params, x):
        return (blueprint.apply(params, x) * features(64).roll(1)).sum()

    blueprint, params = planted(name, 64, torch.float64)
    gradients = torch.utils._pytree.tree_leaves(torch.func.grad(loss)(params, features(64)))
    assert any(g.abs().sum() > 0 for g in gradients)
    blueprint, params = grown(name, 64)
    gradients = torch.utils._pytree.tree_leaves(torch.func.grad(loss)(params, features(64)))
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_changing_a_token_never_changes_earlier_outputs(name):
    blueprint, params = grown(name, 16)
    x = features(16)
    before = blueprint.apply(params, x)
    for t in range(x.shape[1]):
        changed = x.clone()
        changed[:, t] = changed[:, t].roll(1)
        after = blueprint.apply(params, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_attention_mixes_positions():
    blueprint, params = grown("attention", 16)
    x = features(16)
    changed = x.clone()
    changed[:, 0] += 1.0
    assert ((blueprint.apply(params, changed) - blueprint.apply(params, x))[:, 1:].abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("d", [6, 63, 385])
def test_attention_refuses_features_its_heads_cannot_share(d):
    with pytest.raises(ValueError, match=f"4 heads cannot share {d} channels"):
        registry.get("transformer", "attention").init(KEYS, d, torch.float32)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_seed_is_drawn_from_its_own_key(name):
    blueprint = registry.get("transformer", name)
    both, second = blueprint.init(KEYS, 16, torch.float32), blueprint.init(KEYS[1:], 16, torch.float32)
    assert both.batch_size == torch.Size([2])
    assert (both[1] == second[0]).all()
    drawn = [leaf for leaf in both.values(True, True) if leaf.std() > 0 and leaf[0].numel() > 1]
    assert all(not torch.equal(leaf[0], leaf[1]) for leaf in drawn)
    beginnings = {tuple((leaf[0] / leaf[0].flatten()[0]).flatten()[1:5].mul(1e4).round().tolist()) for leaf in drawn}
    assert len(beginnings) == len(drawn)
    assert bool(drawn) == (name != "norm")


@pytest.mark.parametrize("name", NAMES[1:])
def test_stacked_seeds_equal_one_at_a_time(name):
    blueprint = registry.get("transformer", name)
    params = blueprint.init(KEYS, 16, torch.float64) + 0.1
    x = torch.stack([features(16), features(16).flip(1)])

    def loss(params, x):
        return blueprint.apply(params, x).square().sum()

    step = torch.func.grad(loss)
    stacked = torch.func.vmap(step)(params, x)
    for i in range(2):
        single = step(params[i].to_dict(), x[i])
        torch.utils._pytree.tree_map(
            lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10), stacked[i].to_dict(), single
        )
