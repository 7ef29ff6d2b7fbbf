"""A grown network outlives its run: as an ordinary module, and as the host of another run."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict

import esper.exported
from engine import run as whole_run
from engine import tiny_task
from esper import keys as k
from esper.build import build_env
from esper.config import TrainingConfig
from esper.export import accuracy, as_module, export_run, main, write
from esper.exported import load_exported
from esper.growth.executors.loop import LoopExecutor
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.forward import forward
from esper.growth.grown import grown_start
from esper.growth.plan import Mode, SlotPlan, make_plan
from esper.growth.spec import GrowthSpec
from esper.growth.state import fresh_growth
from esper.growth.step import act
from esper.growth.trees import as_tree
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds.actions import Op
from esper.seeds.blueprints import registry
from esper.seeds.blueprints.registry import Blueprint
from esper.seeds.lifecycle import LifecycleRules, put
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import Stage
from esper.values import changed
from tiny import CPU, Run, action, differing, flat, germinate, images, tiny_spec

CNN_KINDS = ("norm", "attention", "depthwise", "conv_light", "conv_heavy", "conv_expand")
TRANSFORMER_KINDS = ("norm", "lora", "attention", "mlp")
LINEAR, SIGMOID, GATED = range(3)


def spec_of(topology, **changes):
    rules = LifecycleRules(25, strict_gates=False)
    if topology == "cnn":
        host, kinds = CNNHost(2, 5, 4, n_blocks=4, pool_layers=3), CNN_KINDS
    else:
        host, kinds = TransformerHost(17, 16, 4, 4, 9, dropout=0.1), TRANSFORMER_KINDS
    return replace(GrowthSpec(host, LAYOUT, kinds, rules), **changes)


def inputs(spec, dtype=torch.float64):
    if spec.host.topology == "cnn":
        return k.normal(k.root(8), 6, 2, 16, 16, dtype=dtype)
    return k.integers(k.root(8), 17, 6, 7)


def grown(spec, held, dtype=torch.float64):
    """One host in which `held` maps slots to (blueprint, blend, stage), all parameters and statistics stirred."""
    rate = torch.full((1,), 0.1)
    growth = fresh_growth(spec, k.host_keys(k.root(4), 1), rate, rate, dtype).exclude("snapshot")
    for slot, (kind, blend, _) in held.items():
        growth, _ = act(spec, growth, action(1, {0: (Op.GERMINATE, slot, kind, blend)}), torch.zeros(1))
    stage, alpha = growth["slots", "stage"].clone(), growth["slots", "alpha"].clone()
    for slot, (_, _, name) in held.items():
        stage[0, slot], alpha[0, slot] = name, 0.5 if name == Stage.BLENDING else 1.0
    slots = put(growth["slots"], torch.ones(1, len(LAYOUT), dtype=torch.bool), stage=stage, alpha=alpha)

    def stir(leaf):
        return leaf + 0.3 * k.uniform(k.fold(k.root(5), leaf.numel()), *leaf.shape, dtype=leaf.dtype)

    host = growth["host"].apply(stir, filter_empty=False)
    return changed(growth, slots=slots, host=host, seeds=growth["seeds"].apply(stir))


def logits(spec, growth, x, calibration=None):
    """What host and fossils say, by the growth's own forward."""
    fossils = growth["slots", "stage"][0] == Stage.FOSSILIZED
    plan = [entry if kept else None for entry, kept in zip(make_plan(growth["slots"], spec)[0], fossils, strict=True)]
    seeds = [
        entry and spec.bank.kinds[slot, entry.blueprint].open(growth["seeds", "params"][0])
        for slot, entry in zip(spec.slots, plan, strict=True)
    ]
    params, statistics = as_tree(growth["host", "params"][0]), as_tree(growth["host", "statistics"][0])
    alpha = growth["slots", "alpha"][0].to(torch.float64)
    if calibration is not None:
        _, statistics = forward(spec, plan, params, statistics, seeds, alpha, calibration, momentum=1.0)
    return forward(spec, plan, params, statistics, seeds, alpha, x, momentum=None)[0]


