"""What `record_step` writes about slots, against the records of the same steps."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict

from engine import tiny_config, tiny_task
from esper.build import build_env
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import random_legal
from esper.events import Event, EventLog
from esper.seeds.stages import Stage
from esper.telemetry import record_step


def test_every_change_of_a_stage_and_every_dropped_seed_is_an_event(tmp_path: Path) -> None:
    with tiny_task():
        config = tiny_config(n_envs=4, max_epochs=12, slots=["early", "mid"], gates="permissive", incubation="none")
        env = build_env(config)
        steps: list[TensorDict] = []
        env.observer = lambda result: steps.append(result.clone())
        env.rollout(12, ScriptedPolicy(random_legal()), break_when_any_done=False)
    # A rollback takes a seed that nothing else happened to.
    still = [
        (r["before", "stage"] == r["lived", "stage"]) & (r["lived", "stage"] == r["after", "stage"]) for r in steps
    ]
    quiet = [same & r["lived", "blueprint"].ge(0) for same, r in zip(still, steps, strict=True)]
    t = next(t for t, seeds in enumerate(quiet) if bool(seeds.any()))
    steps[t]["governor", "dropped"] |= quiet[t]
    written: list[Event] = []
    with EventLog(tmp_path / "run", {}, "off") as log:
        log.listeners.append(written.append)
        for epoch, result in enumerate(steps):
            record_step(log, result, env.spec, 0, epoch)
    moved = 0
    for r in steps:
        asked, clock = (r["outcome", "culled"] | r["outcome", "fossilized"]), r["outcome", "auto_culled"]
        moved += int((r["before", "stage"].ne(r["lived", "stage"]) & ~asked).sum())
        by_itself = r["lived", "stage"].ne(r["after", "stage"]) & ~clock & ~r["governor", "dropped"]
        moved += int((by_itself & ~r["outcome", "culled"]).sum())
    found = [event for event in written if event["type"] == "stage_changed"]
    assert len(found) == moved > 0
    assert {event["data"]["after"] for event in found} >= {Stage.BLENDING.name, Stage.PROBATIONARY.name}
    dropped = sum(int(r["governor", "dropped"].sum()) for r in steps)
    reasons = [event["data"]["reason"] for event in written if event["type"] == "culled"]
    assert reasons.count("rollback") == dropped == int(quiet[t].sum())
    assert torch.equal(torch.tensor([e["step"] for e in written]), torch.arange(len(written)))
