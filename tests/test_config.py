"""Descriptions of models, caches and windows: sizes in words, defaults, and errors that say what would work."""

import re
from typing import Any

import pytest
import torch
from tiny import make_model

from qvg_paged import (
    FORMATS,
    ArgumentError,
    AttentionPath,
    CacheConfig,
    ConfigError,
    KeyRotation,
    ModelSpec,
    RoPELayout,
    RoPESpec,
    Window,
    estimate,
    parse_bytes,
)
from qvg_paged.budget import Budget

MODEL: dict[str, Any] = {
    "num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "tokens_per_frame": 8, "frames_per_chunk": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 << 30), ("100MB", 100_000_000), ("512 KiB", 512 << 10), (" 1.5 gib ", 3 << 29), ("7", 7),
        ("64B", 64), ("2k", 2000), (4096, 4096),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "1.2.3GiB", "-4MiB", "4 TiB", "0", 0, -1, 1.5, True, None, "I"])
def test_sizes_that_make_no_sense_are_errors(text: Any) -> None:
    with pytest.raises(ConfigError, match="memory: expected"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected an integer >= 1, got 0"),
        ({"tokens_per_frame": 2.5}, "tokens_per_frame: expected an integer"),
        ({"head_dim": 96}, r"head_dim: expected one of \(64, 128, 256\), got 96"),
        ({"dtype": torch.int8}, "dtype: expected one of"),
        ({"num_q_heads": 3}, "num_q_heads: expected a multiple of num_kv_heads=2, got 3"),
        ({"num_q_heads": 0}, "num_q_heads: expected an integer >= 1, got 0"),
        ({"rope": "maybe"}, r"rope: expected one of \['applied', 'on_read'\], got 'maybe'"),
        ({"rope": "on_read"}, "rope_spec: expected a RoPESpec"),
        ({"rope_spec": RoPESpec(head_dim=64, grid=(3, 3))}, "rope_spec: expected head_dim=64 and 8 tokens"),
    ],
)
def test_a_model_that_cannot_work_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec(**{**MODEL, **changes})


def test_a_model_fills_in_what_follows_from_the_rest() -> None:
    model = ModelSpec(**MODEL)
    assert (model.query_heads, model.scale, model.read_rope) == (2, 0.125, None)
    assert model.frame_nbytes == 2 * 2 * 8 * 2 * 64 * 2
    spec = RoPESpec(head_dim=64, grid=(2, 4), layout=RoPELayout.HALF_SPLIT)
    turned = ModelSpec(**MODEL, rope="on_read", rope_spec=spec, softmax_scale=1.0, num_q_heads=6)
    assert (turned.rope, turned.read_rope, turned.scale) == (KeyRotation.ON_READ, spec, 1.0)
    assert turned.key_pairing is RoPELayout.HALF_SPLIT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "qvg-int3"}, "format: expected one of " + re.escape(", ".join(FORMATS)) + ", got 'qvg-int3'"),
        ({"path": "fast"}, "path: expected one of .*reference.*got 'fast'"),
        ({"span_frames": 0}, "span_frames: expected an integer >= 1, got 0"),
        ({"device": "abacus"}, "device: expected"),
        ({"staging": "none"}, "expected bytes or a size"),
    ],
)
def test_a_cache_that_cannot_work_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        CacheConfig(**{"memory": "1GiB", **changes})


def test_a_cache_configuration_holds_values_not_names() -> None:
    config = CacheConfig(memory="1GiB", format="qvg-int4", device="cpu", staging="1MiB")
    assert (config.memory, config.staging) == (1 << 30, 1 << 20)
    assert config.format is FORMATS["qvg-int4"]
    assert config.device == torch.device("cpu")
    assert config.path is AttentionPath.AUTO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recent_frames": 0}, "recent_frames: expected an integer >= 1, got 0"),
        ({"sink_frames": -1}, "sink_frames"),
        ({"bf16_recent": 1.0}, "bf16_recent"),
        ({"retrieval_frames": -2}, "retrieval_frames"),
    ],
)
def test_a_window_that_cannot_work_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Window(**{"recent_frames": 4, **changes})


@pytest.mark.parametrize("fmt", sorted(FORMATS))
@pytest.mark.parametrize("memory", ["64MiB", "1GiB", "24GiB"])
def test_the_parts_of_a_budget_never_exceed_the_memory(fmt: str, memory: str) -> None:
    config = CacheConfig(memory=memory, format=fmt, span_frames=4)
    budget = Budget.split(make_model(), config)
    assert budget.total <= parse_bytes(memory)
    assert budget.pool == budget.slabs.nbytes


@pytest.mark.parametrize("fmt", ["qvg4-int2", "dense"])
def test_at_least_eighty_percent_of_a_large_budget_is_usable_for_pages(fmt: str) -> None:
    model = ModelSpec(num_layers=30, num_kv_heads=12, head_dim=128, tokens_per_frame=1560, frames_per_chunk=3)
    budget = Budget.split(model, CacheConfig(memory="24GiB", format=fmt))
    assert budget.pool >= 0.8 * (24 << 30)


def test_staging_too_small_for_one_page_says_how_much_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"staging: expected at least \d+ bytes .* got 1000"):
        Budget.split(make_model(), CacheConfig(memory="1GiB", staging=1000))


def test_an_estimate_counts_streams_that_fit_and_their_unquantised_like() -> None:
    model = ModelSpec(num_layers=30, num_kv_heads=12, head_dim=128, tokens_per_frame=1560, frames_per_chunk=3)
    config = CacheConfig(memory="80GiB", span_frames=24)
    window = Window(sink_frames=3, recent_frames=180)
    estimated = estimate(model, config, window)
    assert estimated.dense_stream_nbytes == (3 + 180 + 3) * model.frame_nbytes
    assert estimated.streams > estimated.dense_streams
    assert estimated.ratio == estimated.dense_stream_nbytes / estimated.stream_nbytes > 3
    short = estimate(model, config, window, frames=6)
    assert short.demand.dense_pages == 6
    assert short.streams > estimated.streams


def test_default_staging_grows_with_the_width_of_the_model() -> None:
    def staging(heads: int, memory: str) -> int:
        model = ModelSpec(num_layers=1, num_kv_heads=heads, head_dim=128, tokens_per_frame=64, frames_per_chunk=1)
        return Budget.split(model, CacheConfig(memory=memory)).staging

    assert staging(12, "64GiB") == 256 << 20
    assert staging(40, "64GiB") == 1 << 30
    assert staging(40, "8GiB") == 512 << 20  # a sixteenth
