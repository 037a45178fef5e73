"""The file of a parked stream: a safetensors file of byte tensors, one per page or codebook. docs/tiers.md draws it.

    u64 little endian   length of the header
    header              JSON, padded with spaces to 4,096 bytes with the length; metadata describe the stream
    data                the objects, one after the other, nothing between them

The header carries its own digest and those of all objects, so that a file which is shorter, older or different by a
bit is told from the one that was written. Names of streams and tenants are in it as hashes only.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from qvg_paged.config import Rung, Window
from qvg_paged.errors import CorruptedError, StorageError
from qvg_paged.image import NO_BOOK, Image, PageRecord
from qvg_paged.kernels.layout import LAYOUT_VERSION, PageLayout
from qvg_paged.ladder import SqueezedTimeline
from qvg_paged.timeline import Timeline

__all__ = ["HEADER_ALIGNMENT", "VERSION", "decode_header", "encode_header", "fingerprint", "owner_of"]

VERSION = 1
HEADER_ALIGNMENT = 4096
MOST_HEADER_NBYTES = 64 << 20
PREFIX = struct.Struct("<Q")
UNSIGNED = "0" * 32
DIGEST_KEY = '"header_digest":"'


def fingerprint(layouts: Sequence[PageLayout]) -> str:
    """What must be equal for bytes to mean the same: geometry, formats and layout version."""
    return hashlib.blake2b(repr((LAYOUT_VERSION, tuple(layouts))).encode(), digest_size=16).hexdigest()


def owner_of(tenant: str, stream_id: str) -> str:
    """A name for files that a stream id cannot break."""
    key = f"{len(tenant)}:{tenant}:{stream_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(key, digest_size=16).hexdigest()


def encode_header(image: Image, owner: str, layouts: Sequence[PageLayout]) -> bytes:
    """Length and header of an image's file."""
    metadata = {
        "format": "qvg-paged stream",
        "version": str(VERSION),
        "fingerprint": fingerprint(layouts),
        "owner": owner,
        "stream": json.dumps(_describe(image), separators=(",", ":")),
        "digests": ",".join(f"{digest:016x}" for digest in image.digests),
        "header_digest": UNSIGNED,
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for index, size in enumerate(image.sizes):
        header[str(index)] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":"))
    text += " " * (-(PREFIX.size + len(text)) % HEADER_ALIGNMENT)
    return PREFIX.pack(len(text)) + _signed(text).encode()


def _signed(text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return text.replace(DIGEST_KEY + UNSIGNED, DIGEST_KEY + digest, 1)


def _describe(image: Image) -> dict[str, Any]:
    timeline = image.timeline
    squeezed = isinstance(timeline, SqueezedTimeline)
    return {
        "committed": image.committed,
        "window": asdict(timeline.window),
        "span_frames": timeline.span_frames,
        "squeezed": {name: int(getattr(timeline, name)) for name in _further()} if squeezed else None,
        "pages": [[getattr(record, field.name) for field in fields(PageRecord)] for record in image.pages],
    }


def _further() -> list[str]:
    plain = {field.name for field in fields(Timeline)}
    return [field.name for field in fields(SqueezedTimeline) if field.name not in plain]


def decode_header(data: bytes, nbytes: int, owner: str, layouts: Sequence[PageLayout]) -> tuple[Image, int]:
    """The image that a file of `nbytes` bytes holds, and where its data begin.

    Args:
        data: the file's beginning, at least its header.
        nbytes: length of the file.
        owner: whose it must be.
        layouts: the manager's page layouts.

    Raises:
        CorruptedError: it is not, byte for byte, what was written.
        StorageError: it was written by another version or for another model.
    """
    if len(data) < PREFIX.size:
        raise CorruptedError(f"file: expected a header, got {len(data)} bytes")
    (length,) = PREFIX.unpack_from(data)
    if length > MOST_HEADER_NBYTES or PREFIX.size + length > len(data):
        raise CorruptedError(f"file: expected a header that lies in its {nbytes} bytes, got one of {length} bytes")
    text = data[PREFIX.size : PREFIX.size + length].decode("latin-1")
    place = text.find(DIGEST_KEY) + len(DIGEST_KEY)
    unsigned = text[:place] + UNSIGNED + text[place + len(UNSIGNED) :]
    if _signed(unsigned) != text or place < len(DIGEST_KEY):
        raise CorruptedError("file: expected a header with its own digest, got another: it was damaged")
    try:
        image = _parse(json.loads(text), owner, layouts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptedError(f"file: expected the description of a stream, got {error!r}") from error
    if PREFIX.size + length + image.nbytes != nbytes:
        raise CorruptedError(f"file: expected {PREFIX.size + length + image.nbytes} bytes, got {nbytes}")
    return image, PREFIX.size + length


def _parse(header: Any, owner: str, layouts: Sequence[PageLayout]) -> Image:
    metadata = header["__metadata__"]
    if metadata["version"] != str(VERSION) or metadata["fingerprint"] != fingerprint(layouts):
        raise StorageError(
            f"file: expected version {VERSION} and the model, formats and layouts of this manager, "
            f"got version {metadata['version']} and others"
        )
    if metadata["owner"] != owner:
        raise CorruptedError("file: expected one of this stream and tenant, got another's")
    told = json.loads(metadata["stream"])
    window, span = Window(**told["window"]), told["span_frames"]
    timeline = Timeline(window, span)
    if told["squeezed"] is not None:
        further = dict(told["squeezed"], rung=Rung(told["squeezed"]["rung"]))
        timeline = SqueezedTimeline(window, span, **further)
    sizes = tuple(header[str(index)]["shape"][0] for index in range(len(header) - 1))
    digests = tuple(int(digest, 16) for digest in metadata["digests"].split(",") if digest)
    pages = tuple(PageRecord(*row) for row in told["pages"])
    image = Image(told["committed"], timeline, pages, sizes, digests)
    _check(image, layouts)
    return image


def _check(image: Image, layouts: Sequence[PageLayout]) -> None:
    """Raise `ValueError` unless pages and codebooks have the sizes of their layouts and every frame is there."""
    if len(image.sizes) != len(image.digests):
        raise ValueError("objects without digest")
    if [record.frame for record in image.pages] != image.timeline.kept(image.committed):
        raise ValueError("frames that the window does not keep")
    for record in image.pages:
        layout = layouts[record.format]
        if image.sizes[record.place] != layout.page_nbytes:
            raise ValueError("a page of another size")
        if record.book != NO_BOOK and image.sizes[record.book] != layout.codebook_nbytes:
            raise ValueError("a codebook of another size")
