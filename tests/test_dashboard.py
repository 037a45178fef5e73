"""Dashboard, alert rules and documentation against a live scrape: every metric, label and label value exists."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tiny import WINDOW, grow, make_cache

from qvg_paged.metrics import CacheCollector, serve_metrics
from qvg_paged.scheduler import Outcome, Reason, Scheduler, StreamRequest, available_policies, load_policy
from qvg_paged.scheduler.metrics import SchedulerMetrics

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = Path(__file__).parents[1] / "docs"
BOARD = json.loads((DOCS / "observability" / "dashboard.json").read_text())
RULES = yaml.safe_load((DOCS / "observability" / "alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
QUERIES += [(rule["alert"], rule["expr"]) for rule in RULES]
TARGET = {"instance", "job"}
"""Labels that Prometheus adds when it scrapes."""


@pytest.fixture(scope="module")
def families() -> list[Any]:
    """What a server of a manager and a scheduler tells after some work."""
    cache = make_cache()
    scheduler = Scheduler(cache, load_policy("fair-share"))
    with serve_metrics(0, CacheCollector(cache), SchedulerMetrics(scheduler)) as server:
        for name in "ab":
            scheduler.submit(StreamRequest(name, f"tenant-{name}", 6, WINDOW, deadline_fps=1.0))
            cache.open(name, tenant=f"tenant-{name}", window=WINDOW)
        now = 0.0
        while scheduler.busy:
            plan = scheduler.step(now)
            for decision in plan.running:
                grow(cache.streams[decision.stream_id], len(decision.frames or ()))
            scheduler.update(plan, Outcome({d.stream_id: len(d.frames or ()) for d in plan.running}))
            now += 1.0
        with urllib.request.urlopen(server.url, timeout=10) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))


@pytest.fixture(scope="module")
def series(families: list[Any]) -> dict[str, dict[str, set[str]]]:
    """Values of each label of each name."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in families:
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def parsed(query: str) -> Any:
    """A query with Grafana's variables filled in."""
    for variable, value in (("$instance", ".*"), ("$tenant", ".*"), ("$__rate_interval", "1m")):
        query = query.replace(variable, value)
    return promql_parser.parse(query)


def nodes(expression: Any) -> Iterator[Any]:
    """Every part of a query."""
    found: list[Any] = []
    promql_parser.walk(expression, lambda node: found.append(node) or True)
    return iter(found)


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[f"{i}-{where}" for i, (where, _) in enumerate(QUERIES)])
def test_a_query_asks_only_for_what_a_scrape_has(
    where: str, query: str, series: dict[str, dict[str, set[str]]]
) -> None:
    selected: set[str] = set()
    for node in nodes(parsed(query)):
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name in series, f"{where}: no metric {node.name}"
            selected |= set(series[node.name])
            for matcher in node.matchers.matchers:
                if matcher.name in TARGET:
                    continue
                assert matcher.name in series[node.name], f"{where}: {node.name} has no label {matcher.name}"
                values = series[node.name][matcher.name]
                for value in matcher.value.split("|") if matcher.value != ".*" else ():
                    assert value in values, f"{where}: {node.name} has no {matcher.name}={value}, only {values}"
    assert selected or "kvp_" in query
    for node in nodes(parsed(query)):
        modifier = getattr(node, "modifier", None) if isinstance(node, promql_parser.AggregateExpr) else None
        if modifier is not None:
            assert set(modifier.labels) <= selected | TARGET, f"{where}: grouped by labels that are not there"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_legend_names_only_labels_that_its_query_keeps(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        kept = set()
        for node in nodes(parsed(target["expr"])):
            if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
                kept |= set(node.modifier.labels)
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do_with_labels_that_its_query_keeps(
    rule: dict[str, Any], series: dict[str, dict[str, set[str]]]
) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
    kept = set(TARGET)
    top = parsed(rule["expr"])
    grouped = [node for node in nodes(top) if isinstance(node, promql_parser.AggregateExpr)]
    for node in grouped:
        kept |= set(node.modifier.labels) if node.modifier.type == promql_parser.AggModifierType.By else set()
    if not grouped:
        names = [node.name for node in nodes(top) if isinstance(node, promql_parser.VectorSelector)]
        kept |= {label for name in names for label in series[name]}
    assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= kept


def test_the_dashboard_can_be_imported_panels_do_not_overlap_and_have_a_data_source() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"])
               for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & own, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
    names = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"]))) - {"__rate_interval"}
    assert used <= names
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in PANELS for target in panel["targets"])


def test_variables_of_the_dashboard_ask_for_labels_that_exist(series: dict[str, dict[str, set[str]]]) -> None:
    asked = [v["definition"] for v in BOARD["templating"]["list"] if v["type"] == "query"]
    for definition in asked:
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", definition)
        assert match
        assert match[1] in series
        assert match[2] in {*series[match[1]], *TARGET}


def test_the_names_follow_the_rules_of_prometheus(families: list[Any]) -> None:
    for family in families:
        assert family.name.startswith("kvp_")
        assert family.documentation
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter") or family.type == "histogram"
            assert not {"stream", "stream_id", "id", "user"} & set(sample.labels)


def test_states_and_reasons_are_those_of_the_scheduler(series: dict[str, dict[str, set[str]]]) -> None:
    refused = {reason.value for reason in Reason if reason.is_refusal}
    assert refused <= series["kvp_admission_total"]["reason"]
    assert series["kvp_streams"]["state"] == {"queued", "running", "parked"}
    assert len(available_policies()) >= 4


def test_the_documentation_lists_every_metric_and_no_other(families: list[Any]) -> None:
    rows = []
    for family in sorted(families, key=lambda family: family.name):
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        rows.append(f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |")
    expected = "\n".join(["| metric | type | labels | |", "|---|---|---|---|", *rows])
    told = (DOCS / "observability.md").read_text().split("<!-- metrics -->\n")[1].split("\n<!-- end -->")[0]
    assert told == expected, f"docs/observability.md should have:\n{expected}"


def test_the_snippets_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "observability.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    cache = make_cache()
    scope: dict[str, Any] = {"cache": cache, "scheduler": Scheduler(cache), "print": lambda _: None}
    exec(blocks[0].replace("9400", "0"), scope)
    with scope["server"] as server, urllib.request.urlopen(server.url, timeout=10) as answer:
        assert b"kvp_streams" in answer.read()
    exec(blocks[1], scope)
    scheduler = Scheduler(cache, log=scope["log"])
    scheduler.submit(StreamRequest("a", "t", 3, WINDOW))
    assert json.loads((tmp_path / "decisions.jsonl").read_text().splitlines()[1])["id"] == "a"
    assert scope["config"].on_event == scope["events"].event
