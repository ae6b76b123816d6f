"""Settings for all tests."""

import torch
from hypothesis import settings

# The same examples in every run: a failure is a change's, not the draw's.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Tiny models gain nothing from threads, and lose much where several tests share the cores.
torch.set_num_threads(1)
