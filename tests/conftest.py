"""Settings for all tests."""

from hypothesis import settings

# The same examples in every run: a failure is a change's, not the draw's.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
