"""The package's parts against the oracle's, in double precision; and the oracle against the rules it stands for."""

import copy

import pytest
import torch
import torch.nn.functional as F

from esper import keys as k
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds import blending
from esper.seeds.blueprints import registry
from oracle.modules import (
    OracleCNN,
    OracleNetwork,
    OracleTransformer,
    load_host,
    load_seed,
    make_optimisers,
    train_step,
)
from oracle.seeds import KINDS, OracleSeed

KEYS = k.host_keys(k.root(0), 2)
PAIRS = {
    "cnn_3": (CNNHost(3, 5, 4), lambda: OracleCNN(3, 5, 4)),
    "cnn_5": (CNNHost(1, 5, 2, n_blocks=5), lambda: OracleCNN(1, 5, 2, n_blocks=5)),
    "cnn_5_pooled_twice": (CNNHost(3, 5, 2, 5, pool_layers=2), lambda: OracleCNN(3, 5, 2, 5, pool_layers=2)),
    "transformer": (TransformerHost(37, 16, 2, 6, 8, dropout=0.0), lambda: OracleTransformer(37, 16, 2, 6, 8)),
    "transformer_4": (TransformerHost(37, 16, 4, 4, 8, dropout=0.0), lambda: OracleTransformer(37, 16, 4, 4, 8)),
}
KIND_NAMES = [(topology, name) for topology, kinds in KINDS.items() for name in kinds]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def moved(tree, seed):
    """A TensorDict whose every leaf has moved away from its initial value."""
    leaves = iter(range(1000))
    return tree.apply(
        lambda leaf: leaf + 0.2 * k.uniform(k.fold(k.root(seed), next(leaves)), *leaf.shape, dtype=leaf.dtype)
    )


def data(host, size=4):
    if host.topology == "cnn":
        x = k.normal(k.root(2), size, host.in_channels, 32, 32, dtype=torch.float64)
        return x, k.integers(k.root(3), host.num_classes, size)
    return k.integers(k.root(2), host.vocab_size, size, 8), k.integers(k.root(3), host.vocab_size, size, 8)


def features(topology, c, seed=2):
    shape = (3, c, 5, 5) if topology == "cnn" else (3, 6, c)
    return k.normal(k.root(seed), *shape, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_hosts_agree_in_value_gradient_and_statistics(name, training):
    host, build = PAIRS[name]
    params, statistics = host.init(KEYS, torch.float64)
    params, statistics = moved(params, 1), moved(statistics, 2)
    oracle = build().double().train(training)
    load_host(oracle, params, statistics, i=1)
    x, y = data(host)

    def loss(params):
        h, after = host.run_blocks(
            params, statistics[1].to_dict(), host.embed(params, x), 0, host.depth, momentum=0.1 if training else None
        )
        logits = host.head(params, h)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten()), (logits, after)

    gradients, (_, (logits, after)) = torch.func.grad_and_value(loss, has_aux=True)(params[1].to_dict())
    network = OracleNetwork(oracle).train(training)
    close(logits, network(x))
    load_host(oracle, params, statistics, i=1)
    network.loss(x, y).backward()
    flat = flat_names(gradients)
    assert flat.keys() == oracle.leaves().keys()
    for leaf_name, leaf in oracle.leaves().items():
        close(flat[leaf_name], leaf.grad)
    for leaf_name, leaf in oracle.statistics().items():
        close(flat_names(after)[leaf_name], leaf)


def flat_names(tree, prefix=""):
    flat = {}
    for name, value in tree.items():
        flat |= {prefix + name: value} if isinstance(value, torch.Tensor) else flat_names(value, f"{prefix}{name}.")
    return flat


def seed_pair(topology, name, c, gated=False):
    """A moved seed of the package, `{body, gate}` with two rows, and the oracle's seed holding its second row."""
    body = registry.get(topology, name).init(KEYS, c, torch.float64)
    gate = blending.gate_init(k.fold(KEYS, 1), c, torch.float64)
    params = {"body": moved(body, 3), "gate": moved(gate, 4)}
    oracle = OracleSeed(topology, name, c, gated).double()
    load_seed(oracle, params, i=1)
    return {part: tree[1].to_dict() for part, tree in params.items()}, oracle


def test_the_oracle_knows_every_kind_that_can_be_offered():
    for topology in KINDS:
        assert {"noop", *KINDS[topology]} == set(registry.names(topology))


