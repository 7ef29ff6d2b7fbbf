"""Running a stored row at once equals stepping through it, wherever the state restarts."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from esper.control.policy import RecurrentPolicy
from esper.control.recurrence import Recurrence

HIDDEN = 8
POLICY = RecurrentPolicy(6, HIDDEN, seed=3)


@st.composite
def rows(draw):
    """Observations `[N, T, 6]`, restarts `[N, T, 1]` anywhere and a state `[N, H]` to start from."""
    n, t = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    chance = draw(st.floats(0, 1))
    return (
        3 * torch.randn(n, t, 6, generator=generator),
        torch.rand(n, t, 1, generator=generator) < chance,
        torch.randn(n, HIDDEN, generator=generator),
        torch.randn(n, HIDDEN, generator=generator),
    )


@given(rows())
def test_a_row_at_once_equals_stepping(case):
    observation, is_init, h, c = case
    n, t = observation.shape[:2]
    stored = TensorDict({"observation": observation, "is_init": is_init}, batch_size=[n, t])
    stored["hidden_h"], stored["hidden_c"] = torch.zeros(2, n, t, HIDDEN)
    masks = {
        "mask_op": torch.ones(n, 4, dtype=torch.bool),
        "mask_slot": torch.ones(n, 4, 3, dtype=torch.bool),
        "mask_blueprint": torch.ones(n, 5, dtype=torch.bool),
        "mask_blend": torch.ones(n, 3, dtype=torch.bool),
    }
    values, log_probs, actions = [], [], []
    with torch.no_grad():
        for step in range(t):
            stored["hidden_h"][:, step], stored["hidden_c"][:, step] = h, c
            key = torch.arange(n) + 100 * step
            td = TensorDict({**stored[:, step].to_dict(), **masks, "key": key}, batch_size=[n])
            td = POLICY(td)
            h, c = td["next", "hidden_h"], td["next", "hidden_c"]
            values.append(td["state_value"])
            log_probs.append(td["action_log_prob"])
            actions.append(td["action"])
        for name, mask in masks.items():
            stored[name] = mask.unsqueeze(1).expand(n, t, *mask.shape[1:])
        distribution, value = POLICY.evaluate(stored)
        _, _, h_end, c_end = POLICY.unroll(stored)
    torch.testing.assert_close(value, torch.stack(values, 1), rtol=0, atol=1e-5)
    terms = distribution.head_terms(torch.stack(actions, 1))
    torch.testing.assert_close(terms.log_prob, torch.stack(log_probs, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close((h_end, c_end), (h, c), rtol=0, atol=1e-5)


@given(rows())
def test_equals_a_loop_over_a_cell(case):
    x, is_init, h, c = case
    memory = Recurrence(6, HIDDEN, torch.Generator().manual_seed(0))
    cell = nn.LSTMCell(6, HIDDEN)
    cell.load_state_dict(memory.state_dict())
    with torch.no_grad():
        y, h_end, c_end = memory(x, h, c, is_init.squeeze(-1))
        for step in range(x.shape[1]):
            keep = ~is_init[:, step]
            h, c = cell(x[:, step], (h * keep, c * keep))
            torch.testing.assert_close(y[:, step], h, rtol=0, atol=1e-5)
    torch.testing.assert_close((h_end, c_end), (h, c), rtol=0, atol=1e-5)


@given(rows(), st.data())
def test_a_restart_forgets(case, data):
    x, is_init, h, c = case
    memory = Recurrence(6, HIDDEN, torch.Generator().manual_seed(0))
    at = data.draw(st.integers(0, x.shape[1] - 1))
    is_init[:, at] = True
    other = x.clone()
    other[:, :at] += 1.0
    poison = torch.full_like(h, float("nan")) if at == 0 else h + 1
    with torch.no_grad():
        before, _, _ = memory(x, h, c, is_init.squeeze(-1))
        after, _, _ = memory(other, poison, poison, is_init.squeeze(-1))
    assert torch.equal(before[:, at:], after[:, at:])
