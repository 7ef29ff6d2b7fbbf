"""A learned policy's step as one launch on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import exploration_type

from esper.control.policy import GREEDY, RecurrentPolicy
from esper.recording import recorded


class _Program(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: TensorDict
    outputs: TensorDict


class RecordedPolicy(TensorDictModuleBase):
    """`policy` as it is, but on a CUDA device its step is recorded as a CUDA graph and replayed: a step of a small
    network is two hundred launches, and takes the time of launching them.

    Steps of other sizes, and drawing actions or taking the likeliest, are recorded apart, each when it first occurs.
    The weights and statistics are those of `policy`, which must be written in place, as optimizers do. A mask that
    allows nothing is a device assertion.
    """

    def __init__(self, policy: RecurrentPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys, self.out_keys = list(policy.in_keys), list(policy.out_keys)
        self._programs: dict[tuple[torch.Size, bool], _Program] = {}

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Choose actions for one step of `[N]` hosts; writes the out_keys into `td`."""
        if not td["observation"].is_cuda:
            return self.policy(td)
        wanted = td.batch_size, exploration_type() in GREEDY
        if wanted not in self._programs:
            self._programs[wanted] = self._record(td)
        graph, inputs, outputs = self._programs[wanted]
        for name in self.in_keys:
            inputs[name].copy_(td[name])
        graph.replay()
        for key in self.out_keys:
            td.set(key, outputs[key].clone())
        return td

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The policy's own."""
        return self.policy.make_tensordict_primer()

    def _record(self, td: TensorDictBase) -> _Program:
        inputs: TensorDict = td.select(*self.in_keys).clone()

        def step() -> TensorDict:
            return self.policy(inputs.clone(recurse=False)).select(*self.out_keys)

        with torch.no_grad():
            graph, outputs = recorded(step, inputs["observation"].device)
        return _Program(graph, inputs, outputs)