@pytest.mark.parametrize("c", [8, 32])
@pytest.mark.parametrize(("topology", "name"), KIND_NAMES)
def test_blueprints_agree_in_value_and_gradient(topology, name, c):
    params, oracle = seed_pair(topology, name, c)
    x, direction = features(topology, c), features(topology, c, seed=8)
    apply = registry.get(topology, name).apply

    def value(body, x):
        return (apply(body, x) * direction).sum()

    close(apply(params["body"], x), oracle(x))
    by_params, by_x = torch.func.grad(value, argnums=(0, 1))(params["body"], x)
    x = x.requires_grad_()
    (oracle(x) * direction).sum().backward()
    close(by_x, x.grad)
    for leaf_name, leaf in oracle.body.named.items():
        close(flat_names(by_params)[leaf_name], leaf.grad)


@pytest.mark.parametrize("c", [2, 16])
@pytest.mark.parametrize("topology", KINDS)
def test_gates_agree(topology, c):
    params, oracle = seed_pair(topology, "norm", c, gated=True)
    x = features(topology, c) + 1.0
    gate = blending.gate(params["gate"], x)
    close(0.3 * gate, oracle.share(0.3, x))
    assert gate.shape == ((3, 1, 1, 1) if topology == "cnn" else (3, 6, 1))
    assert gate.std() > 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("topology", "name"), [("cnn", "conv_light"), ("transformer", "attention")])
def test_blends_agree_in_value_and_gradient(topology, name, gated):
    c, alpha = 8, 0.4
    params, oracle = seed_pair(topology, name, c, gated)
    h, direction = features(topology, c), features(topology, c, seed=8)
    apply = registry.get(topology, name).apply

    def blended(params, h):
        weight = torch.tensor(alpha, dtype=torch.float64)
        if gated:
            weight = weight * blending.gate(params["gate"], h)
        return blending.blend(h, apply(params["body"], h), weight)

    network = OracleNetwork(small_host(topology), {"mid": oracle}, {"mid": "blend"}, {"mid": alpha})
    expected = network._graft("mid", h, insert_shadows=False)
    close(blended(params, h), expected)
    gradients = flat_names(torch.func.grad(lambda p: (blended(p, h) * direction).sum())(params))
    (expected * direction).sum().backward()
    for leaf_name, leaf in oracle.leaves().items():
        close(gradients[leaf_name], leaf.grad)


def test_straight_through_agrees_in_value_and_gradient():
    params, oracle = seed_pair("cnn", "conv_light", 8)
    h, direction = features("cnn", 8), features("cnn", 8, seed=8)
    apply = registry.get("cnn", "conv_light").apply

    def value(body, h):
        return (blending.straight_through(h, apply(body, h.detach())) * direction).sum()

    by_params, by_h = torch.func.grad(value, argnums=(0, 1))(params["body"], h)
    network = OracleNetwork(small_host("cnn"), {"mid": oracle}, {"mid": "straight_through"})
    h = h.requires_grad_()
    out = network._graft("mid", h, insert_shadows=False)
    (out * direction).sum().backward()
    assert torch.equal(out, h)
    close(by_h, h.grad)
    for leaf_name, leaf in oracle.body.named.items():
        close(flat_names(by_params)[leaf_name], leaf.grad)


def test_loading_refuses_what_does_not_fit():
    host, build = PAIRS["cnn_3"]
    params, _ = host.init(KEYS)
    wrong_depth = OracleCNN(3, 5, 4, n_blocks=4)
    with pytest.raises(ValueError, match=r"blocks\.3\.conv\.weight"):
        load_host(wrong_depth, params)
    with pytest.raises(ValueError, match="does not fit"):
        load_host(OracleCNN(3, 5, 8), params)
    load_host(build(), params, i=1)


def small_host(topology):
    torch.manual_seed(0)
    host = OracleCNN(3, 5, 4) if topology == "cnn" else OracleTransformer(37, 16, 2, 3, 8)
    return host.double()


def small_data(topology, size=8):
    return data(PAIRS["cnn_3" if topology == "cnn" else "transformer"][0], size)


