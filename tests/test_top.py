"""`qvg-paged top`: what an endpoint tells, for people and for machines."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tiny import WINDOW, grow, make_cache
from typer.testing import CliRunner

from qvg_paged import ArgumentError, cli
from qvg_paged.metrics import CacheCollector, serve_metrics
from qvg_paged.scheduler import Outcome, Scheduler, StreamRequest
from qvg_paged.scheduler.metrics import SchedulerMetrics
from qvg_paged.top import Scrape, fetch, render, summarise

pytestmark = pytest.mark.usefixtures("one_thread")
runner = CliRunner()
HOSTILE = "[bold]\x1b[2J\n"


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A process with two tenants, one stream of each, one of them in line."""
    cache = make_cache()
    scheduler = Scheduler(cache)
    with serve_metrics(0, CacheCollector(cache), SchedulerMetrics(scheduler)) as server:
        for name in ("studio", HOSTILE):
            scheduler.submit(StreamRequest(name, name, 12, WINDOW))
            grow(cache.open(name, tenant=name, window=WINDOW), 3)
        plan = scheduler.step(0.0)
        scheduler.update(plan, Outcome({d.stream_id: 3 for d in plan.running}))
        scheduler.step(1.0)
        yield server.url


@contextmanager
def served(body: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_once_and_json_tell_a_machine_everything(endpoint: str) -> None:
    result = runner.invoke(cli.app, ["top", endpoint, "--once", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["streams"] == {"queued": 0, "running": 2, "parked": 0}
    assert sum(told["pool"]["states"].values()) == told["pool"]["capacity_bytes"]
    assert set(told["tenants"]) == {"studio", HOSTILE}
    assert told["tenants"]["studio"]["chunks"] == 1
    assert told["totals"]["chunks"] == 2
    assert told["per_second"]["chunks"] is None, "one look has no rates"
    assert told["latency_seconds"]["first_chunk"]["p50"] > 0


def test_a_terminal_shows_tenants_whose_names_cannot_move_the_cursor(endpoint: str) -> None:
    result = runner.invoke(cli.app, ["top", endpoint, "--once"])
    assert result.exit_code == 0, result.output
    for text in ("2 running", "studio", "[bold]\\x1b[2J\\n", "Tenants", "MB", "first chunk"):
        assert text in result.output
    assert "\x1b[2J" not in result.output


def test_several_looks_have_rates(endpoint: str) -> None:
    result = runner.invoke(cli.app, ["top", endpoint, "-n", "2", "--interval", "0.1", "--json"])
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["per_second"]["chunks"] is None
    assert second["per_second"]["chunks"] == 0.0


def test_an_endpoint_of_a_cache_alone_is_shown_as_far_as_it_goes() -> None:
    cache = make_cache()
    with serve_metrics(0, CacheCollector(cache)) as server:
        result = runner.invoke(cli.app, ["top", server.url, "--once"])
    assert result.exit_code == 0, result.output
    assert "pool" in result.output
    assert "streams" not in result.output


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xfe", b"other_metric 1\n", b"kvp_x{ 1\n"])
def test_what_is_no_endpoint_of_ours_is_one_line_and_status_two(body: bytes) -> None:
    with served(body) as url:
        result = runner.invoke(cli.app, ["top", url, "--once"])
    assert result.exit_code == 2
    assert "error: url: expected" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/metrics", "file:///etc/passwd", "nonsense", ""])
def test_an_address_that_does_not_answer_is_an_error(url: str) -> None:
    with pytest.raises(ArgumentError, match="url: expected an endpoint"):
        fetch(url, timeout=1.0)


def make(at: float, **samples: Any) -> Scrape:
    return Scrape(at, {name: list(values) for name, values in samples.items()})


def test_rates_and_quantiles_are_those_of_prometheus() -> None:
    bounds = [("0.1", 10.0), ("0.5", 90.0), ("1.0", 100.0), ("+Inf", 100.0)]
    buckets = [({"le": le}, count) for le, count in bounds]
    scrape = make(10.0, kvp_queue_wait_seconds_bucket=buckets, kvp_chunks_total=[({"tenant": "a"}, 30.0)])
    assert scrape.quantile("kvp_queue_wait_seconds", 0.5) == pytest.approx(0.3)
    assert scrape.quantile("kvp_queue_wait_seconds", 0.99) == pytest.approx(0.95)
    assert scrape.quantile("kvp_nothing", 0.5) is None
    before = make(5.0, kvp_chunks_total=[({"tenant": "a"}, 10.0)])
    summary = summarise(scrape, before)
    assert summary["per_second"]["chunks"] == 4.0
    assert summary["tenants"]["a"]["chunks_per_second"] == 4.0
    restarted = make(5.0, kvp_chunks_total=[({"tenant": "a"}, 100.0)])
    assert summarise(scrape, restarted)["per_second"]["chunks"] == 6.0
    assert summarise(scrape, restarted)["tenants"]["a"]["chunks_per_second"] == 0.0
    beyond = make(0.0, kvp_queue_wait_seconds_bucket=[({"le": "0.1"}, 0.0), ({"le": "+Inf"}, 5.0)])
    assert beyond.quantile("kvp_queue_wait_seconds", 0.5) == 0.1
    assert render(summary).renderables
