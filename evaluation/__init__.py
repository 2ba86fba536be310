"""Test sets restored and measured: metrics, tables, the page of a report, figures."""

import utils  # noqa: F401  its setting for OpenMP must stand before torch is imported
