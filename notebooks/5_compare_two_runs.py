# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Compare two runs
#
# Two runs of one seed that differ in who decides, read back from their directories.

# %%
import tempfile
from pathlib import Path

from esper.report import write_report
from esper.table import columns, table
from esper.train import main

# %%
where = Path(tempfile.mkdtemp())
common = ["--task", "digits", "--slots", "early", "mid", "late", "--gates", "permissive"]
common += ["--n-envs", "3", "--n-episodes", "6", "--max-epochs", "10", "--train-samples", "256"]
for controller in ("never", "random"):
    arguments = [*common, "--controller", controller, "--run-dir", str(where / controller)]
    assert main(arguments) == 0

# %% [markdown]
# Every type of event is a table; what an event says per host is a row per host. The same host of the same episode
# starts from the same weights in both runs and sees the same batches, so the fair comparison is by pairs.

# %%
print(columns("rollout"))
judged = ["validation_accuracy", "objective", "parameters"]
never, grown = (table(where / name, "rollout").set_index(["episode", "host"])[judged] for name in ("never", "random"))
difference = grown - never
print(difference)
error = difference.std() / len(difference) ** 0.5
print("mean difference, random minus never:")
print(difference.mean().to_frame("mean").assign(standard_error=error))

# %% [markdown]
# What the seeds were worth, by slot, and a page to look at.

# %%
worth = table(where / "random", "contribution")
print(worth.groupby("slot").contribution.agg(["count", "mean", "std"]))
page = write_report(where / "random")
print(page, page.stat().st_size // 1024, "kB")
