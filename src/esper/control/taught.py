"""A policy that watches a teacher at first: who acts, and what is remembered of both."""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose

from esper.control.recorded import RecordedPolicy
from esper.control.scripted import ScriptedPolicy


class TaughtPolicy(TensorDictModuleBase):
    """`policy` on `[N]` hosts as it is, but while `teaching()` the actions are those of `teacher`.

    The policy's recurrent state and values go on meanwhile, as those of a policy that acted like this. Its
    `action_log_prob` is then that of the action it would have taken itself, and of no use.
    """

    def __init__(self, policy: RecordedPolicy, teacher: ScriptedPolicy, teaching: Callable[[], bool]) -> None:
        super().__init__()
        self.policy, self.teacher, self.teaching = policy, teacher, teaching
        self.in_keys = list(dict.fromkeys([*policy.in_keys, *teacher.in_keys]))
        self.out_keys = list(dict.fromkeys([*policy.out_keys, *teacher.out_keys]))

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Write the out_keys into `td`."""
        td = self.policy(td)
        if self.teaching():
            return self.teacher(td)
        for key in self.teacher.carried.values():
            td.set(("next", key), td[key])
        return td

    def make_tensordict_primer(self) -> Compose:
        """The transform that puts what both remember into an environment's specs and its reset."""
        primers = [self.policy.make_tensordict_primer(), self.teacher.make_tensordict_primer()]
        return Compose(*(primer for primer in primers if primer is not None))
