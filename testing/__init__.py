"""Testing: restore test sets, measure and report them, above models and data."""

import utils  # noqa: F401  its setting for OpenMP must stand before torch is imported
