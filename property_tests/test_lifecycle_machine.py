"""The lifecycle as a state machine: whatever is asked and measured, in any order, its laws hold after every step."""

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tensordict import TensorDict

from esper import keys as k
from esper.environment.masks import action_masks
from esper.environment.observation import FEATURES, ObservationSettings, feature_mask, observe
from esper.environment.signals import SignalTracker
from esper.growth.spec import GrowthSpec
from esper.growth.step import act
from esper.hosts.cnn import CNNHost
from esper.seeds import blueprints, stages  # noqa: F401  (importing blueprints registers them)
from esper.seeds.actions import Op
from esper.seeds.bank import empty_bank, uproot
from esper.seeds.gates import in_stage
from esper.seeds.lifecycle import LifecycleRules, record_epoch, tick
from esper.seeds.slots import LAYOUT, empty_records
from esper.seeds.stages import BLENDS, TRANSITIONS, Stage

N, S = 2, 3
KINDS = ("norm", "attention")
NAN = math.nan

contributions = st.sampled_from([NAN, -math.inf, -3.0, 0.0, 0.5, 0.99, 1.0, 7.0, math.inf])
ratios = st.sampled_from([NAN, 0.0, 0.049, 0.05, 0.5, 3.0, math.inf])
accuracies = st.floats(0.0, 100.0, width=32)
operations = st.sampled_from([*Op, Op.WAIT, Op.WAIT])


def reachable(stage: Stage) -> set[Stage]:
    """Every stage that legal edges lead to, the stage itself included."""
    found, frontier = {stage}, [stage]
    while frontier:
        for successor in TRANSITIONS[frontier.pop()]:
            if successor not in found:
                found.add(successor)
                frontier.append(successor)
    return found


MOVED_BY_ACTION = {
    Stage.DORMANT: {Stage.DORMANT, Stage.TRAINING, Stage.BLENDING},
    Stage.TRAINING: {Stage.TRAINING, Stage.CULLED},
    Stage.BLENDING: {Stage.BLENDING, Stage.CULLED},
    Stage.PROBATIONARY: {Stage.PROBATIONARY, Stage.FOSSILIZED, Stage.CULLED},
    Stage.FOSSILIZED: {Stage.FOSSILIZED},
    Stage.EMBARGOED: {Stage.EMBARGOED},
}
MOVED_BY_TICK = {
    Stage.DORMANT: {Stage.DORMANT},
    Stage.TRAINING: {Stage.TRAINING, Stage.BLENDING},
    Stage.BLENDING: {Stage.BLENDING, Stage.PROBATIONARY},
    Stage.PROBATIONARY: {Stage.PROBATIONARY, Stage.EMBARGOED, Stage.DORMANT},
    Stage.FOSSILIZED: {Stage.FOSSILIZED},
    Stage.CULLED: {Stage.EMBARGOED, Stage.DORMANT},
    Stage.EMBARGOED: {Stage.EMBARGOED, Stage.DORMANT},
}


