"""Laws of hosts and seeds over many shapes: pieces make the whole, no one looks ahead, planting changes nothing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from esper import keys as k
from esper.hosts.base import Host
from esper.hosts.cnn import CNNHost
from esper.hosts.segments import forward_from_segment, forward_to_segment
from esper.hosts.transformer import TransformerHost
from esper.seeds import blending
from esper.seeds.blueprints import registry

seeds = st.integers(0, 2**31)


@st.composite
def cnn_hosts(draw: st.DrawFn) -> CNNHost:
    n_blocks = draw(st.integers(3, 5))
    return CNNHost(
        draw(st.integers(1, 3)),
        draw(st.integers(2, 5)),
        draw(st.integers(1, 4)),
        n_blocks,
        draw(st.integers(0, n_blocks)),
    )


@st.composite
def transformer_hosts(draw: st.DrawFn) -> TransformerHost:
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 4))
    return TransformerHost(
        draw(st.integers(2, 30)), width, heads, draw(st.integers(3, 7)), 8, draw(st.sampled_from([0.0, 0.3]))
    )


def inputs(host: Host, key: torch.Tensor) -> torch.Tensor:
    if isinstance(host, CNNHost):
        return k.normal(key, 2, host.in_channels, 32, 32)
    return k.integers(key, host.vocab_size, 2, 6)


@given(host=st.one_of(cnn_hosts(), transformer_hosts()), seed=seeds, training=st.booleans())
def test_any_chain_of_segments_is_the_whole_network(host, seed, training):
    key = k.root(seed)
    params, statistics = (tree[0].to_dict() for tree in host.init(k.host_keys(key, 1)))
    modes = {"momentum": 0.1, "key": k.fold(key, 3)} if training else {"momentum": None, "key": None}
    x = inputs(host, k.fold(key, 1))
    h, whole = host.run_blocks(params, statistics, host.embed(params, x, modes["key"]), 0, host.depth, **modes)
    expected = host.head(params, h)
    for chain in (("early",), ("mid",), ("late",), ("early", "late"), ("early", "mid", "late")):
        h, moved, before = x, statistics, None
        for name in chain:
            h, moved = forward_to_segment(host, params, moved, name, h, before, **modes)
            before = name
        logits, moved = forward_from_segment(host, params, moved, chain[-1], h, **modes)
        assert torch.equal(logits, expected)
        leaves = torch.utils._pytree.tree_leaves
        assert all(torch.equal(a, b) for a, b in zip(leaves(moved), leaves(whole), strict=True))


@given(
    name=st.sampled_from(["norm", "lora", "attention", "mlp"]),
    width=st.integers(1, 8),
    length=st.integers(2, 9),
    seed=seeds,
    data=st.data(),
)
def test_no_transformer_seed_looks_ahead(name, width, length, seed, data):
    key = k.root(seed)
    d, t = 4 * width, data.draw(st.integers(0, length - 1))
    keys = k.host_keys(key, 1)
    body = registry.get("transformer", name)
    drawn = body.init(keys, d, torch.float64)
    params = drawn.apply(lambda leaf: leaf + 0.5 * k.normal(k.fold(key, leaf.numel()), *leaf.shape, dtype=leaf.dtype))
    params, gate = params[0].to_dict(), blending.gate_init(keys, d, torch.float64)[0].to_dict()

    def grown(h):
        return blending.blend(h, body.apply(params, h), 0.6 * blending.gate(gate, h))

    x = k.normal(k.fold(key, 1), 2, length, d, dtype=torch.float64)
    changed = x.clone()
    changed[:, t] += k.normal(k.fold(key, 2), 2, d, dtype=torch.float64)
    assert torch.equal(grown(changed)[:, :t], grown(x)[:, :t])
    assert not torch.equal(grown(changed)[:, t], grown(x)[:, t])


@given(name=st.sampled_from(["lora", "attention", "mlp"]), width=st.integers(1, 8), seed=seeds)
def test_a_zero_initialised_seed_is_the_identity_to_the_bit(name, width, seed):
    blueprint = registry.get("transformer", name)
    params = blueprint.init(k.host_keys(k.root(seed), 1), 4 * width, torch.float32)[0].to_dict()
    x = 10 * k.normal(k.fold(k.root(seed), 1), 2, 5, 4 * width)
    assert torch.equal(blueprint.apply(params, x), x)


@given(
    name=st.sampled_from(["norm", "attention", "depthwise", "conv_light", "conv_heavy", "conv_expand"]),
    channels=st.integers(1, 40),
    size=st.integers(1, 6),
    seed=seeds,
)
def test_cnn_seeds_keep_the_shape_and_stay_finite(name, channels, size, seed):
    blueprint = registry.get("cnn", name)
    params = blueprint.init(k.host_keys(k.root(seed), 1), channels, torch.float32)[0].to_dict()
    x = k.normal(k.fold(k.root(seed), 1), 2, channels, size, size)
    y = blueprint.apply(params, x)
    assert y.shape == x.shape
    assert y.isfinite().all()
