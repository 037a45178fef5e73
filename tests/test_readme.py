"""The README: its example runs, its links lead somewhere, its tables are those of the result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_thread")
def test_the_example_runs_and_quantises(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "committed=8" in printed
    assert "quantised_frames=8" in printed


def test_every_link_leads_to_a_file_of_the_checkout() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_tables_are_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run `make tables`"
