"""Slot reports: everything the outside may know about the seeds of one host (plan steps 3 and 6)."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from esper.seeds.stages import OCCUPIED, Stage

TELEMETRY = (
    "gradient_norm",
    "gradient_health",
    "vanishing",
    "exploding",
    "epochs_in_stage",
    "accuracy",
    "accuracy_delta",
    "stage",
    "alpha",
    "progress",
)
"""Names of the telemetry features of a slot, in order."""

VANISHING_NORM = 1e-7
EXPLODING_NORM = 100.0
_MAX_NORM = 10.0
_MAX_EPOCHS_IN_STAGE = 50
_DELTA_POINTS = 10.0


def stage_feature(stage: Tensor) -> Tensor:
    """Stage codes DORMANT ... FOSSILIZED on 0 ... 1 (float32); later codes stay at 1."""
    return ((stage - Stage.DORMANT).to(torch.float32) / (Stage.FOSSILIZED - Stage.DORMANT)).clamp(0.0, 1.0)


def telemetry_features(records: TensorDict, progress: Tensor) -> Tensor:
    """The telemetry of every slot, `[N, S, 10]`, each feature of order one.

    Args:
        records: `[N, S]`.
        progress: `[N]`, the part of the episode that is over, 0..1.

    A gradient that was never measured is norm 0 without the vanishing flag.
    """
    norm = records["gradient_norm"].nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
    measured = ~records["gradient_ratio"].isnan()
    delta = records["accuracy_current"] - records["accuracy_at_stage_start"]
    columns = (
        norm.clamp(max=_MAX_NORM) / _MAX_NORM,
        records["gradient_health"],
        measured & (norm < VANISHING_NORM),
        norm > EXPLODING_NORM,
        records["epochs_in_stage"].clamp(max=_MAX_EPOCHS_IN_STAGE) / _MAX_EPOCHS_IN_STAGE,
        records["accuracy_current"] / 100.0,
        (delta / _DELTA_POINTS).clamp(-1.0, 1.0),
        stage_feature(records["stage"]),
        records["alpha"],
        progress[:, None].expand_as(norm),
    )
    return torch.stack([column.to(torch.float32) for column in columns], dim=-1)


def get_slot_reports(
    records: TensorDict, slots: tuple[str, ...], *, host: int, host_parameters: int, progress: float
) -> TensorDict:
    """Reports of one host, a TensorDict keyed by slot that holds occupied slots only.

    Each report is a copy: later steps never show through. `metrics` has accuracies and the contribution in percentage
    points and durations in epochs; `counterfactual_contribution` is nan and its age -1 until it was measured.

    Args:
        records: `[N, S]`.
        slots: names of the S slots, any names, in order.
        host: index of the host.
        host_parameters: trainable parameters of the host.
        progress: the part of the episode that is over, 0..1.

    Raises:
        ValueError: `slots` does not name every record once, or there is no such host.
    """
    n_hosts, n_slots = records.batch_size
    if len(set(slots)) != len(slots) or len(slots) != n_slots:
        raise ValueError(f"slots must name the {n_slots} records once each, got {slots}")
    if not 0 <= host < n_hosts:
        raise ValueError(f"host must be 0..{n_hosts - 1}, got {host}")
    telemetry = telemetry_features(records[host : host + 1], torch.tensor([progress]))[0]
    return TensorDict(
        {
            name: _report(records[host, j], telemetry[j], host_parameters)
            for j, name in enumerate(slots)
            if int(records["stage"][host, j]) in OCCUPIED
        },
        batch_size=[],
    )


def _report(record: TensorDict, telemetry: Tensor, host_parameters: int) -> TensorDict:
    stage_gain = record["accuracy_current"] - record["accuracy_at_stage_start"]
    blended = record["accuracy_current"] - record["accuracy_at_blending_start"]
    return TensorDict(
        {
            "seed_id": record["planted"],
            "blueprint_id": record["blueprint"],
            "blend_id": record["blend"],
            "stage": record["stage"],
            "previous_stage": record["previous_stage"],
            "previous_epochs_in_stage": record["previous_epochs_in_stage"],
            "stage_entered_at": record["age"] - record["epochs_in_stage"],
            "is_healthy": record["healthy"],
            "is_improving": stage_gain > 0,
            "needs_attention": ~record["healthy"],
            "telemetry": telemetry,
            "metrics": {
                "epochs_total": record["age"],
                "epochs_in_current_stage": record["epochs_in_stage"],
                "initial_val_accuracy": record["accuracy_initial"],
                "current_val_accuracy": record["accuracy_current"],
                "best_val_accuracy": record["accuracy_best"],
                "accuracy_at_stage_start": record["accuracy_at_stage_start"],
                "total_improvement": record["accuracy_current"] - record["accuracy_initial"],
                "improvement_since_stage_start": stage_gain,
                "blending_delta": blended.nan_to_num(nan=0.0),
                "counterfactual_contribution": record["contribution"],
                "counterfactual_contribution_se": record["contribution_se"],
                "counterfactual_contribution_age": record["contribution_age"],
                "gradient_norm": record["gradient_norm"],
                "seed_gradient_norm_ratio": record["gradient_ratio"],
                "seed_param_count": record["parameters"],
                "host_param_count": torch.tensor(host_parameters),
                "current_alpha": record["alpha"],
                "alpha_ramp_step": record["ramp_step"],
            },
        },
        batch_size=[],
    ).clone()
