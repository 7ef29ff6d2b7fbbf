"""The transformer host: size, initial scale, slots, causality, keyed dropout, and its behaviour under vmap and grad."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from esper import keys as k
from esper.hosts import transformer
from esper.hosts.transformer import TransformerHost, causal_attention, dropout

SMALL = TransformerHost(vocab_size=97, n_embd=32, n_head=4, n_layer=3, block_size=12, dropout=0.2)


def tokens(*shape, vocabulary=97, seed=1):
    return k.integers(k.fold(k.root(seed), 5), vocabulary, *shape)


def logits(host, params, x, key=None):
    h = host.embed(params, x, key)
    h, _ = host.run_blocks(params, {}, h, 0, host.depth, momentum=None, key=key)
    return host.head(params, h)


def loss(host, params, x, y, key=None):
    return F.cross_entropy(logits(host, params, x, key).flatten(0, -2), y.flatten())


def row(params, i):
    return params[i].to_dict()


def test_size_of_the_language_model_preset():
    with FakeTensorMode():
        host = TransformerHost(vocab_size=50257, n_embd=384, n_head=6, n_layer=6, block_size=256)
        params, _ = host.init(torch.zeros(1, dtype=torch.int64))
        assert sum(leaf.numel() for leaf in params.values(True, True)) == 30_044_544


@pytest.mark.parametrize(("vocabulary", "n_embd"), [(512, 64), (2000, 128)])
def test_first_loss_is_that_of_a_uniform_guess(vocabulary, n_embd):
    host = TransformerHost(vocabulary, n_embd, n_head=4, n_layer=6, block_size=32)
    params, _ = host.init(k.host_keys(k.root(0), 2))
    x, y = tokens(8, 32, vocabulary=vocabulary), tokens(8, 32, vocabulary=vocabulary, seed=2)
    for i in range(2):
        assert loss(host, row(params, i), x, y).item() == pytest.approx(math.log(vocabulary), rel=0.03)


def test_initial_scales():
    host = TransformerHost(512, 64, n_head=4, n_layer=6, block_size=64)
    params, statistics = host.init(k.host_keys(k.root(0), 1))
    block = params["blocks", "5"]
    residual = 0.02 / math.sqrt(12)
    for leaf, std in (
        (params["embedding", "token"], 0.02),
        (params["embedding", "position"], 0.02),
        (block["attention", "qkv", "weight"], 0.02),
        (block["attention", "out", "weight"], residual),
        (block["mlp", "up", "weight"], 0.02),
        (block["mlp", "down", "weight"], residual),
    ):
        assert leaf.std().item() == pytest.approx(std, rel=0.05)
        assert leaf.mean().item() == pytest.approx(0.0, abs=std / 10)
    assert not any(block[*where, "bias"].any() for where in (("attention", "qkv"), ("mlp", "down"), ("mlp_norm",)))
    assert (params["norm", "weight"] == 1).all()
    assert list(statistics.keys()) == []


def test_a_host_starts_the_same_whatever_stands_beside_it():
    keys = k.host_keys(k.root(3), 3)
    three, statistics = SMALL.init(keys)
    one, _ = SMALL.init(keys[1:2])
    assert three.batch_size == statistics.batch_size == torch.Size([3])
    assert (three[1] == one[0]).all()
    assert not torch.equal(three["embedding", "token"][0], three["embedding", "token"][1])
    assert not torch.equal(three["blocks", "0", "mlp", "up", "weight"], three["blocks", "1", "mlp", "up", "weight"])


def test_no_two_leaves_share_their_draws():
    params, _ = SMALL.init(k.host_keys(k.root(3), 2))
    drawn = [leaf for leaf in params.values(True, True) if leaf[0].std() > 0]
    beginnings = {tuple((leaf[0] / leaf[0].flatten()[0]).flatten()[1:5].mul(1e4).round().tolist()) for leaf in drawn}
    assert len(drawn) == len(beginnings) == 2 + 4 * SMALL.n_layer


def test_double_precision_starts_from_the_same_draws():
    keys = k.host_keys(k.root(3), 2)
    wide, _ = SMALL.init(keys, torch.float64)
    narrow, _ = SMALL.init(keys)
    assert (wide.to(torch.float32) == narrow).all()


@pytest.mark.parametrize(("n_layer", "boundaries"), [(3, (1, 2, 3)), (4, (1, 2, 4)), (6, (2, 4, 6)), (8, (2, 4, 8))])
def test_slots_lie_at_thirds(n_layer, boundaries):
    host = TransformerHost(97, 32, n_head=4, n_layer=n_layer, block_size=12)
    assert tuple((s.name, s.boundary, s.channels) for s in host.sites) == tuple(
        zip(("early", "mid", "late"), boundaries, (32, 32, 32), strict=True)
    )
    assert host.depth == n_layer
    assert host.topology == "transformer"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 2}, ("n_layer", "2", "3")),
        ({"n_head": 5}, ("n_head", "5", "32")),
        ({"n_head": 0}, ("n_head", "0", "32")),
        ({"dropout": 1.0}, ("dropout", "1.0")),
        ({"dropout": -0.1}, ("dropout", "-0.1")),
    ],
)
def test_illegal_shapes_are_refused(change, named):
    legal = {"vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": 3, "block_size": 12}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the words are checked below
        TransformerHost(**{**legal, **change})
    assert all(word in str(refusal.value) for word in named)


def test_a_sequence_longer_than_the_block_is_refused():
    params, _ = SMALL.init(k.host_keys(k.root(0), 1))
    with pytest.raises(ValueError, match=r"13.*block_size = 12"):
        SMALL.embed(row(params, 0), tokens(2, 13))
    assert logits(SMALL, row(params, 0), tokens(2, 5)).shape == (2, 5, 97)


def test_a_position_sees_itself_and_its_past_only():
    params, _ = SMALL.init(k.host_keys(k.root(0), 1), torch.float64)
    # Large weights, so that a leak cannot hide below the comparison's resolution.
    params = (params * 4).to_dict()
    params = torch.utils._pytree.tree_map(lambda leaf: leaf[0], params)
    x = tokens(2, 12)
    before = logits(SMALL, params, x)
    for t in range(12):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 97
        after = logits(SMALL, params, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert ((after[:, t:] - before[:, t:]).abs().amax(dim=-1) > 1e-9).all()


def test_attention_equals_torchs_own():
    qkv = k.normal(k.root(4), 2, 7, 48, dtype=torch.float64)
    q, keys, v = (part.reshape(2, 7, 4, 4).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    expected = F.scaled_dot_product_attention(q, keys, v, is_causal=True).transpose(1, 2).reshape(2, 7, 16)
    torch.testing.assert_close(causal_attention(qkv, 4), expected, rtol=0, atol=1e-14)


def test_stacked_gradients_equal_one_host_at_a_time():
    keys = k.host_keys(k.root(0), 3)
    params, _ = SMALL.init(keys, torch.float64)
    x, y = tokens(3, 4, 12), tokens(3, 4, 12, seed=2)
    step = torch.func.grad_and_value(lambda p, x, y, key: loss(SMALL, p, x, y, key))
    grads, values = torch.func.vmap(step)(params, x, y, keys)
    for i in range(3):
        grad, value = step(row(params, i), x[i], y[i], keys[i])
        torch.testing.assert_close(values[i], value, rtol=0, atol=1e-12)
        torch.utils._pytree.tree_map(
            lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12), grads[i].to_dict(), grad
        )
        assert all(leaf.abs().sum() > 0 for leaf in torch.utils._pytree.tree_leaves(grad))


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    h = torch.ones(200, 500)
    dropped = dropout(h, 0.1, k.root(0))
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert (dropped == 0).double().mean().item() == pytest.approx(0.1, abs=0.004)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.005)
    assert dropout(h, 0.1, None) is h


def test_dropout_follows_its_key_alone():
    keys = k.host_keys(k.root(0), 3)
    params, _ = SMALL.init(keys)
    x = tokens(2, 12)
    one = row(params, 1)
    assert torch.equal(logits(SMALL, one, x, keys[1]), logits(SMALL, one, x, keys[1]))
    assert not torch.equal(logits(SMALL, one, x, keys[1]), logits(SMALL, one, x, keys[2]))
    assert not torch.equal(logits(SMALL, one, x, keys[1]), logits(SMALL, one, x))
    together = torch.func.vmap(lambda p, key: logits(SMALL, p, x, key))(params, keys)
    torch.testing.assert_close(together[1], logits(SMALL, one, x, keys[1]), rtol=0, atol=1e-6)


def test_every_dropout_of_the_network_has_its_own_key(monkeypatch):
    used = []

    def record(h, rate, key):
        used.append((h.dim(), key.item()))
        return h

    monkeypatch.setattr(transformer, "dropout", record)
    params, _ = SMALL.init(k.host_keys(k.root(0), 1))
    logits(SMALL, row(params, 0), tokens(2, 12), k.root(9))
    assert [dims for dims, _ in used] == [3] + [4, 3, 3] * SMALL.n_layer
    assert len({key for _, key in used}) == len(used)


def test_evaluation_ignores_the_dropout_rate():
    still = TransformerHost(97, 32, 4, 3, 12, dropout=0.0)
    params, _ = SMALL.init(k.host_keys(k.root(0), 1))
    x = tokens(2, 12)
    assert torch.equal(logits(SMALL, row(params, 0), x), logits(still, row(params, 0), x))
    assert torch.equal(logits(still, row(params, 0), x, k.root(1)), logits(still, row(params, 0), x))
