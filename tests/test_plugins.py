"""Policies by name: of the package, of other distributions, by module and class; and the documentation's own."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import WINDOW, make_cache
from typer.testing import CliRunner

from qvg_paged import ArgumentError, ConfigError, cli
from qvg_paged.scheduler import FCFS, FairShare, Priority, Scheduler, StreamRequest, available_policies, load_policy
from qvg_paged.scheduler.plugins import GROUP, OWN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).parents[1] / "docs"
PLUGIN = DOCS / "examples" / "policy_plugin"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The template's distribution as an installer leaves it: metadata with entry points, and the module."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / "shortest_first-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in project["entry-points"][GROUP].items())]
    points += ["fcfs = nowhere:Impostor", "gone = nowhere:Policy"]
    (info / "entry_points.txt").write_text("\n".join(points))
    (tmp_path / "shortest_first.py").write_text((PLUGIN / "shortest_first.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shortest_first", raising=False)
    return project  # type: ignore[no-any-return]


def test_the_policies_of_the_package_have_names_and_take_settings() -> None:
    assert type(load_policy("fcfs")) is FCFS
    shared = load_policy("fair-share", quantum=4.0)
    assert isinstance(shared, FairShare)
    assert shared.quantum == 4.0
    assert set(OWN) <= set(available_policies())
    assert available_policies()["priority"] == "qvg_paged.scheduler.policy:Priority"
    by_place = load_policy("qvg_paged.scheduler.policy:Priority", aging_seconds=1.0)
    assert isinstance(by_place, Priority)


def test_an_installed_distribution_offers_a_policy_by_an_entry_point(plugin: dict[str, Any]) -> None:
    assert plugin["name"] == "shortest-first"
    assert available_policies()["shortest-first"] == "shortest_first:ShortestFirst"
    assert "shortest_first" not in sys.modules, "nothing is imported before it is asked for"
    cache = make_cache(pool=30 * (16 << 10), format="dense")
    scheduler = Scheduler(cache, load_policy("shortest-first", patience=2.0))
    for name, frames in (("long", 12), ("longer", 13), ("short", 6)):
        scheduler.submit(StreamRequest(name, "t", frames, WINDOW))
    plan = scheduler.step(0.0)
    assert [decision.stream_id for decision in plan.admitted][:2] == ["short", "long"]
    assert not plan.policy_fault


@pytest.mark.usefixtures("plugin")
def test_a_distribution_cannot_take_a_name_of_the_package() -> None:
    assert type(load_policy("fcfs")) is FCFS
    assert available_policies()["fcfs"] == "qvg_paged.scheduler.policy:FCFS"


@pytest.mark.usefixtures("plugin")
def test_the_template_gives_up_streams_with_much_more_to_go() -> None:
    from test_policies import running, stream, view  # noqa: PLC0415 - its builders

    policy = load_policy("shortest-first", spare_frames=4)
    moment = view(stream("new", 1, committed=10), running("far", 2), running("near", 3, committed=9), running("pin", 4),
                  pinned="pin")  # fmt: skip
    assert policy.rank(moment) == ["new"]
    assert policy.park(moment, moment.waiting[0]) == ["far"]
    assert policy.park(moment, None) == ["far", "near"]


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("nobody", {}, ArgumentError, r"expected one of .*earliest-deadline, fair-share, fcfs, .*got 'nobody'"),
        ("", {}, ArgumentError, "expected a name or module:Class, got ''"),
        (None, {}, ArgumentError, "got None"),
        ("fair-share", {"quantums": 3}, ArgumentError, r"\(quantum\), got {'quantums': 3}"),
        ("fcfs", {"x": 1}, ArgumentError, "settings"),
        ("gone", {}, ConfigError, "'gone' could not be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("no.such:Thing", {}, ConfigError, "could not be imported: ModuleNotFoundError"),
        ("math:Nothing", {}, ConfigError, "could not be imported: AttributeError"),
        ("math:", {}, ConfigError, "could not be imported"),
        (":FCFS", {}, ConfigError, "could not be imported"),
        ("math:pi", {}, ConfigError, "expected 'math:pi' to be a class or function, got float"),
        ("builtins:dict", {}, ConfigError, r"dict lacks \['rank', 'park'\]"),
        ("types:SimpleNamespace", {"rank": len, "park": 3}, ConfigError, r"SimpleNamespace lacks \['park'\]"),
        ("fractions:Fraction", {"denominator": 0}, ConfigError, "could not be made .* ZeroDivisionError"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("plugin")
def test_what_cannot_be_loaded_is_a_typed_error_that_says_why(
    name: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_policy(name, **settings)


def test_every_snippet_of_the_documentation_runs_and_its_own_policy_has_twenty_lines() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "policies.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    assert len(blocks[0].splitlines()) <= 20
    cache = make_cache(pool=30 * (16 << 10), format="dense")
    for block in blocks:
        scope: dict[str, Any] = {"cache": cache}
        exec(block, scope)
        scheduler = scope["scheduler"]
        for name, frames in (("long", 12), ("longer", 13), ("short", 6)):
            scheduler.submit(StreamRequest(name, "t", frames, WINDOW))
        plan = scheduler.step(0.0)
        first = "short" if "ShortestFirst" in scope else "long"
        assert plan.admitted[0].stream_id == first
        assert not plan.policy_fault


def test_the_policy_of_the_documentation_runs_under_the_stress_harness_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippet = re.findall(r"```python\n(.*?)```", (DOCS / "policies.md").read_text(), re.DOTALL)[0]
    (tmp_path / "my_policy.py").write_text(snippet.split("scheduler = ")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = "my_policy:ShortestFirst"
    result = CliRunner().invoke(cli.app, ["stress", "--policy", name, "--seeds", "1", "--streams", "6", "--out", "out"])
    assert result.exit_code == 0, result.output
    assert f"with policy {name}" in " ".join(result.output.split())
    assert "0 failures" in result.output
    assert json.loads((tmp_path / "out" / "result.json").read_text())
