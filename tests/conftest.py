"""What every test shares: property tests that draw the same examples each time, and figures that need no screen."""

import matplotlib
from hypothesis import settings

matplotlib.use("Agg")

# A failure must fail again, on every machine: no random draws, no clock, no memory of earlier runs.
# `pytest --hypothesis-profile=explore` looks further afield.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("fixed")
