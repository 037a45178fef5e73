"""``python -m qvg_paged``: the command line."""

from qvg_paged.cli import app

app(prog_name="qvg-paged")
