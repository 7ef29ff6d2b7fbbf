"""A stack of hosts equals plain `nn.Module`s trained by `torch.optim.SGD`, for every blueprint, blend and stage."""

from __future__ import annotations

import pytest
import torch

from esper import keys as k
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.plan import make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds import bank
from esper.seeds.blueprints import cnn, transformer  # noqa: F401 - registers the blueprints
from esper.seeds.lifecycle import LifecycleRules
from esper.seeds.stages import BLENDS, Stage
from oracle.modules import OracleCNN, OracleNetwork, OracleTransformer, flatten, load_host, load_seed, make_optimisers
from oracle.modules import train_step as oracle_step
from oracle.seeds import OracleSeed

SLOTS = ("early", "mid", "late")
STEPS, BATCH, HOST_LR, SEED_LR = 5, 12, 0.05, 0.03
HOSTS = {
    "cnn": (CNNHost(2, 5, 4), lambda: OracleCNN(2, 5, 4)),
    "transformer": (TransformerHost(31, 16, 4, 3, 8, dropout=0.0), lambda: OracleTransformer(31, 16, 4, 3, 8)),
}
BLUEPRINTS = {
    "cnn": ("norm", "attention", "depthwise", "conv_light", "conv_heavy", "conv_expand"),
    "transformer": ("norm", "lora", "attention", "mlp"),
}
STAGES = {Stage.TRAINING: 0.0, Stage.BLENDING: 0.4, Stage.PROBATIONARY: 1.0, Stage.FOSSILIZED: 1.0}
EXECUTORS = {
    "loop": LoopExecutor,
    "threads": lambda spec: LoopExecutor(spec, workers=2),
    "stacked": lambda spec: StackedExecutor(spec, torch.device("cpu")),
}


def grown(topology: str, incubation: str, blend: str):
    """One host per blueprint and stage, the seed moving through the slots; a last host has seeds in all of them."""
    kinds = BLUEPRINTS[topology]
    rules = LifecycleRules(25, incubation=incubation)
    spec = GrowthSpec(HOSTS[topology][0], SLOTS, kinds, rules)
    cells = [(b, stage) for b in range(len(kinds)) for stage in STAGES]
    n = len(cells) + 1
    lr = torch.full((n,), HOST_LR, dtype=torch.float64)
    growth = fresh_growth(spec, k.host_keys(k.root(3), n), lr, torch.full_like(lr, SEED_LR), torch.float64)
    records = growth["slots"].clone()
    for i in range(n):
        for j in range(len(SLOTS)):
            if i < len(cells) and j != i % len(SLOTS):
                continue
            b, stage = cells[i] if i < len(cells) else (j, list(STAGES)[j])
            records["stage"][i, j], records["blueprint"][i, j] = stage, b
            records["alpha"][i, j], records["blend"][i, j] = STAGES[stage], BLENDS.index(blend)
    growth["slots"] = records
    occupied = records["stage"] > Stage.DORMANT
    growth["seeds"] = bank.plant(growth["seeds"], spec.bank, occupied, records, growth["key"])
    return spec, growth


def oracle(spec: GrowthSpec, growth, i: int, topology: str, incubation: str) -> OracleNetwork:
    records = growth["slots"][i]
    host = HOSTS[topology][1]().double()
    load_host(host, growth["host", "params"], growth["host", "statistics"], i)
    seeds, modes, alphas = {}, {}, {}
    for j, slot in enumerate(SLOTS):
        stage = Stage(int(records["stage"][j]))
        if stage is Stage.DORMANT:
            continue
        name = spec.blueprints[int(records["blueprint"][j])]
        gated = BLENDS[int(records["blend"][j])] == "gated"
        seeds[slot] = OracleSeed(topology, name, spec.sites[j].channels, gated).double()
        load_seed(seeds[slot], spec.bank.open(growth["seeds", "params"])[slot, name], i)
        modes[slot] = incubation if stage is Stage.TRAINING else "blend"
        alphas[slot] = float(records["alpha"][j])
    return OracleNetwork(host, seeds, modes, alphas)


def batches(topology: str, n: int):
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        if topology == "cnn":
            x = torch.randn(n, BATCH, 2, 8, 8, generator=generator, dtype=torch.float64)
            yield x, torch.randint(0, 5, (n, BATCH), generator=generator)
        else:
            tokens = torch.randint(0, 31, (n, BATCH, 9), generator=generator)
            yield tokens[..., :-1], tokens[..., 1:]


def distance(ours: dict, theirs: dict) -> float:
    """Relative L2 distance of all parameters together."""
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name].detach()).square().sum()) for name in ours)
    size = sum(float(theirs[name].detach().square().sum()) for name in ours)
    return (apart / max(size, 1e-300)) ** 0.5


CASES = [
    (topology, incubation, blend, executor)
    for topology in HOSTS
    for incubation in ("straight_through", "shadow", "none")
    for blend in BLENDS
    for executor in ("loop", "stacked")
] + [("cnn", "straight_through", "gated", "threads"), ("transformer", "shadow", "gated", "threads")]


@pytest.mark.parametrize(("topology", "incubation", "blend", "executor"), CASES)
def test_stack_equals_plain_modules(topology: str, incubation: str, blend: str, executor: str) -> None:
    spec, growth = grown(topology, incubation, blend)
    n = growth.batch_size[0]
    networks = [oracle(spec, growth, i, topology, incubation) for i in range(n)]
    optimisers = [make_optimisers(net, HOST_LR, SEED_LR) for net in networks]
    runner = EXECUTORS[executor](spec)
    carry = runner.begin(growth, make_plan(growth["slots"], spec))
    losses = [0.0] * n
    for x, y in batches(topology, n):
        carry = runner.train_step(carry, x, y, growth["rates", "host"], growth["rates", "seed"], growth["key"], True)
        for i, net in enumerate(networks):
            losses[i] += oracle_step(net, optimisers[i], x[i], y[i]) / STEPS
    trained, measured = runner.finish(carry, growth), runner.measured(carry)
    for i, net in enumerate(networks):
        ours = {name: leaf[i] for name, leaf in flatten(trained["host", "params"]).items()}
        assert distance(ours, net.host.leaves()) <= 1e-12
        if net.host.statistics():
            running = {name: leaf[i] for name, leaf in flatten(trained["host", "statistics"]).items()}
            assert distance(running, net.host.statistics()) <= 1e-12
        assert float(measured["loss"][i]) == pytest.approx(losses[i], rel=1e-12)
        for slot, seed in net.seeds.items():
            name = spec.blueprints[int(trained["slots", "blueprint"][i, SLOTS.index(slot)])]
            stacked = flatten(spec.bank.open(trained["seeds", "params"])[slot, name])
            ours = {leaf: value[i] for leaf, value in stacked.items() if leaf in seed.leaves()}
            assert distance(ours, seed.leaves()) <= 1e-12
