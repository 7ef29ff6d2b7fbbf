"""On a GPU: kernels, the stacked and the captured program against the loop over hosts, and no hidden waiting."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from esper import keys as k
from esper.data.splits import Split, Splits, channel_moments
from esper.growth import precision
from esper.growth.executors.captured import CapturedExecutor
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.plan import make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth, placed
from esper.hosts import ops
from esper.hosts.base import Host
from esper.hosts.cnn import CNNHost
from esper.hosts.padded import PaddedHost
from esper.hosts.transformer import causal_attention
from esper.seeds import bank
from esper.seeds.nursery import Nursery
from esper.values import changed
from growth.test_executors_against_oracle import batches, grown
from tiny import differing, tiny_spec
from waiting import without_waiting

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
EXECUTORS = {
    "stacked": lambda spec: StackedExecutor(spec, CUDA),
    "captured": lambda spec: CapturedExecutor(spec, CUDA),
}


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds float32 convolutions to tf32 unless told otherwise; the plain operators are the reference here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def cast(growth: TensorDict, dtype: torch.dtype) -> TensorDict:
    """A float64 growth state in another precision; learning rates stay."""
    result = growth.apply(lambda t: t.to(dtype) if t.dtype is torch.float64 else t)
    result["rates"] = growth["rates"]
    return result


def flat(tree: TensorDict) -> Tensor:
    found = [leaf.detach().cpu().double().flatten() for leaf in tree.values(True, True)]
    return torch.cat(found) if found else torch.zeros(1)


def outcome(executor, spec: GrowthSpec, growth: TensorDict, topology: str) -> dict[str, Tensor]:
    """Train on a few batches, score two (the second smaller), and return every number."""
    weight = next(iter(growth["host", "params"].values(True, True)))
    dtype, keys = weight.dtype, growth["key"].to(weight.device)
    plan = make_plan(growth["slots"], spec)
    carry = executor.begin(growth, plan)
    rates = growth["rates"]
    for x, y in batches(topology, growth.batch_size[0]):
        x, y = x.to(weight.device), y.to(weight.device)
        x = x.to(dtype) if x.is_floating_point() else x
        carry = executor.train_step(carry, x, y, rates["host"], rates["seed"], keys, True)
    trained = executor.finish(carry, growth)
    scoring = executor.begin_evaluation(trained, plan, x[0])
    scoring = executor.evaluate_step(scoring, x[1], y)
    scoring = executor.evaluate_step(scoring, x[2, :5], y[:, :5])
    scores = executor.finish_evaluation(scoring)
    measured = executor.measured(carry)  # scoring changes nothing of it
    parts = {name: flat(trained["host", name]) for name in ("params", "statistics", "moments")}
    return {
        **parts,
        "seeds": flat(trained["seeds"]),
        "loss": measured["loss"],
        "gradients": torch.cat([measured["host_norm"], measured["seed_norm"].nan_to_num().flatten()]),
        "scores": scores["loss"],
        "correct": scores["correct"],
        "differ": scores["differ"],
    }


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("incubation", ["straight_through", "shadow"])
@pytest.mark.parametrize("blend", ["linear", "gated"])
@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_the_program_equals_the_loop(topology: str, blend: str, incubation: str, executor: str) -> None:
    spec, growth = grown(topology, incubation, blend)
    wanted = outcome(LoopExecutor(spec), spec, growth, topology)
    exact = outcome(EXECUTORS[executor](spec), spec, placed(growth, CUDA), topology)
    single = outcome(EXECUTORS[executor](spec), spec, placed(cast(growth, torch.float32), CUDA), topology)
    for part, value in wanted.items():
        assert apart(exact[part], value) <= 1e-12, part
        if part not in ("correct", "differ"):
            assert apart(single[part], value) <= 1e-5, part


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_mixed_precision_is_finite_and_close(topology: str, amp: str) -> None:
    spec, growth = grown(topology, "straight_through", "gated")
    wanted = outcome(LoopExecutor(spec), spec, growth, topology)
    mixed = GrowthSpec(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, "amp": amp})
    state = cast(growth, torch.float32)
    state.update(precision.fresh_scale(amp, growth.batch_size[0]))
    found = outcome(CapturedExecutor(mixed, CUDA), mixed, placed(state, CUDA), topology)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert apart(found["params"], wanted["params"]) < 6e-2
    assert apart(found["loss"], wanted["loss"]) < 2e-2
    assert bool((found["gradients"][: growth.batch_size[0]] > 0).all())


def test_plans_that_fit_need_no_recording_and_give_the_same_bits() -> None:
    spec, growth = grown("cnn", "straight_through", "linear")
    executor = CapturedExecutor(spec, CUDA)
    state = placed(cast(growth, torch.float32), CUDA)
    first = outcome(executor, spec, state, "cnn")
    recorded = executor.recorded
    fewer = state.clone()
    for name, empty in (("stage", 1), ("blueprint", -1), ("blend", -1), ("alpha", 0)):
        fewer["slots", name][::2] = empty
    between = outcome(executor, spec, fewer, "cnn")
    second = outcome(executor, spec, state, "cnn")
    assert executor.recorded == recorded
    assert all(torch.equal(first[part], second[part]) for part in first)
    alone = outcome(CapturedExecutor(spec, CUDA), spec, fewer, "cnn")
    assert all(apart(between[part], alone[part]) <= 1e-6 for part in alone)


def test_the_bank_changes_alike_on_a_gpu() -> None:
    spec, growth = grown("cnn", "straight_through", "linear")
    held = growth["slots", "blueprint"] >= 0
    planted, removed = held.clone(), held.clone()
    planted[::3], removed[::2] = False, False

    def changes(state: TensorDict, drawn_ahead: bool = False) -> TensorDict:
        keys, nursery = state["key"] + 1, Nursery(spec.bank, state["seeds", "params"].device)
        if drawn_ahead:
            before = changed(state["slots"], planted=state["slots", "planted"] - 1)
            nursery.draw(state["seeds"], before, keys)
        seeds = nursery.plant(state["seeds"], planted, state["slots"], keys)
        return bank.uproot(seeds, spec.bank, removed)

    here, there, ahead = changes(growth), changes(placed(growth, CUDA)), changes(placed(growth, CUDA), True)
    assert not torch.equal(here["params"], growth["seeds", "params"])
    for name, matrix in here.items():
        for on_gpu in (there, ahead):
            assert on_gpu[name].is_cuda
            assert torch.equal(on_gpu[name].cpu(), matrix)


def test_seeds_are_drawn_ahead_without_waiting_for_what_the_gpu_is_doing() -> None:
    """A host's epoch takes longer than drawing; what is planted then is what was drawn."""
    spec, growth = grown("cnn", "straight_through", "linear")
    state, nursery = placed(growth, CUDA), Nursery(spec.bank, CUDA)
    everywhere = torch.ones_like(state["slots", "blueprint"], dtype=torch.bool)
    asked = changed(state["slots"], blueprint=torch.zeros_like(state["slots", "blueprint"]))
    nursery.draw(state["seeds"], changed(asked, planted=asked["planted"] + 1), state["key"])
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    nursery.draw(state["seeds"], changed(asked, planted=asked["planted"] - 1), state["key"])
    assert not busy.query()
    found = nursery.plant(state["seeds"], everywhere, asked, state["key"])
    expected = bank.plant(growth["seeds"], spec.bank, everywhere, asked, growth["key"])
    assert torch.equal(found["params"].cpu(), expected["params"])


