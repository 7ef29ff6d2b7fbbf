"""Running a host in pieces gives what running it whole gives."""

import pytest
import torch

from esper import keys as k
from esper.hosts.cnn import CNNHost
from esper.hosts.segments import forward_from_segment, forward_to_segment
from esper.hosts.transformer import TransformerHost

HOSTS = {
    "transformer": TransformerHost(vocab_size=53, n_embd=16, n_head=2, n_layer=6, block_size=8, dropout=0.3),
    "cnn_3": CNNHost(in_channels=3, num_classes=5, base_channels=4),
    "cnn_5": CNNHost(in_channels=3, num_classes=5, base_channels=4, n_blocks=5),
    "cnn_5_pooled_twice": CNNHost(in_channels=3, num_classes=5, base_channels=4, n_blocks=5, pool_layers=2),
}
SHAPES_AT = {
    "transformer": {"early": (2, 8, 16), "mid": (2, 8, 16), "late": (2, 8, 16)},
    "cnn_3": {"early": (2, 4, 16, 16), "mid": (2, 8, 8, 8), "late": (2, 16, 4, 4)},
    "cnn_5": {"early": (2, 4, 16, 16), "mid": (2, 8, 8, 8), "late": (2, 16, 4, 4)},
    "cnn_5_pooled_twice": {"early": (2, 4, 16, 16), "mid": (2, 8, 8, 8), "late": (2, 16, 8, 8)},
}


@pytest.fixture(params=HOSTS)
def name(request):
    return request.param


@pytest.fixture
def case(name):
    """A host, one row of parameters and statistics away from their initial values, and inputs."""
    host = HOSTS[name]
    params, statistics = host.init(k.host_keys(k.root(0), 1), torch.float64)
    shifted = statistics.apply(lambda leaf: leaf + 0.1 + 0.2 * k.uniform(k.root(1), *leaf.shape, dtype=leaf.dtype))
    if host.topology == "cnn":
        x = k.normal(k.root(2), 2, 3, 32, 32, dtype=torch.float64)
    else:
        x = k.integers(k.root(2), 53, 2, 8)
    return host, params[0].to_dict(), shifted[0].to_dict(), x


def whole(host, params, statistics, x, **modes):
    modes.setdefault("momentum", None)
    h = host.embed(params, x, modes.get("key"))
    h, statistics = host.run_blocks(params, statistics, h, 0, host.depth, **modes)
    return host.head(params, h), statistics


def test_features_at_a_boundary_have_the_slots_shape(name, case):
    host, params, statistics, x = case
    for place in host.sites:
        h, _ = forward_to_segment(host, params, statistics, place.name, x)
        assert h.shape == SHAPES_AT[name][place.name]
        assert place.channels == h.shape[1 if host.topology == "cnn" else 2]


@pytest.mark.parametrize("segment", ["early", "mid", "late"])
def test_to_and_from_a_boundary_is_the_whole_network(case, segment):
    host, params, statistics, x = case
    h, _ = forward_to_segment(host, params, statistics, segment, x)
    logits, _ = forward_from_segment(host, params, statistics, segment, h)
    assert torch.equal(logits, whole(host, params, statistics, x)[0])


@pytest.mark.parametrize(("first", "second"), [("early", "mid"), ("early", "late"), ("mid", "late")])
def test_boundaries_chain(case, first, second):
    host, params, statistics, x = case
    h, _ = forward_to_segment(host, params, statistics, first, x)
    chained, _ = forward_to_segment(host, params, statistics, second, h, from_segment=first)
    direct, _ = forward_to_segment(host, params, statistics, second, x)
    assert torch.equal(chained, direct)
    logits, _ = forward_from_segment(host, params, statistics, second, chained)
    assert torch.equal(logits, whole(host, params, statistics, x)[0])


def test_training_in_pieces_moves_the_same_statistics_and_drops_the_same_features(case):
    host, params, statistics, x = case
    modes = {"momentum": 0.1, "key": k.root(7)}
    h, moved = x, statistics
    for before, place in zip((None, "early", "mid"), host.sites, strict=True):
        h, moved = forward_to_segment(host, params, moved, place.name, h, before, **modes)
    logits, moved = forward_from_segment(host, params, moved, "late", h, **modes)
    expected, statistics_expected = whole(host, params, statistics, x, **modes)
    assert torch.equal(logits, expected)
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(moved), leaves(statistics_expected), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(leaves(moved), leaves(statistics), strict=True))


@pytest.mark.parametrize(("start", "stop"), [("mid", "mid"), ("late", "early"), ("late", "mid")])
def test_an_empty_or_backward_range_is_refused(case, start, stop):
    host, params, statistics, x = case
    h, _ = forward_to_segment(host, params, statistics, start, x)
    with pytest.raises(ValueError, match=f"{stop}.*does not lie after.*{start}.*early, mid, late"):
        forward_to_segment(host, params, statistics, stop, h, from_segment=start)


def test_unknown_names_are_refused_with_the_known_ones(case):
    host, params, statistics, x = case
    with pytest.raises(ValueError, match=r"'attic'.*early, mid, late"):
        forward_to_segment(host, params, statistics, "attic", x)
    with pytest.raises(ValueError, match=r"'attic'.*early, mid, late"):
        forward_to_segment(host, params, statistics, "late", x, from_segment="attic")
    with pytest.raises(ValueError, match=r"'attic'.*early, mid, late"):
        forward_from_segment(host, params, statistics, "attic", x)
