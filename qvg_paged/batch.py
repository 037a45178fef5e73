"""Several chunks as one batch: one block table, one scatter into scratch pages, one launch of attention."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import torch

from qvg_paged.checks import check_kv, check_layer, check_queries
from qvg_paged.chunk import Chunk
from qvg_paged.errors import ArgumentError, StateError
from qvg_paged.events import fault_point
from qvg_paged.kernels.attention import AttentionPath, paged_attention
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.lookahead import Lookahead
from qvg_paged.page import DENSE_FORMAT
from qvg_paged.scratch import ScratchWriter

if TYPE_CHECKING:
    from qvg_paged.manager import KVCacheManager

__all__ = ["ChunkBatches"]


class ChunkBatches:
    """What open chunks do together; a batch is put together once, however many layers and steps it has."""

    def __init__(self, manager: "KVCacheManager") -> None:
        self._manager = manager
        self._made: dict[tuple[int, ...], tuple[BlockTable, ScratchWriter]] = {}

    def attend(
        self,
        layer: int,
        chunks: Sequence[Chunk],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lookahead: Lookahead,
    ) -> torch.Tensor:
        """See `KVCacheManager.attend`."""
        manager = self._manager
        model, config = manager.model, manager.config
        check_layer(layer, model)
        self.check(chunks)
        tokens = [chunk.num_tokens for chunk in chunks]
        check_queries(q, sum(tokens), model, manager.device)
        check_kv(k, v, sum(tokens), model, manager.device)
        table, writer = self._batch(chunks)
        self._write(layer, chunks, writer, k, v)
        out, _ = paged_attention(
            q,
            manager.store.pool.buffer,
            table,
            manager.layouts,
            layer,
            cu_seqlens_q=list(accumulate(tokens, initial=0)),
            softmax_scale=model.scale,
            rope=model.read_rope,
            path=cast(AttentionPath, config.path),
            allow_fp8=config.allow_fp8,
            workspace=manager.staging,
            lookahead=lookahead,
        )
        return out

    def write(self, layer: int, chunks: Sequence[Chunk], k: torch.Tensor, v: torch.Tensor) -> None:
        """See `KVCacheManager.write`."""
        check_layer(layer, self._manager.model)
        self.check(chunks)
        tokens = sum(chunk.num_tokens for chunk in chunks)
        check_kv(k, v, tokens, self._manager.model, self._manager.device)
        writer = chunks[0].writer if len(chunks) == 1 else self._batch(chunks)[1]
        self._write(layer, chunks, writer, k, v)

    def check(self, chunks: Sequence[Chunk]) -> None:
        """Raise unless these are open chunks of the manager, each once."""
        if not chunks or (len(chunks) > 1 and len(set(chunks)) != len(chunks)):
            raise ArgumentError(f"chunks: expected one or more, each once, got {len(chunks)}")
        for chunk in chunks:
            chunk.require_open()
            if chunk.stream.manager is not self._manager:
                raise ArgumentError("chunks: expected chunks of this manager")

    def table(self, chunks: Sequence[Chunk]) -> BlockTable:
        """See `KVCacheManager.block_tables`."""
        self.check(chunks)
        return self._batch(chunks)[0]

    def drop(self, chunk: Chunk) -> None:
        """Forget batches of a chunk that is done."""
        if self._made:
            self._made = {key: batch for key, batch in self._made.items() if id(chunk) not in key}

    def _batch(self, chunks: Sequence[Chunk]) -> tuple[BlockTable, ScratchWriter]:
        if len(chunks) == 1:
            return chunks[0].table, chunks[0].writer
        key = tuple(id(chunk) for chunk in chunks)
        if key not in self._made:
            manager = self._manager
            pages = [page for chunk in chunks for page in chunk.reservation.scratch]
            writer = ScratchWriter(manager.store.pool, manager.layouts[DENSE_FORMAT], pages)
            self._made[key] = (BlockTable.concat([chunk.table for chunk in chunks]), writer)
        return self._made[key]

    @staticmethod
    def _write(layer: int, chunks: Sequence[Chunk], writer: ScratchWriter, k: torch.Tensor, v: torch.Tensor) -> None:
        if any(layer in chunk.sealed for chunk in chunks):
            raise StateError(f"layer: expected one that may still change, {layer} is sealed; nothing was written")
        fault_point("chunk.write")
        writer.write(layer, k, v)
        for chunk in chunks:
            chunk.written[layer] = True
