"""Streams that came to an end, kept for questions: a value that shares with the one before what did not change."""

from dataclasses import dataclass

from qvg_paged.scheduler.entry import Entry

__all__ = ["History"]

BLOCK = 64
"""Entries that are copied when one changes."""


@dataclass(frozen=True)
class History:
    """The latest entries by id, at most so many.

    Attributes:
        most: how many are kept.
        blocks: the entries, oldest first; nobody changes one.
        count: how many there are.
    """

    most: int
    blocks: tuple[dict[str, Entry], ...] = ()
    count: int = 0

    def __contains__(self, name: object) -> bool:
        return any(name in block for block in self.blocks)

    def get(self, name: str) -> Entry | None:
        """The entry of that name."""
        for block in self.blocks:
            if name in block:
                return block[name]
        return None

    def added(self, entry: Entry) -> "History":
        """With one more, whose name is new; the oldest one is given up for it if there are too many."""
        blocks, count = self.blocks, self.count + 1
        if blocks and len(blocks[-1]) < BLOCK:
            blocks = (*blocks[:-1], {**blocks[-1], entry.id: entry})
        else:
            blocks = (*blocks, {entry.id: entry})
        grown = History(self.most, blocks, count)
        return grown.without(next(iter(blocks[0]))) if count > self.most else grown

    def without(self, name: str) -> "History":
        """Without the entry of that name, if there is one."""
        if name not in self:
            return self
        blocks = [block if name not in block else _less(block, name) for block in self.blocks]
        return History(self.most, tuple([block for block in blocks if block]), self.count - 1)


def _less(block: dict[str, Entry], name: str) -> dict[str, Entry]:
    return {key: entry for key, entry in block.items() if key != name}
