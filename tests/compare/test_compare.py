"""A whole comparison on few samples, and what makes it fair: the same hosts for every arm, none of them seen before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgb
from tensordict import TensorDict

from engine import run, tiny_config, tiny_task
from esper import keys as k
from esper.build import build_controller, build_env
from esper.checkpoint.store import find
from esper.compare import arms, bench
from esper.compare.__main__ import main
from esper.compare.bench import Bench, Row
from esper.compare.config import CompareConfig
from esper.compare.picture import pictures
from esper.compare.play import Role, accuracy_on_test, costs_of, play
from esper.compare.table import summarise
from esper.compare.widen import size, widened
from esper.config import ConfigError
from esper.config_fields import Family
from esper.control.policy import RecurrentPolicy
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import never_grow, patient_schedule, random_legal
from esper.data.family import draws
from esper.errors import InputError
from esper.events import load
from esper.growth.flops import FLOPS, TRAINING
from esper.growth.plan import Mode, SlotPlan
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.keys import Purpose
from esper.learn.responses import Aim
from esper.plots import EMPTY, STAGE_COLOURS
from esper.seeds.stages import Stage

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "compare" / "smoke.json"
GRID = {"kind": "schedule", "grid": {"slots": ["mid"], "blueprints": ["conv_light", "norm"]}}
ROWS = ["never", "random", "heuristic", "schedule", "ppo-greedy", "ppo-sampled", "static-final", "static-equal"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str]]:
    """The smoke comparison, and how often each environment's test split was read."""
    out = tmp_path_factory.mktemp("compare") / "out"
    reads: Counter[str] = Counter()

    def counted(env):
        reads[f"{id(env)}"] += 1
        return accuracy_on_test(env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "accuracy_on_test", counted)
        assert main(["--config", str(SMOKE), "--out", str(out)]) == 0
    return out, reads


@pytest.fixture(scope="module")
def found(smoke: tuple[Path, Counter[str]]) -> dict[str, Any]:
    return json.loads((smoke[0] / "compare.json").read_text())


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in found["arms"]}