class Lifecycle(RuleBasedStateMachine):
    """Hosts without training: actions and the bank are real, measurements are arbitrary."""

    @initialize(
        incubation=st.sampled_from(stages.INCUBATIONS),
        embargo=st.integers(0, 2),
        max_seeds=st.sampled_from([None, 1, 2]),
        blending=st.integers(1, 4),
        strict=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def begin(self, incubation, embargo, max_seeds, blending, strict, seed):
        rules = LifecycleRules(20, blending, 0.1, strict, incubation, embargo, max_seeds)
        self.spec = GrowthSpec(CNNHost(1, 2, 1), LAYOUT, KINDS, rules)
        keys = k.host_keys(k.root(seed), N)
        bank = empty_bank(self.spec.bank, N, torch.float32)
        self.growth = TensorDict({"slots": empty_records(N, S), "seeds": bank, "key": keys}, batch_size=[N])
        self.view = ObservationSettings(LAYOUT, len(KINDS), rules.max_epochs, 100, max_seeds)
        tracker = SignalTracker()
        metrics = {name: torch.zeros(N) for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy")}
        self.tracker = tracker.update(tracker.init(N), TensorDict(metrics, batch_size=[N]))

    @rule(
        op=st.tuples(operations, operations),
        slot=st.tuples(st.integers(-1, S), st.integers(0, S - 1)),
        blueprint=st.integers(0, len(KINDS)),
        blend=st.integers(0, len(BLENDS) - 1),
        accuracy=accuracies,
        contribution=contributions,
        ratio=ratios,
        healthy=st.booleans(),
    )
    def step(self, op, slot, blueprint, blend, accuracy, contribution, ratio, healthy):
        self.live_through(op, slot, blueprint, blend, accuracy, contribution, ratio, healthy)

    @rule(epochs=st.integers(1, 8), slot=st.integers(0, S - 1), blend=st.integers(0, len(BLENDS) - 1))
    def thrive(self, epochs, slot, blend):
        for epoch in range(epochs):
            op = Op.GERMINATE if epoch == 0 else Op.WAIT
            self.live_through((op, op), (slot, slot), 0, blend, 10.0 * epoch, 2.0, 1.0, True)

    @rule(slot=st.integers(0, S - 1))
    def keep(self, slot):
        self.live_through((Op.FOSSILIZE,) * 2, (slot,) * 2, 0, 0, 50.0, 2.0, 1.0, True)

    def live_through(self, op, slot, blueprint, blend, accuracy, contribution, ratio, healthy):
        action = torch.tensor([[slot[i], blueprint, blend, op[i]] for i in range(N)])
        level = torch.tensor([accuracy, 0.0])
        before = self.growth["slots"]
        masks = action_masks(before, self.view)
        acted, outcome = act(self.spec, self.growth, action, level)
        for i in range(N):
            known = 0 <= slot[i] < S
            allowed = bool(masks["mask_op"][i, op[i]] and known and masks["mask_slot"][i, op[i], slot[i]])
            allowed &= op[i] != Op.GERMINATE or bool(masks["mask_blueprint"][i, blueprint])
            assert outcome["success"][i].item() == (allowed or op[i] == Op.WAIT)
        if not outcome["success"].any():
            assert torch.equal(acted["slots"]["stage"], before["stage"])
        self.moved(before, acted["slots"], MOVED_BY_ACTION)
        records = acted["slots"]
        everywhere = torch.full((N, S), 1.0)
        gradients = TensorDict(
            {"norm": ratio * everywhere, "ratio": ratio * everywhere, "health": everywhere}, batch_size=[N, S]
        )
        lived = record_epoch(
            records, level, contribution * everywhere, everywhere, gradients, torch.full((N, S), healthy)
        )
        assert torch.equal(lived["stage"], records["stage"])
        after, culled = tick(lived, self.spec.rules)
        self.moved(lived, after, MOVED_BY_TICK)
        assert torch.equal(culled, (lived["stage"] == Stage.PROBATIONARY) & ~in_stage(after, stages.OCCUPIED))
        bank = uproot(self.grown(acted["seeds"], after), self.spec.bank, culled)
        self.ramp(before, after)
        self.growth = TensorDict({"slots": after, "seeds": bank, "key": self.growth["key"]}, batch_size=[N])

    def grown(self, bank, records):
        """Training leaves moments behind: ones for every seed that exists."""
        bank = bank.clone()
        for j, slot in enumerate(LAYOUT):
            for b, name in enumerate(KINDS):
                bank["moments"][records["blueprint"][:, j] == b, self.spec.bank.kinds[slot, name].columns] = 1.0
        return bank

    def moved(self, before, after, table):
        for old, new in zip(before["stage"].flatten().tolist(), after["stage"].flatten().tolist(), strict=True):
            assert Stage(new) in table[Stage(old)]
            assert Stage(new) in reachable(Stage(old))

    def ramp(self, before, after):
        """A seed that is still the same one never loses alpha."""
        still = (before["planted"] == after["planted"]) & in_stage(before, stages.OCCUPIED)
        still = still & in_stage(after, stages.OCCUPIED)
        assert (after["alpha"] >= before["alpha"])[still].all()

    @invariant()
    def stages_are_reached_by_legal_edges(self):
        records = self.growth["slots"]
        pairs = zip(records["previous_stage"].flatten().tolist(), records["stage"].flatten().tolist(), strict=True)
        for previous, stage in pairs:
            if stage in stages.OCCUPIED:
                assert Stage(stage) in TRANSITIONS[Stage(previous)]

    @invariant()
    def alpha_says_what_the_stage_does(self):
        records = self.growth["slots"]
        alpha, stage = records["alpha"], records["stage"]
        assert ((alpha >= 0.0) & (alpha <= 1.0)).all()
        assert (alpha[stage == Stage.BLENDING] > 0.0).all()
        assert (alpha[(stage == Stage.PROBATIONARY) | (stage == Stage.FOSSILIZED)] == 1.0).all()
        assert (alpha[~in_stage(records, stages.BLENDED)] == 0.0).all()

    @invariant()
    def an_empty_slot_is_nothing(self):
        records = self.growth["slots"]
        occupied = in_stage(records, stages.OCCUPIED)
        for j, slot in enumerate(LAYOUT):
            for b, name in enumerate(KINDS):
                columns = self.spec.bank.kinds[slot, name].columns
                matrices = self.growth["seeds"].values()
                stored = torch.cat([matrix[:, columns] for matrix in matrices], dim=1).any(dim=1)
                assert torch.equal(stored, occupied[:, j] & (records["blueprint"][:, j] == b))
        empty = empty_records(N, S)
        for name in ("alpha", "blueprint", "blend", "age", "parameters", "ramp_step"):
            assert torch.equal(records[name][~occupied], empty[name][~occupied])
        observation = observe(records, self.tracker, self.view)
        assert observation.isfinite().all()
        assert (observation[~feature_mask(observation)] == 0.0).all()
        for j, slot in enumerate(LAYOUT):
            features = [f.index for f in FEATURES if f.name.startswith(slot)]
            assert (observation[:, features] == 0.0).all(dim=1).tolist() == (~occupied[:, j]).tolist()

    @invariant()
    def seeds_stay_within_their_limit(self):
        limit = self.spec.rules.max_seeds
        assert limit is None or (in_stage(self.growth["slots"], stages.OCCUPIED).sum(1) <= limit).all()


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(settings.get_profile(settings.get_current_profile_name()), stateful_step_count=6)
