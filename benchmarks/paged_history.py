"""Streams of a cache manager as the history of a batch of generated videos, in step."""

from collections.abc import Sequence

from torch import Tensor

from qvg_paged import Chunk, KVCacheManager, Stream

__all__ = ["PagedChunk", "PagedHistory"]


class PagedChunk:
    """One frame in progress on every stream."""

    def __init__(self, cache: KVCacheManager, chunks: list[Chunk]) -> None:
        self._cache = cache
        self._chunks = chunks

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q over each stream's history and frame in progress, ``[batch, tokens, heads, head_dim]``."""
        dtype = self._cache.model.dtype
        out = self._cache.attend(
            layer, self._chunks, q.flatten(0, 1), k.flatten(0, 1).to(dtype), v.flatten(0, 1).to(dtype)
        )
        return out.view(q.shape)

    def commit(self) -> None:
        """Make the frame history on every stream."""
        for chunk in self._chunks:
            chunk.commit()


class PagedHistory:
    """Batch row i is stream i; all streams advance one frame at a time."""

    def __init__(self, cache: KVCacheManager, streams: Sequence[Stream]) -> None:
        self._cache = cache
        self._streams = list(streams)

    def begin_chunk(self) -> PagedChunk:
        """Open a frame on every stream, all or none."""
        return PagedChunk(self._cache, self._cache.begin_chunks(self._streams, frames=1))
