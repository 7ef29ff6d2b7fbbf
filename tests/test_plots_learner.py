"""Pictures of learning: every panel shows the numbers of the events, and says what it lacks."""

import math
from typing import Any

import pytest
from matplotlib.axes import Axes

from esper.events import Event
from esper.plots_learner import PANELS, learner_picture
from esper.seeds.actions import HEADS

ROLLOUTS = 10


def events() -> list[Event]:
    found = []
    for i in range(ROLLOUTS):
        metrics: dict[str, Any] = {"explained_variance": i / 10, "grad_norm": None if i == 3 else 0.5 + i}
        for place, head in enumerate(HEADS):
            metrics |= {f"kl/{head}": 0.001 * place, f"clip_fraction/{head}": 0.1, f"entropy/{head}": 1 - i / 20}
        late = i >= ROLLOUTS - 2
        metrics |= {"response/slots/below -3": 1.0 + 2 * late * (i % 2), "response/CULL/below -3": 0.25 * (i - 7)}
        found.append({"type": "update", "episode": i, "data": metrics})
        rollout = {"ops": {"WAIT": 3, "CULL": 1}, "objective": [90.0 + i, 91.0], "returns": [1.0 * i, 2.0]}
        found.append({"type": "rollout", "episode": i, "data": rollout})
    return found


def panel(name: str) -> Axes:
    (axes,) = learner_picture(events(), [name]).axes
    return axes


def curves(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}


def test_all_panels_make_one_picture() -> None:
    figure = learner_picture(events())
    assert len(figure.axes) == len(PANELS)
    assert len({axes.get_title(loc="left") for axes in figure.axes}) == len(PANELS)
    figure.canvas.draw()


def test_courses_are_those_of_the_updates() -> None:
    values = list(panel("explained_variance").get_lines()[0].get_ydata())
    assert values == [i / 10 for i in range(ROLLOUTS)]
    norms = list(panel("gradient_norm").get_lines()[0].get_ydata())
    assert math.isnan(norms[3])
    assert norms[4] == 4.5


@pytest.mark.parametrize(
    ("name", "value"), [("kl", lambda place: 0.001 * place), ("clip_fraction", lambda _: 0.1), ("entropy", lambda _: 1)]
)
def test_every_head_has_its_curve(name: str, value: Any) -> None:
    first = {head: curve[0] for head, curve in curves(panel(name)).items()}
    assert first == pytest.approx({head: value(place) for place, head in enumerate(HEADS)})


def test_ops_are_shares_of_a_rollout() -> None:
    bars = [patch.get_height() for patch in panel("ops").patches]
    assert sum(bars) == pytest.approx(ROLLOUTS)
    assert sorted(set(bars)) == [0.0, 0.25, 0.75]


def test_responses_are_weighted_means_over_the_last_fifth() -> None:
    """The last two rollouts saw 1 and 3 slots with 0.25 and 0.5: their mean is 0.4375."""
    cull = curves(panel("responses"))["cull"]
    assert cull[0] == pytest.approx((1 * 0.25 + 3 * 0.5) / 4)
    assert all(math.isnan(value) for value in cull[1:])


def test_return_is_drawn_against_objective() -> None:
    dots = [tuple(point) for collection in panel("objective").collections for point in collection.get_offsets()]
    assert len(dots) == 2 * ROLLOUTS
    assert (99.0, 9.0) in dots


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"panels: \['colour'\]; must be some of explained_variance, kl"):
        learner_picture(events(), ["kl", "colour"])
    rollouts = [event for event in events() if event["type"] == "rollout"]
    with pytest.raises(ValueError, match="none of type update"):
        learner_picture(rollouts)
    assert len(learner_picture(rollouts, ["ops", "objective"]).axes) == 2
