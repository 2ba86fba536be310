"""The experiment that shows what the self-similarity loss does: run.py trains and tests, report.py writes it up."""
