"""A grown language model never looks ahead: every blueprint, blend and stage, through the whole network."""

from __future__ import annotations

import pytest
import torch

from esper.growth.forward import forward
from esper.growth.plan import make_plan
from esper.growth.trees import as_tree
from esper.seeds.stages import BLENDS
from growth.test_executors_against_oracle import SLOTS, batches, grown


@pytest.mark.parametrize("incubation", ["straight_through", "none"])
@pytest.mark.parametrize("blend", BLENDS)
def test_changing_a_token_never_changes_logits_before_it(blend: str, incubation: str) -> None:
    spec, growth = grown("transformer", incubation, blend)
    # Zero-initialised seeds would hide what they could see.
    generator = torch.Generator().manual_seed(5)
    growth["seeds"] = growth["seeds"].apply(
        lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
    )
    x = next(iter(batches("transformer", growth.batch_size[0])))[0]
    for i, plan in enumerate(make_plan(growth["slots"], spec)):
        host = growth["host"][i]
        params, statistics = as_tree(host["params"]), as_tree(host["statistics"])
        seeds = [
            None if entry is None else spec.bank.kinds[slot, entry.blueprint].open(growth["seeds", "params"][i])
            for slot, entry in zip(SLOTS, plan, strict=True)
        ]
        alpha = list(growth["slots", "alpha"][i])

        def logits(tokens, plan=plan, params=params, statistics=statistics, seeds=seeds, alpha=alpha):
            return forward(spec, plan, params, statistics, seeds, alpha, tokens, momentum=None, key=None)[0]

        before = logits(x[i])
        for t in range(x.shape[-1]):
            changed = x[i].clone()
            changed[:, t] = (changed[:, t] + 1) % 31
            after = logits(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])
