"""What a codec does to attention, layer by layer and head by head: keys, values, scores and outputs.

The queries and the cache are those of the unquantised run, so that layers do not disturb each other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quality.codecs import Memory, SpanCodec
from quality.loop import CodedHistory, decoded

__all__ = ["AttentionError", "attention_error"]


@dataclass(frozen=True)
class AttentionError:
    """Errors ``[layers, heads]``: relative RMS of keys, values and outputs; share of queries with another top key."""

    key: Tensor
    value: Tensor
    output: Tensor
    top_key_changes: Tensor

    def as_dict(self) -> dict[str, Any]:
        """Means, and the tables themselves."""
        tables = {name: [[round(x, 4) for x in row] for row in table.tolist()] for name, table in vars(self).items()}
        return {**{name: table.mean().item() for name, table in vars(self).items()}, "per_layer_and_head": tables}


@torch.no_grad()
def attention_error(history: CodedHistory, key: SpanCodec, value: SpanCodec, given: int) -> AttentionError:
    """Errors of the given frames' K and V, as the watched queries of `history`'s first row (unquantised) see them."""
    tokens, span = given * history.tokens, history.span_frames * history.tokens
    mine, moment = slice(0, history.paths), history.moment(slice(0, history.paths)) if key.uses_queries else None
    outputs = history.outputs() if value.uses_queries else None
    k, v = history.keys[:, mine, :tokens], history.values[:, mine, :tokens, :, : history.dim]
    spans = [slice(start, start + span) for start in range(0, tokens, span)]
    memories: tuple[dict[int, Memory], dict[int, Memory]] = ({}, {})
    coded_k = torch.cat([decoded(key, k[:, :, some], moment, memories[0]) for some in spans], 2)
    coded_v = torch.cat([decoded(value, v[:, :, some], outputs, memories[1]) for some in spans], 2)
    tables = []
    for layer in range(history.layers):
        exact, coded = (history.turned(keys[layer], slice(0, tokens)).permute(0, 2, 3, 1) for keys in (k, coded_k))
        right, ours = v[layer].transpose(1, 2), coded_v[layer].transpose(1, 2)
        watched = [q for (at, _), q in sorted(history.queries.items(), key=lambda item: item[0]) if at == layer]
        q = torch.cat(watched, 1).transpose(1, 2).to(exact.dtype)
        scores, guessed = ((q @ keys).float() * history.dim**-0.5 for keys in (exact, coded))
        changed = (scores.argmax(-1) != guessed.argmax(-1)).float().mean((0, 2))
        out = scores.softmax(-1).to(right.dtype) @ right
        mixed = guessed.softmax(-1).to(ours.dtype) @ ours
        tables.append([
            _relative(coded_k[layer], k[layer], (0, 1, 3)), _relative(coded_v[layer], v[layer], (0, 1, 3)),
            _relative(mixed, out, (0, 2, 3)), changed,
        ])  # fmt: skip
    return AttentionError(*(torch.stack(column).cpu() for column in zip(*tables, strict=True)))


def _relative(ours: Tensor, exact: Tensor, axes: tuple[int, ...]) -> Tensor:
    error = (ours.float() - exact.float()).square().sum(axes)
    return (error / exact.float().square().sum(axes)).sqrt()
