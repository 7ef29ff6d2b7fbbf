"""The task table: lookup, registration, hosts that fit their data and blueprints that fit their hosts."""

import dataclasses
import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import esper.seeds.blueprints.cnn
import esper.seeds.blueprints.transformer  # noqa: F401
from esper import keys as k
from esper import tasks
from esper.data.batches import require_batches
from esper.hosts.cnn import CNNHost
from esper.seeds.blueprints import registry

KEY = k.root(0)


def test_lookup_ignores_case_and_lists_the_names_when_it_fails():
    assert tasks.get_task("CIFAR10") is tasks.CIFAR10
    with pytest.raises(ValueError, match=r"unknown task 'imagenet'; available: digits, mnist, .*tinystories.*pydocs"):
        tasks.get_task("imagenet")


def test_a_task_of_ones_own_is_one_call(monkeypatch):
    monkeypatch.setattr(tasks, "_REGISTRY", dict(tasks._REGISTRY))
    mine = tasks.register_task(dataclasses.replace(tasks.DIGITS, name="mine", batch_size=32))
    assert tasks.get_task("mine") is mine
    assert tasks.task_names()[-1] == "mine"
    with pytest.raises(ValueError, match="task 'mine' is already registered"):
        tasks.register_task(mine)
    with pytest.raises(ValueError, match="name: 'Mine'; task names are lower-case"):
        tasks.register_task(dataclasses.replace(mine, name="Mine"))


def test_a_kind_or_topology_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="kind: 'regression'; legal are classification and lm"):
        dataclasses.replace(tasks.DIGITS, kind="regression")
    with pytest.raises(ValueError, match="topology: 'graph'; legal are cnn and transformer"):
        dataclasses.replace(tasks.DIGITS, topology="graph")


def test_looking_a_task_up_loads_neither_torch_nor_data():
    code = "import sys, esper.tasks as t; t.get_task('digits'); print({'torch', 'numpy', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


PARAMETERS = {
    "digits": 496,
    "digits_wide": 1_702,
    "digits_narrow": 163,
    "digits_deep": 1_760,
    "mnist": 496,
    "mnist_narrow": 163,
    "cifar10": 6_418,
    "cifar10_deep": 99_922,
    "synthetic": 6_418,
    "tinystories": 30_044_544,
}


@functools.cache
def initial(name):
    """Parameters and statistics of one fresh host."""
    return tasks.get_task(name).host().init(k.host_keys(KEY, 1))


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_hosts_have_the_documented_number_of_parameters(name, expected):
    params, _ = initial(name)
    assert sum(leaf.numel() for leaf in params.values(include_nested=True, leaves_only=True)) == expected


def test_the_full_width_image_host_has_the_documented_number_of_parameters():
    params, _ = CNNHost(3, 10, 32).init(k.host_keys(KEY, 1))
    assert sum(leaf.numel() for leaf in params.values(include_nested=True, leaves_only=True)) == 94_762


@pytest.mark.parametrize("name", ["pydocs", "tinystories"])
def test_a_language_task_starts_at_the_loss_of_a_uniform_guess(name, tmp_path):
    task = tasks.get_task(name)
    host = task.host()
    if name == "pydocs":
        validation = task.load(KEY, tmp_path).validation
        x, y = validation.inputs[:8].long(), validation.targets[:8].long()
    else:
        x, y = k.integers(KEY, task.n_outputs, 2, 1, 64)
    params = initial(name)[0][0].to_dict()
    h, _ = host.run_blocks(params, {}, host.embed(params, x), 0, host.depth, momentum=None)
    # The head is the embedding, so a fresh host guesses the same token again a little more often than any other; how
    # often that is right depends on the tables in the text.
    other = x != y
    loss = F.cross_entropy(host.head(params, h)[other], y[other])
    assert float(loss) == pytest.approx(task.random_guess_loss, rel=0.01)


@pytest.mark.parametrize("name", tasks.task_names())
def test_constants_fit_the_task(name):
    task = tasks.get_task(name)
    host = task.host()
    assert host.topology == task.topology
    assert [site.name for site in host.sites] == ["early", "mid", "late"]
    assert task.random_guess_loss == math.log(task.n_outputs)
    assert abs(task.baseline_loss - task.random_guess_loss) < 0.05
    assert task.target_loss < task.baseline_loss < task.governor_loss_threshold
    assert 1 <= len(task.blueprints) <= 5
    for site in host.sites:
        for blueprint in task.blueprints:
            assert registry.parameter_count(registry.get(task.topology, blueprint), site.channels) > 0


@pytest.mark.parametrize("name", ["digits", "mnist", "pydocs"])
def test_shipped_data_goes_through_the_host(name, tmp_path):
    task = tasks.get_task(name)
    splits = task.load(KEY, tmp_path)
    require_batches(splits, task.batch_size)
    assert splits.is_image == (task.kind == "classification")
    host = task.host()
    params, statistics = host.init(k.host_keys(KEY, 1))
    params, statistics = params[0].to_dict(), statistics[0].to_dict()
    x = splits.prepare(splits.validation.inputs[:4], torch.float32)
    h, _ = host.run_blocks(params, statistics, host.embed(params, x), 0, host.depth, momentum=None)
    logits = host.head(params, h)
    assert logits.shape == (*splits.validation.targets[:4].shape, task.n_outputs)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_deep", "tinystories"])
def test_tasks_whose_data_is_missing_say_where_they_looked(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        tasks.get_task(name).load(KEY, tmp_path)
