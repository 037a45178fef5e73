"""Layers that an engine calls final before its chunk is committed."""

import random
from typing import Any

import pytest
import torch
from tiny import SPAN, WINDOW, content, dense_bytes, grow, make_cache, page_bytes, span_bytes, write

from qvg_paged import ArgumentError, StateError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers in the order in which they are encoded."""
    from qvg_paged.kernels.span import SpanEncoding  # noqa: PLC0415

    layers: list[int] = []
    encode = SpanEncoding.encode

    def noted(self: Any, layer: int) -> None:
        layers.append(layer)
        encode(self, layer)

    monkeypatch.setattr(SpanEncoding, "encode", noted)
    return layers


@pytest.mark.parametrize("sealed", [[0], [1], [1, 0], [0, 1, 1]])
def test_what_is_committed_does_not_depend_on_when_layers_were_encoded(sealed: list[int], encoded: list[int]) -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 3)
    with stream.begin_chunk(2) as chunk:
        write(chunk, [100, 101])
        write(chunk, [3, 4])
        for layer in sealed:
            chunk.seal(layer)
        early = list(dict.fromkeys(sealed))
        assert encoded == early
        chunk.commit()
    assert encoded == early + [layer for layer in range(2) if layer not in sealed]
    assert chunk.encodings is None, "whoever keeps the chunk keeps no tables on the device"
    packed = span_bytes(cache, range(SPAN))
    assert page_bytes(stream) == {**dict(enumerate(packed)), 4: dense_bytes(cache.model, 4)}
    cache.check_integrity()


def test_layers_are_sealed_while_others_are_still_denoised(encoded: list[int]) -> None:
    cache = make_cache(span_frames=1)
    stream = cache.open("a", window=WINDOW)
    with stream.begin_chunk(3) as chunk:
        write(chunk, [0, 1, 2], range(1))
        chunk.seal(0)
        assert encoded == [0, 0, 0]  # of three spans
        write(chunk, [50, 51, 52], range(1, 2))
        write(chunk, [0, 1, 2], range(1, 2))
        chunk.seal(1)
        chunk.commit()
    assert page_bytes(stream) == {frame: span_bytes(cache, [frame])[0] for frame in range(3)}


def test_a_chunk_that_closes_no_span_has_nothing_to_encode(encoded: list[int]) -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    with stream.begin_chunk(2) as chunk:
        write(chunk, [0, 1])
        chunk.seal(0)
        chunk.commit()
    assert encoded == []
    assert page_bytes(stream) == {frame: dense_bytes(cache.model, frame) for frame in range(2)}


def test_a_sealed_layer_stays_as_it_is() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    other = cache.open("b", window=WINDOW).begin_chunk(1)
    chunk = stream.begin_chunk(1)
    write(chunk, [5])
    chunk.seal(1)
    k, v = content(cache.model, 6)[1]
    q = torch.zeros(chunk.num_tokens, cache.model.num_kv_heads, cache.model.head_dim)
    for use in (
        lambda: chunk.write(1, k, v),
        lambda: chunk.attend(1, q, k, v),
        lambda: cache.write(1, [other, chunk], torch.cat([k, k]), torch.cat([v, v])),
    ):
        with pytest.raises(StateError, match="1 is sealed; nothing was written"):
            use()
    assert other.written == [False, False]
    write(chunk, [5], range(1))
    chunk.commit()
    assert page_bytes(stream) == {0: dense_bytes(cache.model, 5)}


def test_only_written_layers_of_open_chunks_can_be_sealed() -> None:
    cache = make_cache()
    chunk = cache.open("a", window=WINDOW).begin_chunk(1)
    with pytest.raises(StateError, match="layer 1, which was never written"):
        chunk.seal(1)
    with pytest.raises(ArgumentError, match="layer"):
        chunk.seal(2)
    write(chunk, [0])
    chunk.commit()
    with pytest.raises(StateError, match="committed"):
        chunk.seal(0)


def test_an_abort_drops_what_was_encoded_early() -> None:
    cache = make_cache()
    stream = cache.open("a", window=WINDOW)
    grow(stream, 3)
    before, used = page_bytes(stream), cache.stats().used_nbytes
    with stream.begin_chunk(1) as chunk:
        write(chunk, [random.randrange(100, 200)])
        chunk.seal(0)
        chunk.seal(1)
    assert (page_bytes(stream), cache.stats().used_nbytes, stream.committed) == (before, used, 3)
    cache.check_integrity()
    grow(stream, 1, 3, 1)
    assert page_bytes(stream) == dict(enumerate(span_bytes(cache, range(SPAN))))
