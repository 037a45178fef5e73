"""Spans that an open chunk will close: encoded with its commit, or layer by layer before it as layers become final."""

from typing import TYPE_CHECKING

import torch

from qvg_paged.checks import check_layer
from qvg_paged.chunk import Chunk
from qvg_paged.errors import StateError

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager

__all__ = ["encode_closing", "seal_layer"]


def _closing_spans(chunk: Chunk) -> list[range]:
    """Frames of every span that the chunk fills."""
    timeline, committed = chunk.stream.timeline, chunk.stream.committed
    first = timeline.closed_spans(committed)
    return [timeline.span(first + index) for index in range(len(chunk.reservation.spans))]


def seal_layer(manager: "KVCacheManager", chunk: Chunk, layer: int) -> None:
    """See `Chunk.seal`. What fails leaves the layer as it was: not sealed, to be encoded with the commit."""
    check_layer(layer, manager.model)
    if not chunk.written[layer]:
        raise StateError(f"seal: expected K and V in layer {layer}, which was never written")
    if layer in chunk.sealed:
        return
    _encode(manager, chunk, [layer])
    chunk.sealed.add(layer)


def encode_closing(manager: "KVCacheManager", chunk: Chunk) -> list[range]:
    """Launch what is left to encode of the spans that the chunk closes; their frames."""
    _encode(manager, chunk, [layer for layer in range(manager.model.num_layers) if layer not in chunk.sealed])
    return _closing_spans(chunk)


def _encode(manager: "KVCacheManager", chunk: Chunk, layers: list[int]) -> None:
    if not chunk.reservation.spans:
        return
    with torch.no_grad():
        if chunk.encodings is None:
            scratch, quantised = chunk.reservation
            dense = {**chunk.stream.pages, **dict(zip(chunk.frames, scratch, strict=True))}
            chunk.encodings = [
                manager.encoder.begin([dense[frame] for frame in span], pages)
                for span, pages in zip(_closing_spans(chunk), quantised, strict=True)
            ]
        manager.encoder.encode_layers(chunk.encodings, layers)
