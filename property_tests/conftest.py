"""Hypothesis profiles: 200 derandomised examples in CI, 5,000 random ones at night (`HYPOTHESIS_PROFILE=nightly`)."""

import os

from hypothesis import settings

settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