@pytest.mark.parametrize("width", [None, (1, 4)])
def test_fresh_hosts_are_the_same_on_a_gpu(width: tuple[int, int] | None) -> None:
    host: Host = CNNHost(1, 10, 4, pool_layers=2)
    spec = tiny_spec(host=host if width is None else PaddedHost(host, width))
    keys, rate = k.host_keys(k.root(3), 5), torch.full((5,), 0.1, dtype=torch.float64)
    here, there = (fresh_growth(spec, keys, rate, rate, device=device) for device in ("cpu", CUDA))
    assert all(leaf.is_cuda for part in ("host", "seeds") for leaf in there[part].values(True, True))
    assert all(leaf.is_cuda for part in ("host", "seeds") for leaf in there["snapshot", part].values(True, True))
    assert differing(there.to("cpu"), here) == []


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_waits_for_the_device_within_an_epoch(executor: str) -> None:
    spec, growth = grown("cnn", "straight_through", "linear")
    state = placed(cast(growth, torch.float32), CUDA)
    runner = EXECUTORS[executor](spec)
    plan = make_plan(state["slots"], spec)
    rates, keys = state["rates"], state["key"].to(CUDA)
    data = [(x.float().to(CUDA), y.to(CUDA)) for x, y in batches("cnn", state.batch_size[0])]
    outcome(runner, spec, state, "cnn")
    other = state.clone()
    other["slots", "alpha"] = other["slots", "alpha"] * 0.5
    carry, calibration = runner.begin(other, plan), data[0][0][0]
    with without_waiting():
        for t, (x, y) in enumerate(data):
            carry = runner.train_step(carry, x, y, rates["host"], rates["seed"], keys, t == len(data) - 1)
        trained = runner.finish(carry, other)
    # Scoring is issued while the device still trains; only the recorded program keeps its layout for that.
    with without_waiting() if executor == "captured" else nullcontext():
        scoring = runner.begin_evaluation(trained, plan, calibration)
    with without_waiting():
        for x, y in data:
            scoring = runner.evaluate_step(scoring, x[0], y)
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    runner.measured(carry)  # waits for what was trained, not for what comes after it
    assert not busy.query()
    runner.finish_evaluation(scoring)