def stored(folder, *exported):
    write(folder, *exported)
    return load_exported(folder)


@pytest.mark.parametrize(
    ("topology", "kind"),
    [("cnn", name) for name in CNN_KINDS] + [("transformer", name) for name in TRANSFORMER_KINDS],
)
def test_every_blueprint_and_blend_says_the_same_as_an_ordinary_module(tmp_path, topology, kind):
    spec = spec_of(topology)
    index = spec.blueprints.index(kind)
    fossils = {slot: (index, blend, Stage.FOSSILIZED) for slot, blend in enumerate((LINEAR, GATED, SIGMOID))}
    growth, x = grown(spec, fossils), inputs(spec)
    network = stored(tmp_path, *as_module(spec, growth, 0))
    expected = logits(spec, growth, x)
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, logits(spec, grown(spec, {}), x)), "the fossils are felt"
    gates = [graft.gate is not None for graft in network.grafts]
    assert gates == [False, True, False]


def test_only_fossils_are_exported(tmp_path):
    spec = spec_of("cnn")
    stages = (Stage.FOSSILIZED, Stage.BLENDING, Stage.PROBATIONARY)
    growth = grown(spec, {slot: (slot, LINEAR, stage) for slot, stage in enumerate(stages)})
    architecture, network = as_module(spec, growth, 0)
    assert [(g["slot"], g["after"], g["blueprint"]) for g in architecture["grafts"]] == [("early", 1, "norm")]
    x = inputs(spec)
    torch.testing.assert_close(network(x), logits(spec, growth, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coalition_statistics", ["recalibrated", "running"])
def test_the_module_is_as_good_as_the_run_reported(tmp_path, coalition_statistics):
    spec = tiny_spec(coalition_statistics=coalition_statistics)
    splits = images(n_train=64, n_validation=300)
    run = Run(spec, splits=splits)
    run.step({1: germinate(1)})
    run.ripen(1, 1)
    run.step({1: (Op.FOSSILIZE, 1), 2: germinate(0)})
    run.step()
    metrics = run.step()["metrics"]
    for host in range(run.n):
        network = stored(tmp_path / str(host), *as_module(spec, run.growth, host, run.shards[0].calibration))
        reported = metrics["coalitions"][host, 0b010 if host == 1 else 0]
        assert accuracy(network, splits) == pytest.approx(reported.item(), abs=1e-4)
    assert len(network.grafts) == 0
    assert metrics["val_accuracy"][1] != metrics["coalitions"][1, 0], "the fossil counts"


def test_reading_needs_nothing_of_the_package(tmp_path):
    spec = spec_of("transformer")
    growth = grown(spec, {0: (3, GATED, Stage.FOSSILIZED)}, torch.float32)
    architecture, network = as_module(spec, growth, 0)
    write(tmp_path / "grown", architecture, network)
    shutil.copy(esper.exported.__file__, tmp_path / "reader.py")
    program = (
        "import sys, torch; from reader import load_exported; n = load_exported('grown');"
        "print(n(torch.arange(7)[None] % 17)[0, -1, 0].item(), any(m.startswith('esper') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    value, polluted = done.stdout.split()
    assert polluted == "False"
    assert float(value) == pytest.approx(network(torch.arange(7)[None] % 17)[0, -1, 0].item(), rel=1e-6)


def swish(params, x):
    return x + F.silu(params["inner"]["scale"] * x)


def swish_init(keys, channels, dtype):
    return TensorDict({"inner": {"scale": torch.ones(*keys.shape, 1, dtype=dtype)}}, batch_size=keys.shape)


@pytest.fixture
def own_blueprint(request):
    registry.register(Blueprint("swish", "cnn", swish_init, request.param, "for this test"))
    yield
    registry.unregister("cnn", "swish")


@pytest.mark.parametrize("own_blueprint", [swish], indirect=True)
def test_a_blueprint_of_ones_own_is_run_by_its_own_apply(tmp_path, own_blueprint):
    spec = spec_of("cnn", blueprints=("norm", "swish"))
    growth, x = grown(spec, {1: (1, LINEAR, Stage.FOSSILIZED)}), inputs(spec)
    architecture, network = as_module(spec, growth, 0)
    foreign = architecture["grafts"][0]["foreign"]
    assert foreign == {"apply": f"{__name__}:swish", "shapes": {"inner": {"scale": [1]}}}
    torch.testing.assert_close(stored(tmp_path, architecture, network)(x), logits(spec, growth, x))


@pytest.mark.parametrize("own_blueprint", [lambda params, x: x], indirect=True)
def test_an_apply_without_a_name_cannot_be_exported(own_blueprint):
    spec = spec_of("cnn", blueprints=("swish",))
    with pytest.raises(ValueError, match=r"blueprint 'swish': .*<lambda> must be a function that can be imported"):
        as_module(spec, grown(spec, {1: (0, LINEAR, Stage.FOSSILIZED)}), 0)


def test_hosts_of_someone_elses_kind_have_no_module():
    class Odd(CNNHost):
        pass

    spec = spec_of("cnn")
    with pytest.raises(TypeError, match="host: Odd; must be a CNNHost"):
        as_module(replace(spec, host=Odd(2, 5, 4, 4, 3)), grown(spec, {}), 0)


def test_another_format_is_refused(tmp_path):
    architecture, network = as_module(spec_of("cnn"), grown(spec_of("cnn"), {}), 0)
    write(tmp_path, {**architecture, "format": 2}, network)
    with pytest.raises(ValueError, match="must be of format 1"):
        load_exported(tmp_path)
    with pytest.raises(ValueError, match="format: 2; must be 1"):
        grown_start(tmp_path)


@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_a_grown_host_starts_a_new_run_where_the_old_one_ended(tmp_path, topology):
    spec, x = spec_of(topology), inputs(spec_of(topology))
    growth = grown(spec, {0: (0, GATED, Stage.FOSSILIZED), 2: (1, LINEAR, Stage.FOSSILIZED)})
    write(tmp_path, *as_module(spec, growth, 0))
    again = replace(spec, host=grown_start(tmp_path))
    extra = sum(growth["slots", "parameters"][0].tolist())
    assert again.host_parameters == spec.host_parameters + extra
    rate = torch.full((3,), 0.1)
    start = fresh_growth(again, k.host_keys(k.root(9), 3), rate, rate, torch.float64)
    assert (start["slots", "stage"] == Stage.DORMANT).all(), "all slots are free again"
    torch.testing.assert_close(logits(again, start, x), logits(spec, growth, x), rtol=0, atol=0)
    assert not differing(start["host"][0], start["host"][2])


def test_a_grown_host_grows_again_and_is_exported_again(tmp_path):
    first = tiny_spec()
    run = Run(first)
    run.step({i: germinate(i, blueprint=i, blend=GATED if i == 1 else LINEAR) for i in range(3)})
    for host in range(3):
        run.ripen(host, host)
    run.step({i: (Op.FOSSILIZE, i) for i in range(3)})
    write(tmp_path / "first", *as_module(first, run.growth, 1, run.shards[0].calibration))

    second = tiny_spec(host=grown_start(tmp_path / "first"))
    run = Run(second)
    before = flat(run.growth)["host", "params", "grafts", "0", "body", "weight"].clone()
    run.step({0: germinate(1), 1: germinate(0)})
    after = run.growth["host", "params", "grafts", "0", "body", "weight"]
    assert (after != before).flatten(1).any(1).all(), "fossils built into a host go on training"
    for host, slot in ((0, 1), (1, 0)):
        run.ripen(host, slot)
    metrics = run.step({0: (Op.FOSSILIZE, 1), 1: (Op.FOSSILIZE, 0)})["metrics"]
    for host, places in ((0, [2, 2]), (1, [2, 1]), (2, [2])):
        architecture, network = as_module(second, run.growth, host, run.shards[0].calibration)
        assert [graft["after"] for graft in architecture["grafts"]] == places
        measured = accuracy(stored(tmp_path / f"second{host}", architecture, network), run.splits)
        assert measured == pytest.approx(metrics["val_accuracy"][host].item(), abs=1e-4)
    third = tiny_spec(host=grown_start(tmp_path / "second0"))
    assert len(third.host.fossils) == 2


def test_every_executor_runs_a_grown_host(tmp_path):
    spec = tiny_spec()
    write(tmp_path, *as_module(spec, Run(spec).growth, 0))
    grown_spec = tiny_spec(host=grown_start(tmp_path))
    asked = {0: germinate(0), 1: germinate(2, blend=GATED)}
    results = [
        Run(grown_spec, executor=executor).step(asked)["metrics"]
        for executor in (LoopExecutor(grown_spec), StackedExecutor(grown_spec, CPU))
    ]
    torch.testing.assert_close(results[0]["val_loss"], results[1]["val_loss"], rtol=1e-4, atol=1e-5)


def test_fossils_enter_the_forward_as_blended_seeds_at_full_alpha():
    spec = spec_of("cnn")
    growth = grown(spec, {0: (0, GATED, Stage.FOSSILIZED)})
    assert make_plan(growth["slots"], spec)[0][0] == SlotPlan("norm", Mode.BLEND, gated=True)


def test_the_command_line_exports_the_best_host_of_a_run(tmp_path, capsys):
    with tiny_task():
        summary, events = whole_run(tmp_path / "run", controller="never", n_envs=2, n_episodes=2, max_epochs=3)
        last = {e["host"]: e["data"]["validation_accuracy"] for e in events if e["type"] == "epoch" and e["epoch"] == 3}
        assert main([str(tmp_path / "run"), "--out", str(tmp_path / "best")]) == 0
        assert main([str(tmp_path / "run"), "--out", str(tmp_path / "first"), "--host", "0"]) == 0
        for folder, expected in (("best", max(last.values())), ("first", last[0])):
            told = json.loads((tmp_path / folder / "architecture.json").read_text())
            assert told["about"]["validation_accuracy"] == pytest.approx(expected, abs=1e-4)
            assert told["about"]["parameters"] == summary["host_parameters"]
            assert len(told["input"]["mean"]) == 1
        assert "validation accuracy" in capsys.readouterr().out

        refused = {
            "must be new or empty": ["run", "--out", "best"],
            "host: 2: must be 0 to 1": ["run", "--out", "new", "--host", "2"],
            "must have a checkpoint from the end of an episode": ["best", "--out", "new"],
        }
        for message, (run, flag, out, *rest) in refused.items():
            assert main([str(tmp_path / run), flag, str(tmp_path / out), *rest]) == 2
            assert message in capsys.readouterr().err
            assert not (tmp_path / "new").exists()


def test_the_accuracy_of_a_host_is_by_its_own_names_for_classes(tmp_path):
    family = {"classes": [2, 2], "width": [1, 2]}
    fields = {"n_envs": 2, "n_episodes": 2, "max_epochs": 2, "controller": "never", "slots": ["mid"], "family": family}
    with tiny_task():
        _, events = whole_run(tmp_path / "run", **fields)
        for host in range(2):
            about = export_run(tmp_path / "run", tmp_path / f"out{host}", host)
            reported = [e["data"]["validation_accuracy"] for e in events if e["type"] == "epoch" and e["host"] == host]
            assert about["validation_accuracy"] == pytest.approx(reported[-1], abs=1e-4)


def test_a_run_starts_from_an_exported_network_that_fits_its_task(tmp_path):
    spec = spec_of("cnn")
    write(tmp_path, *as_module(spec, grown(spec, {}), 0))
    with pytest.raises(ValueError, match=r"start_from: .* hosts of task digits need \{'in_channels': 1"):
        build_env(TrainingConfig(task="digits", start_from=str(tmp_path)))
    fitting = tmp_path / "digits"
    first = tiny_spec()
    run = Run(first, n=1)
    write(fitting, *as_module(first, run.growth, 0, run.shards[0].calibration))
    env = build_env(TrainingConfig(task="digits", start_from=str(fitting), n_envs=2))
    env.reset()
    ours, theirs = env.growth()[0]["host", "params", "base"], run.growth["host", "params"]
    assert not differing(ours[1], theirs[0])