def test_every_arm_has_its_row(smoke, found) -> None:
    out, reads = smoke
    assert [entry["name"] for entry in found["arms"]] == ROWS
    assert sum(reads.values()) == len(ROWS)
    for entry in found["arms"]:
        assert all(len(values) == 2 for values in entry["seeds"].values())
        for name in ("objective", "validation", "test"):
            assert entry[name]["low"] <= entry[name]["mean"] <= entry[name]["high"]
            assert entry[name]["mean"] == pytest.approx(sum(entry["seeds"][name]) / 2)
    table = [line for line in (out / "compare.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ROWS
    for name in ("compare", "lifecycles", "responses"):
        assert all((out / f"{name}.{kind}").stat().st_size > 0 for kind in ("png", "svg"))
    assert f"--config {SMOKE}" in found["command"]
    assert {"python", "torch", "esper"} <= found["versions"].keys()
    assert CompareConfig.from_dict(found["config"]) == CompareConfig.from_json_path(SMOKE)


def row_of(course: list[list[float]], spent: list[list[int]], chosen: dict[str, Any]) -> Row:
    values = dict.fromkeys(("validation", "test", "objective", "parameters", "training", "evaluation"), torch.ones(2))
    stages = torch.zeros(2, 3, 1, dtype=torch.int64)
    return Row(
        chosen.get("name", "static"),
        **values,
        records=TensorDict(),
        chosen=chosen,
        search=0,
        learning=0,
        stages=stages,
        course=torch.tensor(course),
        spent=torch.tensor(spent),
        aimed={},
    )


def test_what_it_took_to_reach_the_static_network() -> None:
    grown = row_of([[1.0, 5.0, 9.0], [1.0, 7.0, 9.0]], [[10, 20, 60], [10, 40, 60]], {"name": "grown"})
    static = row_of([[0.0, 0.0, 4.0], [0.0, 0.0, 8.0]], [[20, 40, 60]] * 2, {"of": "grown"})
    better = row_of([[0.0, 0.0, 9.5]] * 2, [[20, 40, 60]] * 2, {"of": "grown", "name": "better"})
    found = summarise([grown, static, better], k.root(0))
    assert found[1]["reached"] == {"epochs": 2, "flops_share": 0.5}
    assert found[2]["reached"] is None
    assert found[0]["course"] == {"validation": [1.0, 6.0, 9.0], "training": [10.0, 30.0, 60.0]}


def test_the_course_ends_where_the_row_does(found) -> None:
    for entry in found["arms"]:
        assert entry["course"]["validation"][-1] == pytest.approx(entry["validation"]["mean"])
        assert entry["course"]["training"][-1] == pytest.approx(entry["flops"]["training"])
    statics = [entry for entry in found["arms"] if "of" in entry["chosen"]]
    assert statics
    assert all("reached" in entry for entry in statics)


def test_differences_are_paired_with_never(found) -> None:
    rows = by_name(found)
    assert "difference" not in rows["never"]
    for name in ROWS[1:]:
        gaps = [a - b for a, b in zip(rows[name]["seeds"]["test"], rows["never"]["seeds"]["test"], strict=True)]
        assert rows[name]["difference"]["test"]["mean"] == pytest.approx(sum(gaps) / 2)


def test_the_objective_prices_whatever_is_beyond_the_plain_host(found) -> None:
    host = found["host_parameters"]
    for entry in found["arms"]:
        seeds = entry["seeds"]
        for value, accuracy, size_ in zip(seeds["objective"], seeds["validation"], seeds["parameters"], strict=True):
            assert value == pytest.approx(accuracy - 0.1 * 100 * (size_ - host) / (4 * host), abs=1e-4)
    assert by_name(found)["static-equal"]["parameters"] > host


def test_what_was_chosen_is_the_best_of_what_was_tried(found) -> None:
    rows = by_name(found)
    rates = rows["never"]["chosen"]
    assert rates["tried"][str(rates["host_lr"])] == max(rates["tried"].values())
    schedule = rows["schedule"]["chosen"]
    assert len(schedule["tried"]) == 4
    assert schedule["objective"] == max(point["objective"] for point in schedule["tried"])


def test_operations_of_the_search_are_reported_apart(found) -> None:
    rows = by_name(found)
    for name in ("random", "heuristic", "static-final"):
        assert rows[name]["search_flops"] == {"hosts": 0, "controller": 0}
    never = rows["never"]["flops"]
    # Two rates, on two tuning hosts each, cost what two evaluation hosts cost, twice.
    assert rows["never"]["search_flops"]["hosts"] == 2 * 2 * (never["training"] + never["evaluation"])
    ppo = rows["ppo-greedy"]["search_flops"]
    assert ppo["hosts"] >= 4 * (never["training"] + never["evaluation"])
    assert ppo["controller"] > 0


def test_learned_rows_say_how_they_respond_to_contributions(smoke, found) -> None:
    table = (smoke[0] / "compare.md").read_text()
    for entry in found["arms"]:
        assert ("responses" in entry) == entry["name"].startswith("ppo")
        for op, row in entry.get("responses", {}).items():
            assert op in ("CULL", "FOSSILIZE")
            assert (row["count"] > 0) == (row["means"] != {})
            assert f"{op} {'none' if row['rank_correlation'] is None else ''}" in table


def test_the_final_architecture_is_that_of_the_row_it_names(found) -> None:
    rows = by_name(found)
    grown = rows["schedule"]["seeds"]["parameters"]
    assert min(grown) > found["host_parameters"]
    assert rows["static-final"]["seeds"]["parameters"] == grown
    assert rows["static-equal"]["parameters"] >= sum(grown) / 2


def host_keys(role: int, episodes: int = 1, n: int = 50) -> set[int]:
    root = k.fold(k.root(7), Purpose.EPISODE)
    return {int(key) for e in range(episodes) for key in k.host_keys(k.fold(root, role + e), n)}


def test_roles_never_share_a_host() -> None:
    groups = [host_keys(Role.TRAINING, 40), host_keys(Role.TUNING), host_keys(Role.EVALUATION)]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert Role.TRAINING + 10**9 <= Role.TUNING < Role.EVALUATION


def test_an_environment_plays_the_hosts_of_a_role_again_and_again() -> None:
    with tiny_task():
        env = build_env(tiny_config(seed=7, n_envs=3, max_epochs=3))
        first = play(env, ScriptedPolicy(never_grow()), Role.EVALUATION)
        seen = {int(key) for key in env.finished_growth()[0]["key"]}
        assert seen == {int(key) for key in k.host_keys(k.fold(k.root(7), Purpose.EPISODE, Role.EVALUATION), 3)}
        tuning = play(env, ScriptedPolicy(random_legal()), Role.TUNING)
        again = play(env, ScriptedPolicy(never_grow()), Role.EVALUATION)
        faster = play(env, ScriptedPolicy(never_grow()), Role.EVALUATION, host_lr=0.01)
    assert torch.equal(first.accuracy, again.accuracy)
    assert first.flops == again.flops < tuning.flops
    assert not torch.equal(first.accuracy, faster.accuracy)


def test_arms_meet_the_same_draws_and_the_report_has_them(tmp_path: Path) -> None:
    """The rate that is tuned is the base on which every host's factor acts."""
    data = {**comparison(points=True), "seeds": 3, "tuning_seeds": 2}
    data["arms"][0]["host_lrs"] = [0.2]
    family = {"train_fraction": [0.2, 1.0], "host_lr_factor": [0.5, 2.0], "width": [1, 2, 4]}
    data["training"]["incubation"] = "none"
    data["arms"].append({"kind": "static-final", "of": "schedule"})
    data["training"] |= {"task": "tiny", "family": family, "max_epochs": 2}
    (tmp_path / "compare.json").write_text(json.dumps(data))
    with tiny_task():
        assert main(["--config", str(tmp_path / "compare.json"), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    hosts = report["hosts"]
    keys = k.host_keys(k.fold(k.root(42), Purpose.EPISODE, Role.EVALUATION), 3)
    expected = draws(Family.model_validate_json(json.dumps(family)), keys)
    assert hosts["train_fraction"] == expected["train_fraction"].tolist()
    assert hosts["host_lr"] == pytest.approx((0.2 * expected["host_lr_factor"]).tolist())
    assert len(set(hosts["host_parameters"])) > 1
    for entry in report["arms"]:
        seeds, own = entry["seeds"], hosts["host_parameters"]
        for i, (size_, accuracy) in enumerate(zip(seeds["parameters"], seeds["validation"], strict=True)):
            assert (size_ > own[i]) == (entry["name"] != "never")
            assert seeds["objective"][i] == pytest.approx(accuracy - 10 * (size_ - own[i]) / (4 * own[i]), abs=1e-4)
    ordered = [
        report["arms"][0]["seeds"]["training"][i] for i in sorted(range(3), key=hosts["host_parameters"].__getitem__)
    ]
    assert ordered == sorted(ordered)


def test_a_grown_architecture_trains_from_the_first_epoch() -> None:
    with tiny_task():
        env = build_env(tiny_config(n_envs=2, max_epochs=4, incubation="none", blueprints=["conv_light", "norm"]))
        steps = CompareConfig.from_dict(comparison(points=True)).arms[1].points[0]
        grown = play(env, ScriptedPolicy(patient_schedule(steps, env.spec.blueprints, 4)), Role.EVALUATION)
        static = play(env, ScriptedPolicy(never_grow()), Role.EVALUATION, grown=grown.records)
        mid = env.spec.slots.index("mid")
        assert (static.records["stage"][:, mid] == Stage.FOSSILIZED).all()
        assert torch.equal(static.parameters, grown.parameters)
        cost = costs_of(env)
        entry = SlotPlan("conv_light", Mode.BLEND)
        assert static.training.tolist() == [4 * cost.training((None, entry, None))] * 2
        assert static.evaluation.tolist() == [5 * cost.evaluation((None, entry, None))] * 2
        assert static.training[0] == 4 * FLOPS * TRAINING * cost.forward((None, entry, None)) * 32
        assert accuracy_on_test(env).shape == (2,)


def test_a_wider_host_has_at_least_the_parameters_asked_for() -> None:
    for host, name in ((CNNHost(1, 10, 2), "base_channels"), (TransformerHost(16, 12, 6, 3, 8), "n_embd")):
        assert widened(host, size(host)) == (host, getattr(host, name))
        wide, width = widened(host, size(host) + 1)
        assert width == getattr(wide, name) > getattr(host, name)
        assert size(wide) > size(host)
    with pytest.raises(InputError, match="only a CNNHost"):
        widened(object(), 1)  # type: ignore[arg-type]


SWEEP = [
    [("germinate", "late", "conv_light", 0), ("fossilize", "late", None, 0)],
    [("germinate", "late", "norm", 0), ("germinate", "mid", "norm", 0), ("cull", "late", None, 2)],
    [("germinate", "early", "conv_light", 1)],
    [("germinate", "mid", "conv_light", 0), ("fossilize", "mid", None, 0)],
    [("germinate", "late", "norm", 2)],
]


def test_what_is_tried_side_by_side_is_what_it_would_be_alone(tmp_path: Path) -> None:
    """Schedules and rates, in portions of three and two or one by one: the same scores and operations, to the bit."""
    names = ("op", "slot", "blueprint", "epoch")
    points = [[{n: v for n, v in zip(names, s, strict=True) if v is not None} for s in point] for point in SWEEP]
    never = {"kind": "never", "host_lrs": [0.05, 0.1, 0.2]}
    found = []
    with tiny_task():
        training = tiny_config(max_epochs=4, incubation="none", blueprints=["conv_light", "norm"]).to_dict()
        fields = ("task", "slots", "blueprints", "max_epochs", "gates", "incubation", "seed")
        for at_once in (7, 2):
            config = comparison(
                training={name: training[name] for name in fields},
                tuning_seeds=2,
                hosts_at_once=at_once,
                arms=[never, {"kind": "schedule", "points": points}],
            )
            judged = Bench(CompareConfig.from_dict(config), tmp_path, lambda text: None)
            list(arms.run_arms(judged))
            found.append([(row.chosen, row.search, row.objective.tolist()) for row in judged.rows.values()])
    assert found[0] == found[1]
    assert len({point["objective"] for point in found[0][1][0]["tried"]}) == len(SWEEP)


def test_the_operations_of_a_training_include_its_twins(tmp_path: Path) -> None:
    """One rollout of two hosts: with twins it costs what two hosts cost that never grow, less the first scoring."""
    fields = ("task", "slots", "max_epochs", "gates", "incubation", "lstm_hidden_dim")
    with tiny_task():
        training = tiny_config(max_epochs=3, incubation="none").to_dict()
        kinds = {"plain": {}, "twin": {"reward_baseline": "twin"}, "narrow": {"use_telemetry": False}}
        learners = [
            {"kind": "ppo", "name": name, "episodes": 2, "hosts": 2, "learning": how} for name, how in kinds.items()
        ]
        config = comparison(training={name: training[name] for name in fields}, arms=[{"kind": "never"}, *learners])
        judged = Bench(CompareConfig.from_dict(config), tmp_path, lambda text: None)
        list(arms.run_arms(judged))
        costs, alone = costs_of(judged.judge), (None, None, None)
        epoch = costs.training(alone) + costs.evaluation(alone)
    search = {name: judged.rows[f"{name}-greedy"].search for name in kinds}
    assert search["twin"] - search["plain"] == 2 * 3 * epoch
    widths = {name: json.loads((tmp_path / name / "config.json").read_text())["use_telemetry"] for name in kinds}
    assert widths == {"plain": True, "twin": True, "narrow": False}


def test_a_controller_may_imitate_the_schedule_that_was_chosen(tmp_path: Path) -> None:
    """Its first rollout is the schedule's, and what it cost to find that counts."""
    learner = {"kind": "ppo", "episodes": 4, "hosts": 2}
    taught = {**learner, "name": "taught", "imitates": "schedule", "learning": {"imitation_rollouts": 1}}
    with tiny_task():
        training = {"task": "tiny", "slots": ["early", "mid"], "max_epochs": 3, "gates": "permissive"}
        config = comparison(training=training, arms=[{"kind": "never"}, GRID, taught, learner])
        judged = Bench(CompareConfig.from_dict(config), tmp_path, lambda text: None)
        list(arms.run_arms(judged))
    (planted, _) = judged.rows["schedule"].chosen["steps"]
    events = [e for e in load(tmp_path / "taught") if e["type"] == "germinated" and e["episode"] == 0]
    assert [(e["epoch"], e["slot"], e["data"]["blueprint"]) for e in events] == [
        (planted["epoch"], planted["slot"], planted["blueprint"])
    ] * 2
    search = {name: judged.rows[name].search for name in ("schedule", "taught-greedy")}
    spent = json.loads((tmp_path / "taught" / "flops.jsonl").read_text().splitlines()[-1])["flops"]
    assert search["taught-greedy"] > spent + search["schedule"] > search["schedule"] > 0


def test_a_stopped_comparison_goes_on_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is interrupted in the middle of its second rollout of three; resumed, every number is as if nothing
    had happened, what the training cost included."""
    file, add = tmp_path / "compare.json", arms.Spent.add
    learner = {"kind": "ppo", "episodes": 6, "hosts": 2, "learning": {"reward_baseline": "twin"}}
    training = {"task": "digits", "slots": ["mid"], "max_epochs": 2, "train_samples": 128, "checkpoint_every": 1}
    given = comparison(
        training=training, arms=[{"kind": "never"}, learner, {"kind": "static-final", "of": "ppo-greedy"}]
    )
    file.write_text(json.dumps(given))
    flags = {name: ["--config", str(file), "--out", str(tmp_path / name)] for name in ("whole", "stopped")}

    def interrupted(spent: arms.Spent, result: TensorDict) -> None:
        add(spent, result)
        if spent.step == 4:
            raise KeyboardInterrupt

    assert main(flags["whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(arms.Spent, "add", interrupted)
        assert main(flags["stopped"]) == 130
    with (tmp_path / "stopped" / "ppo" / "flops.jsonl").open("a") as lines:
        lines.write('{"step": 5, "fl')  # killed as it wrote
    assert find(tmp_path / "stopped" / "ppo", tmp_path / "stopped" / "ppo")[1].step == 3
    assert main(flags["stopped"]) == 2  # only --resume may write there again
    assert main([*flags["stopped"], "--resume"]) == 0
    whole, stopped = (json.loads((tmp_path / name / "compare.json").read_text()) for name in flags)
    for entry in (*whole["arms"], *stopped["arms"]):
        entry["chosen"].pop("run", None)
    assert stopped["arms"] == whole["arms"]
    assert all(cost > 0 for cost in whole["arms"][1]["search_flops"].values())
    file.write_text(json.dumps({**given, "seeds": 3}))
    assert main([*flags["stopped"], "--resume"]) == 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    assert main(["--config", str(file), "--out", str(tmp_path / "thesis"), "--resume"]) == 2


def test_a_controller_is_trained_and_judged_with_its_own_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`contribution_scale` of a `ppo` arm reaches observations and responses, in training and on fresh hosts."""
    seen = []

    def noted(name: str):
        def note(policy, rollout, scale: float) -> dict[str, Any]:
            seen.append((name, scale))
            return {}

        return note

    monkeypatch.setattr(bench, "aimed", noted("judged"))
    monkeypatch.setattr("esper.learn.learner.responses", noted("trained"))
    played, play_ = [], bench.play

    def play_and_note(env, *arguments, **fields):
        played.append(env.settings.observation.contribution_scale)
        return play_(env, *arguments, **fields)

    monkeypatch.setattr(bench, "play", play_and_note)
    learner = {"kind": "ppo", "episodes": 2, "hosts": 2, "learning": {"contribution_scale": 50.0}}
    training = {"task": "digits", "slots": ["mid"], "max_epochs": 2, "train_samples": 128}
    given = comparison(training=training, arms=[{"kind": "never"}, learner, {"kind": "heuristic"}])
    list(arms.run_arms(Bench(CompareConfig.from_dict(given), tmp_path, print)))
    assert seen == [("trained", 50.0), ("judged", 50.0), ("judged", 50.0)]
    assert played == [10.0, 50.0, 50.0, 10.0]


def test_portions_are_even_and_in_order(tmp_path: Path) -> None:
    judged = Bench(CompareConfig.from_dict(comparison(tuning_seeds=3, hosts_at_once=10)), tmp_path, print)
    assert judged.portions(range(8)) == [range(2), range(2, 5), range(5, 8)]
    assert judged.portions(range(3)) == [range(3)]
    assert judged.portions([]) == []


def test_pictures_show_the_stages_and_the_responses() -> None:
    stages = torch.full((2, 5, 3), int(Stage.DORMANT))
    stages[1, 2:, 0] = Stage.BLENDING
    stages[1, 4, 0] = Stage.FOSSILIZED
    aimed = {
        "CULL": Aim(
            torch.tensor([-2.0, 0.5, 1.0, 2.0]),
            torch.tensor([0.9, 0.1, 0.2, 0.3]),
            torch.tensor([False, False, True, True]),
        ),
        "FOSSILIZE": Aim(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool)),
    }
    values = dict.fromkeys(("validation", "test", "objective", "parameters", "training", "evaluation"), torch.ones(2))
    course = torch.zeros(2, 5)
    rows = [
        Row(
            name,
            **values,
            records=TensorDict(),
            chosen={},
            search=0,
            learning=0,
            stages=s,
            course=course,
            spent=course,
            aimed=a,
        )
        for name, s, a in (("never", torch.ones_like(stages), {}), ("ppo-greedy", stages, aimed))
    ]
    summary = summarise(rows, k.root(0))
    nothing = {"rank_correlation": None, "count": 0}
    cull = summary[1]["responses"]["CULL"]
    assert (cull["rank_correlation"], cull["count"]) == (pytest.approx(-0.2), 4)
    assert cull["probation"] == {"rank_correlation": pytest.approx(1.0), "count": 2}
    assert summary[1]["responses"]["FOSSILIZE"] == {**nothing, "probation": nothing, "means": {}}
    found = pictures(rows, summary)
    assert list(found) == ["compare", "lifecycles", "responses"]
    (panel,) = found["lifecycles"].axes
    image = panel.images[0].get_array()
    assert image.shape == (2 * 4, 5, 3)
    grey, blending, fossil = (to_rgb(c) for c in (EMPTY, STAGE_COLOURS["BLENDING"], STAGE_COLOURS["FOSSILIZED"]))
    assert [tuple(pixel) for pixel in image[4]] == [grey, grey, blending, blending, fossil]
    assert bool((image[3] == 1).all())
    (panel,) = found["responses"].axes
    assert next(line.get_ydata() for line in panel.lines) == pytest.approx([0.9, 0.1, 0.25])
    assert list(pictures(rows[:1], summary[:1])) == ["compare"]


def comparison(points: bool = False, **changes: Any) -> dict[str, Any]:
    training = {"task": "digits", "slots": ["early", "mid", "late"], "max_epochs": 4}
    steps = [{"epoch": 0, "op": "germinate", "slot": "mid", "blueprint": "conv_light"}]
    more = [{"kind": "schedule", "points": [steps]}] if points else []
    return {"training": training, "seeds": 2, "arms": [{"kind": "never"}, *more], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "seeds: 1"),
        (
            {
                "training": {"task": "digits", "family": {"width": [2, 4]}},
                "arms": [{"kind": "never"}, {"kind": "static-equal", "of": "never"}],
            },
            "no one host to widen where family.width draws",
        ),
        ({"speed": 1}, "speed: 1"),
        ({"training": {"task": "digits", "n_envs": 4}}, "training.n_envs: 4: is decided by the arms"),
        ({"training": {"task": "nothing"}}, 'training.task: "nothing"'),
        ({"training": {"task": "digits", "collector": {"backend": "ray"}}}, "training.collector.backend: 'ray'"),
        ({"arms": [{"kind": "random"}]}, "never must come first"),
        ({"arms": [{"kind": "never"}, {"kind": "never", "name": "x"}]}, "never must come first"),
        ({"arms": [{"kind": "never"}, {"kind": "random", "name": "never"}]}, "is taken by an arm before it"),
        ({"arms": [{"kind": "never"}, {"kind": "static-final", "of": "ppo"}]}, "must be a row before it: never"),
        ({"arms": [{"kind": "never"}, {"kind": "schedule"}]}, "points or grid is needed"),
        ({"arms": [{"kind": "never"}, {"kind": "schedule", "grid": {"mixed": True}}]}, "use false"),
        ({"arms": [{"kind": "never"}, {"kind": "schedule", "grid": {"epochs": [4]}}]}, "epoch 4: must be at most 3"),
        ({"arms": [{"kind": "never"}, {"kind": "schedule", "grid": {"blueprints": ["x"]}}]}, "blueprint 'x'"),
        ({"arms": [{"kind": "never"}, {"kind": "schedule", "grid": {"slots": [["mid"]]}}]}, "slots[0]"),
        ({"arms": [{"kind": "never"}, {"kind": "schedule", "grid": {"slots": [["mid", "mid"]]}}]}, "twice"),
        ({"arms": [{"kind": "never"}, {"kind": "ppo", "learning": {"seed": 1}}]}, r"learning.seed: 1: must be one of"),
        ({"arms": [{"kind": "never"}, {"kind": "ppo", "learning": {"lr": -1.0}}]}, r"learning.lr: -1.0: must be"),
        ({"arms": [{"kind": "never"}, {"kind": "ppo", "run": "r", "learning": {"lr": 0.1}}]}, "means nothing"),
        ({"arms": [{"kind": "never"}, {"kind": "ppo", "run": "r", "imitates": "never"}]}, "means nothing"),
        ({"arms": [{"kind": "never"}, {"kind": "ppo", "imitates": "never"}]}, "must be a schedule before it"),
        ({"arms": [{"kind": "never"}, GRID, {"kind": "ppo", "imitates": "schedule"}]}, "at least 1 to imitate"),
        ({"arms": [{"kind": "never"}, {"kind": "ppo", "learning": {"imitation_rollouts": 1}}]}, "needs imitates"),
    ],
)
def test_a_configuration_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        CompareConfig.from_dict(comparison(**changes))


def test_a_grid_has_a_point_for_every_combination() -> None:
    config = CompareConfig.from_dict(
        comparison(arms=[{"kind": "never"}, {"kind": "schedule", "grid": {"epochs": [0, 1], "blends": ["gated"]}}])
    )
    points = arms.points_of(config.arms[1], config.shared)
    assert len(points) == 5 * 3 * 2
    assert len(set(points)) == len(points)
    assert {tuple(step.op for step in point) for point in points} == {("germinate", "fossilize")}


def test_a_grid_may_plant_several_slots() -> None:
    """Three blueprints, four choices of slots and three epochs are a sweep of 36 points."""
    slots = ["late", ["mid", "late"], ["late", "early"], ["early", "mid", "late"]]
    grid = {"blueprints": ["norm", "conv_light", "conv_expand"], "slots": slots, "epochs": [0, 1, 2]}
    config = CompareConfig.from_dict(comparison(arms=[{"kind": "never"}, {"kind": "schedule", "grid": grid}]))
    points = arms.points_of(config.arms[1], config.shared)
    assert len(set(points)) == 36
    point = next(p for p in points if len(p) == 4 and p[0].slot == "late" and p[0].epoch == 1)
    assert [(s.op, s.slot, s.epoch) for s in point] == [
        ("germinate", "late", 1),
        ("germinate", "early", 1),
        ("fossilize", "late", 1),
        ("fossilize", "early", 1),
    ]
    assert CompareConfig.from_dict(config.to_dict()) == config


def test_a_mixed_grid_has_every_combination_of_kinds() -> None:
    grid = {"blueprints": ["norm", "conv_light"], "slots": ["mid", ["early", "late"]], "mixed": True}
    config = CompareConfig.from_dict(comparison(arms=[{"kind": "never"}, {"kind": "schedule", "grid": grid}]))
    planted = [
        tuple((s.slot, s.blueprint) for s in point if s.op == "germinate")
        for point in arms.points_of(config.arms[1], config.shared)
    ]
    pairs = [(("early", a), ("late", b)) for a in ("norm", "conv_light") for b in ("norm", "conv_light")]
    assert planted == [(("mid", "norm"),), (("mid", "conv_light"),), *pairs]


def test_the_command_line_refuses_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(comparison(seeds=1)))
    assert main(["--config", str(tmp_path / "bad.json"), "--out", str(tmp_path / "out")]) == 2
    assert main(["--config", str(SMOKE), "--out", str(tmp_path)]) == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_controller_of_a_given_run_is_the_one_it_ended_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[RecurrentPolicy] = []

    def build(*given: Any) -> RecurrentPolicy:
        policy = build_controller(*given)
        assert isinstance(policy, RecurrentPolicy)
        played.append(policy)
        return policy

    monkeypatch.setattr(arms, "build_controller", build)
    with tiny_task():
        run(tmp_path / "run", n_episodes=4, max_epochs=3)
        shared = tiny_config(max_epochs=3).to_dict()
        training = {name: shared[name] for name in ("task", "slots", "max_epochs", "gates", "seed")}
        given = {"kind": "ppo", "run": str(tmp_path / "run")}
        lines: list[str] = []

        def judged(**fields: Any) -> Bench:
            config = CompareConfig.from_dict(
                comparison(training={**training, **fields}, arms=[{"kind": "never"}, given])
            )
            judged = Bench(config, tmp_path / "out", lines.append)
            list(arms.run_arms(judged))
            return judged

        rows = judged().rows
        _, snapshot = find(tmp_path / "run", tmp_path / "run")
        weights = snapshot.parts["learner"]["weights"]
        assert set(weights.keys()) == played[0].state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in played[0].state_dict().items())
        assert played[0].statistics["count"].max() > 0
        assert rows["ppo-greedy"].search is None
        assert rows["ppo-greedy"].chosen["checkpoint"] == 3
        assert len(lines) == 3
        with pytest.raises(InputError, match="seed 42, the comparison has 1"):
            judged(seed=1)


@pytest.mark.parametrize("path", sorted(SMOKE.parent.glob("*.json")), ids=lambda path: path.stem)
def test_every_comparison_in_the_repository_takes_a_step(path: Path, tmp_path: Path) -> None:
    """One epoch of one batch for two hosts on a CPU, with the arms that choose nothing."""
    given = CompareConfig.from_json_path(path).to_dict()
    shared = {**given["training"], "devices": ["cpu"], "device": "cpu", "max_epochs": 1}
    shared["train_samples"] = shared.get("batch_size", 64)
    few = {**given, "training": shared, "seeds": 2, "arms": [{"kind": "never"}, {"kind": "random"}]}
    (tmp_path / "few.json").write_text(json.dumps(few))
    assert main(["--config", str(tmp_path / "few.json"), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["never", "random"]
