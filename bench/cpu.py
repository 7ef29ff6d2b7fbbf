"""How fast hosts grow on a CPU, against a plain loop of modules in the same process.

    python bench/cpu.py                # N = 1, 4, 8, 16; prints a table, writes bench-cpu.json
    python bench/cpu.py --hosts 2 --rounds 1 --images 256

Each line is the median ratio over rounds that alternate between the two, so that a machine that slows down slows
both. "grown" hosts hold a fully blended conv_light seed behind the second block; both sides then also validate
without it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from esper.build import build_controller, build_env
from esper.config import TrainingConfig
from esper.control.policy import RecurrentPolicy
from esper.environment.env import GrowthEnv
from esper.events import EventLog
from esper.learn.collector import BatchFirstCollector
from esper.run import build_learner
from esper.seeds import bank
from esper.seeds.stages import Stage
from esper.telemetry import record_step
from grown import SLOTS, register
from plain import networks, train, validate

TASK = "bench_synthetic"


def make_env(n: int, max_epochs: int) -> GrowthEnv:
    config = TrainingConfig(task=TASK, n_envs=n, max_epochs=max_epochs, slots=list(SLOTS))
    env = build_env(config)
    env.reset()
    return env


def plant(env: GrowthEnv) -> None:
    """Give every host a conv_light seed in the second slot, fully blended."""
    growth = env.growth()[0]
    records = growth["slots"].clone()
    j, b = env.spec.slots.index("mid"), env.spec.blueprints.index("conv_light")
    records["stage"][:, j], records["blueprint"][:, j] = Stage.FOSSILIZED, b
    records["blend"][:, j], records["alpha"][:, j], records["planted"][:, j] = 0, 1.0, 1
    germinated = torch.zeros_like(records["healthy"])
    germinated[:, j] = True
    growth["seeds"] = bank.plant(growth["seeds"], env.spec.bank, germinated, records, growth["key"])
    growth["slots"] = records


def wait(n: int) -> torch.Tensor:
    return torch.zeros(n, 4, dtype=torch.int64)


def ours(env: GrowthEnv) -> float:
    """Seconds of one environment step, observation and reward included."""
    td = env.fake_tensordict()
    td["action"] = wait(env.batch_size[0])
    start = time.perf_counter()
    env._step(td)
    return time.perf_counter() - start


def plain(env: GrowthEnv) -> float:
    """Seconds of the same epoch of the same data in a loop of modules."""
    splits, records = env.backend.shards[0].splits, env.records()
    hosts = networks(env.spec, records, splits.device)
    nets = [net for net, _ in hosts]
    if (records["blueprint"] >= 0).any():
        bare = [net for net, _ in networks(env.spec, torch.full_like(records, -1), splits.device)]
        for net, own in zip(bare, nets, strict=True):
            net.blocks, net.head = own.blocks, own.head
        nets = nets + bare
    start = time.perf_counter()
    train(hosts, splits, env.backend.settings.batch_size)
    validate(nets, splits)
    return time.perf_counter() - start


def compare(n: int, rounds: int, seeded: bool) -> dict[str, float]:
    env = make_env(n, max_epochs=rounds + 1)
    if seeded:
        plant(env)
    pairs = []
    ours(env), plain(env)
    for _ in range(rounds):
        pairs.append((ours(env), plain(env)))
    return {
        "env_epochs_per_second": n / statistics.median(a for a, _ in pairs),
        "plain_env_epochs_per_second": n / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def overhead(n: int, epochs: int) -> float:
    """Share of a rollout with its update that is outside the environment (steps and resets) or writes events."""
    config = TrainingConfig(task=TASK, n_envs=n, max_epochs=epochs, slots=list(SLOTS), n_episodes=n)
    env = build_env(config)
    policy = build_controller(config, env)
    assert isinstance(policy, RecurrentPolicy)
    learner = build_learner(config, policy)
    inside = 0.0

    def timed(call):
        def run(*args, **kwargs):
            nonlocal inside
            start = time.perf_counter()
            result = call(*args, **kwargs)
            inside += time.perf_counter() - start
            return result

        return run

    env.advance, env._reset = timed(env.advance), timed(env._reset)
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder) / "run", {}) as log:
        writing = 0.0

        def observe(result):
            nonlocal writing
            start = time.perf_counter()
            record_step(log, result, env.spec, 0, 0)
            writing += time.perf_counter() - start

        env.observer = observe
        collector = BatchFirstCollector(env, policy, rollouts=1)
        start = time.perf_counter()
        for rollout in collector:
            learner.learn(rollout)
        total = time.perf_counter() - start
        collector.shutdown()
    return 1.0 - (inside - writing) / total


def contended(n: int, rounds: int) -> float:
    """Throughput beside one busy process as a share of the quiet figure, medians of alternating rounds."""
    env = make_env(n, max_epochs=2 * rounds + 1)
    ours(env)
    quiet, busy = [], []
    for _ in range(rounds):
        quiet.append(ours(env))
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        busy.append(ours(env))
        other.kill()
        other.wait()
    return statistics.median(quiet) / statistics.median(busy)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Within the block all threads of this process run on `cores`, and operations use as many threads."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()

    def pin(where: set[int]) -> None:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), where)

    pin(cores)
    torch.set_num_threads(len(cores))
    try:
        yield
    finally:
        pin(before)
        torch.set_num_threads(threads)


def all_over_one(n: int, rounds: int) -> float:
    """Throughput on all cores over that of an environment made for one, medians of alternating rounds."""
    one = {min(os.sched_getaffinity(0))}
    wide = make_env(n, max_epochs=rounds + 1)
    with on_cores(one):
        narrow = make_env(n, max_epochs=rounds + 1)
        ours(narrow)
    ours(wide)
    alone, together = [], []
    for _ in range(rounds):
        together.append(ours(wide))
        with on_cores(one):
            alone.append(ours(narrow))
    return statistics.median(alone) / statistics.median(together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("bench-cpu.json"))
    given = parser.parse_args()
    register(TASK, given.images, given.images // 4, 128)
    rows = []
    for n in given.hosts:
        for seeded in (False, True):
            row = {"hosts": n, "grown": seeded, **compare(n, given.rounds, seeded)}
            rows.append(row)
            print(
                f"N={n:3d} {'grown' if seeded else 'bare ':5s} {row['env_epochs_per_second']:6.2f} env-epochs/s, "
                f"plain loop {row['plain_env_epochs_per_second']:6.2f}, ratio {row['ratio']:.2f}",
                flush=True,
            )
    share = overhead(max(given.hosts), 4)
    print(f"controller, PPO and telemetry: {100 * share:.1f} % of a rollout at N={max(given.hosts)}")
    cores = all_over_one(max(given.hosts), given.rounds)
    print(f"all {len(os.sched_getaffinity(0))} cores: {cores:.2f} times the throughput of one at N={max(given.hosts)}")
    beside = contended(max(given.hosts), given.rounds)
    print(f"beside one busy process: {100 * beside:.0f} % of the quiet throughput")
    given.out.write_text(
        json.dumps(
            {"rows": rows, "overhead": share, "cores": cores, "contended": beside, "torch": torch.__version__}, indent=2
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
