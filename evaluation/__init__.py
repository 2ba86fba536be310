"""How good restored images are: metrics, tables, the page of a report, figures."""