def grown(topology, mode, alpha=0.0, gated=False, slots=("early", "late")):
    host = small_host(topology)
    widths = {"early": 4, "mid": 8, "late": 16} if topology == "cnn" else dict.fromkeys(("early", "mid", "late"), 16)
    name = "conv_light" if topology == "cnn" else "norm"
    seeds = {slot: OracleSeed(topology, name, widths[slot], gated).double() for slot in slots}
    return OracleNetwork(host, seeds, dict.fromkeys(slots, mode), dict.fromkeys(slots, alpha))


def trained(network, topology, steps=3):
    x, y = small_data(topology)
    optimisers = make_optimisers(network, host_lr=0.05, seed_lr=0.05)
    losses = [train_step(network, optimisers, x, y) for _ in range(steps)]
    return losses, copy.deepcopy(network.host.state_dict()), copy.deepcopy(network.seeds.state_dict())


@pytest.mark.parametrize("mode", ["straight_through", "shadow", "none", "off"])
@pytest.mark.parametrize("topology", KINDS)
def test_an_incubating_seed_leaves_its_host_alone(topology, mode):
    bare_losses, bare, _ = trained(OracleNetwork(small_host(topology)), topology)
    network = grown(topology, mode)
    before = copy.deepcopy(network.seeds.state_dict())
    losses, host, seeds = trained(network, topology)
    assert losses == bare_losses
    for name, leaf in bare.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(host[name], leaf), name
    learnt = {name for name, leaf in seeds.items() if not torch.equal(leaf, before[name])}
    assert learnt == (set(seeds) if mode in ("straight_through", "shadow") else set())


@pytest.mark.parametrize("topology", KINDS)
def test_shadow_and_straight_through_teach_differently(topology):
    torch.manual_seed(0)
    shadow = grown(topology, "shadow", slots=("mid",))
    twin = copy.deepcopy(shadow)
    twin.modes["mid"] = "straight_through"
    x, y = small_data(topology)
    for network in (shadow, twin):
        train_step(network, make_optimisers(network, 0.05, 0.05), x, y)
    assert not torch.allclose(shadow.seeds["mid"].body.named["weight"], twin.seeds["mid"].body.named["weight"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("topology", KINDS)
def test_shadow_gradient_is_that_of_the_fully_inserted_seed(topology, gated):
    network = grown(topology, "shadow", gated=gated)
    inserted = copy.deepcopy(network)
    inserted.modes, inserted.alphas = dict.fromkeys(network.modes, "blend"), dict.fromkeys(network.alphas, 1.0)
    x, y = small_data(topology)
    statistics = {name: leaf.clone() for name, leaf in network.host.statistics().items()}
    network.train()
    network.shadow_loss(x, y).backward()
    assert all(torch.equal(leaf, statistics[name]) for name, leaf in network.host.statistics().items())
    inserted.train()
    inserted.loss(x, y).backward()
    for slot, seed in network.seeds.items():
        expected = inserted.seeds[slot].leaves()
        for name, leaf in seed.leaves().items():
            assert torch.equal(leaf.grad, expected[name].grad)
            assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("topology", KINDS)
def test_blending_ends_at_the_host_and_at_the_seed(topology):
    x, _ = small_data(topology)
    network = grown(topology, "blend", alpha=0.0)
    close(network(x), OracleNetwork(network.host)(x))
    full = OracleNetwork(network.host, dict(network.seeds), dict.fromkeys(network.modes, "blend"), {"early": 1.0})
    seed_first = network.host.block(0, network.host.begin(x))
    close(full._graft("early", seed_first, False), network.seeds["early"](seed_first))
    assert not torch.allclose(full(x), network(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("topology", KINDS)
def test_a_blended_seed_and_its_host_learn_together(topology, gated):
    network = grown(topology, "blend", alpha=0.5, gated=gated)
    before = copy.deepcopy(network.state_dict())
    losses, _, _ = trained(network, topology, steps=15)
    assert losses[-1] < 0.8 * losses[0]
    after = network.state_dict()
    assert all(not torch.equal(after[name], leaf) for name, leaf in before.items())


def test_a_gated_sequence_never_looks_ahead():
    network = grown("transformer", "blend", alpha=0.7, gated=True).eval()
    x, _ = small_data("transformer")
    before = network(x)
    for t in range(x.shape[1]):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        assert torch.equal(network(changed)[:, :t], before[:, :t])
        assert not torch.equal(network(changed)[:, t:], before[:, t:])