# (K, C, O, H, W, B): convolutions of hosts and seeds of width 8 as they occur; then images, batches and widths that no
# block divides.
CONVOLUTIONS = [
    (3, 3, 8, 32, 32, 16),
    (3, 8, 16, 16, 16, 16),
    (3, 16, 32, 8, 8, 64),
    (3, 8, 8, 16, 16, 16),
    (3, 8, 32, 16, 16, 16),
    (3, 16, 16, 8, 8, 64),
    (3, 16, 64, 8, 8, 64),
    (3, 32, 32, 4, 4, 512),
    (3, 32, 128, 4, 4, 256),
    (1, 8, 8, 16, 16, 16),
    (1, 16, 16, 8, 8, 64),
    (1, 32, 32, 4, 4, 256),
    (3, 1, 8, 28, 28, 5),
    (3, 8, 16, 14, 14, 5),
    (3, 16, 32, 7, 7, 5),
    (3, 1, 1, 8, 8, 3),
    (3, 2, 4, 4, 4, 3),
    (3, 4, 8, 5, 7, 1),
    (3, 6, 7, 9, 3, 4),
    (3, 12, 20, 7, 5, 3),
    (3, 40, 9, 6, 6, 7),
    (3, 64, 256, 8, 8, 8),
    (1, 3, 5, 3, 3, 2),
]
BOUNDS = [(torch.float32, 3e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)]


