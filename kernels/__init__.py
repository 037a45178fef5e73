"""Encode, decode, paged attention: tensors in, tensors out. Knows pages and block tables, no streams."""

from qvg_paged.kernels.attention import AttentionPath, attention_workspace_nbytes, paged_attention
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.codec import EncodedSpan, decode_span, encode_span
from qvg_paged.kernels.decode import decode_layer, decode_pages, read_centroids
from qvg_paged.kernels.digest import digest_bytes
from qvg_paged.kernels.encode import encode_part, encode_workspace_nbytes
from qvg_paged.kernels.layout import GRANULE, LAYOUT_VERSION, PageLayout, PartLayout
from qvg_paged.kernels.lookahead import Lookahead
from qvg_paged.kernels.merge import merge_partials

__all__ = [
    "GRANULE",
    "LAYOUT_VERSION",
    "AttentionPath",
    "Backend",
    "BlockTable",
    "EncodedSpan",
    "Lookahead",
    "PageLayout",
    "PartLayout",
    "attention_workspace_nbytes",
    "decode_layer",
    "decode_pages",
    "decode_span",
    "digest_bytes",
    "encode_part",
    "encode_span",
    "encode_workspace_nbytes",
    "merge_partials",
    "paged_attention",
    "read_centroids",
]
