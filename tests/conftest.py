"""Settings of all tests."""

from hypothesis import settings

# The same examples in every run, so that a red test means that the change broke it. To look for
# more: pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