def check_convolution(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bound: float,
    *,
    depthwise: bool = False,
    shared: bool = False,
    wide: bool = False,
    active: tuple[bool, ...] = (True, True, True),
    tf32: bool = False,
) -> None:
    """A convolution of three hosts and both its gradients against float64, on rows that are active. `shared`: one batch
    for all hosts; `wide`: features in float32, to be rounded on the way."""
    from esper.hosts import kernels

    size, channels, out, height, width, batch = shape
    generator = torch.Generator().manual_seed(5)

    def random(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator).to(CUDA)

    x = random(1 if shared else 3, batch, channels, height, width).to(torch.float32 if wide else dtype)
    x = x.expand(3, *x.shape[1:])
    w = random(3, out, 1 if depthwise else channels, size, size).to(dtype)
    g = random(3, batch, out, height, width).to(dtype)
    flags = None if all(active) else torch.tensor(active, device=CUDA).long()
    y = kernels.conv(x, w, flags, tf32)
    dx = kernels.conv_input_grad(g, w, channels, flags, tf32)
    dw = kernels.conv_weight_grad(x, g, w.shape, flags, tf32)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    for i in (i for i, flag in enumerate(active) if flag):
        features, weight = x[i].to(dtype).double().requires_grad_(), w[i].double().requires_grad_()
        z = F.conv2d(features, weight, padding=size // 2, groups=channels if depthwise else 1)
        exact = torch.autograd.grad(z, (features, weight), g[i].double())
        for name, found, wanted in zip(("y", "dx", "dw"), (y[i], dx[i], dw[i]), (z, *exact), strict=True):
            assert found.shape == wanted.shape
            assert apart(found, wanted) <= (min(bound, 1e-5) if name == "dw" and not tf32 else bound), name


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_convolution_kernels(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    check_convolution(shape, dtype, bound)


@pytest.mark.parametrize("shape", CONVOLUTIONS[::2], ids=str)
def test_convolution_kernels_in_tf32(shape: tuple[int, ...]) -> None:
    check_convolution(shape, torch.float32, 1e-3, tf32=True)


@pytest.mark.parametrize("shape", [(3, 8, 8, 16, 16, 16), (3, 32, 32, 4, 4, 64), (3, 12, 12, 7, 5, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_depthwise_convolution_kernels(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    check_convolution(shape, dtype, bound, depthwise=True)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolution_kernels_of_a_shared_batch_with_rows_left_out(
    depthwise: bool, channels: int, dtype: torch.dtype, bound: float
) -> None:
    shape = (3, channels, channels if depthwise else 16, 7, 9, 6)
    check_convolution(shape, dtype, bound, depthwise=depthwise, shared=True, wide=True)
    check_convolution(shape, dtype, bound, depthwise=depthwise, shared=True, active=(False, True, True))
    check_convolution(shape, dtype, bound, depthwise=depthwise, active=(True, False, True))


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_normalisation_kernels(pool: int, dtype: torch.dtype, bound: float) -> None:
    from esper.hosts import kernels

    generator = torch.Generator().manual_seed(5)
    z = (torch.randn(3, 10, 4, 8, 8, generator=generator) + 3.0).to(dtype).double().requires_grad_()
    weight = (torch.rand(3, 4, generator=generator) + 0.5).double().requires_grad_()
    bias = torch.randn(3, 4, generator=generator).double().requires_grad_()
    normed = [
        F.relu(F.batch_norm(a, None, None, b, c, training=True, eps=1e-5))
        for a, b, c in zip(z, weight, bias, strict=True)
    ]
    wanted = torch.stack([F.max_pool2d(a, pool) for a in normed])
    g = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(dtype).double()
    grads = torch.autograd.grad(wanted, (z, weight, bias), g)
    z_there, w_there, b_there = (
        z.detach().to(CUDA, dtype),
        weight.detach().float().to(CUDA),
        bias.detach().float().to(CUDA),
    )
    statistics, affine = kernels.moments(z_there, w_there, b_there, 1e-5)
    assert apart(statistics[..., 0], z.mean((1, 3, 4))) <= 1e-5
    assert apart(statistics[..., 1], z.var((1, 3, 4), unbiased=False)) <= 1e-5
    assert apart(kernels.activate(z_there, affine, pool), wanted) <= bound
    for found, exact in zip(
        kernels.activate_grad(z_there, affine, statistics, g.to(CUDA, dtype), pool, 1e-5), grads, strict=True
    ):
        assert apart(found, exact) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("relu", [False, True])
def test_group_norm_onto_features(relu: bool, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(5)

    def random(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator).to(CUDA)

    x, onto = random(3, 5, 8, 4, 4).to(dtype), random(3, 5, 8, 4, 4).to(dtype)
    inputs = [x, onto, random(3, 8), random(3, 8)]
    g = random(3, 5, 8, 4, 4)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = torch.func.vmap(lambda x, o, w, b: ops.group_norm(x, 2, w, b, relu=relu, onto=o))(*leaves)
        return [y, *torch.autograd.grad(y, leaves, g.to(y.dtype))]

    wanted = run([t.double() for t in inputs])
    with ops.fused():
        found = run(inputs)
    assert [t.dtype for t in found] == [dtype, dtype, dtype, torch.float32, torch.float32]
    for a, b in zip(found, wanted, strict=True):
        assert apart(a, b) <= bound


@pytest.mark.parametrize("shape", [(5, 8, 16, 16), (3, 2, 7, 9), (4, 3, 1, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_means_over_pixels(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5)).to(CUDA, dtype)
    x[1] = torch.nan
    x.requires_grad_()
    with ops.fused(), ops.active(torch.tensor([1, 0, 1], device=CUDA)):
        found = torch.func.vmap(ops.spatial_mean)(x)
    assert bool((found[1] == 0).all())
    (grad,) = torch.autograd.grad(found, x, torch.ones_like(found))
    assert apart(grad, torch.full_like(grad, 1 / (shape[2] * shape[3]))) <= bound
    for i in (0, 2):
        assert apart(found[i], x[i].double().mean((-2, -1))) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [5, 64, 128, 256])
def test_attention_equals_the_weights_spelled_out(length: int, dtype: torch.dtype, bound: float) -> None:
    qkv = torch.randn(3, 2, length, 96, generator=torch.Generator().manual_seed(5)).to(CUDA, dtype)

    def run(qkv: Tensor) -> tuple[Tensor, Tensor]:
        qkv = qkv.detach().requires_grad_()
        y = torch.func.vmap(lambda t: causal_attention(t, 4))(qkv)
        return y, torch.autograd.grad(y.double().sin().sum(), qkv)[0]

    wanted = run(qkv.double())
    with ops.fused():
        found, again = run(qkv), run(qkv)
    for a, b, c in zip(found, wanted, again, strict=True):
        assert apart(a, b) <= bound
        assert torch.equal(a, c)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 5, 7)], ids=str)
def test_batches_are_picked_alike_on_a_gpu(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (50, *shape), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(50))
    splits = Splits(split, split, split, *channel_moments(images))
    samples = torch.randint(0, 50, (4, 9), generator=generator)
    there = splits.to(CUDA)
    assert torch.equal(
        there.pick(there.train, samples.to(CUDA), torch.float32).cpu(),
        splits.pick(splits.train, samples, torch.float32),
    )


def test_nan_of_one_host_stays_with_it() -> None:
    spec, growth = grown("cnn", "straight_through", "linear")
    state = placed(cast(growth, torch.float32), CUDA)
    sick = state.clone()
    sick["host", "params", "blocks", "0", "conv", "weight"][0] = float("nan")
    executor = CapturedExecutor(spec, CUDA)

    def trained(start: TensorDict) -> TensorDict:
        carry = executor.begin(start, make_plan(start["slots"], spec))
        rates, keys = start["rates"], start["key"].to(CUDA)
        for x, y in batches("cnn", start.batch_size[0]):
            executor.train_step(carry, x.float().to(CUDA), y.to(CUDA), rates["host"], rates["seed"], keys, True)
        return executor.finish(carry, start)

    well, ill = trained(state), trained(sick)
    for a, b in zip(well["host"].values(True, True), ill["host"].values(True, True), strict=True):
        assert torch.equal(a[1:], b[1:])
    assert all(leaf[0].isnan().all() for leaf in ill["host", "params", "head"].values())
