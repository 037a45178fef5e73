"""A template of a policy: rename it, change the two keys, keep the rest."""

from collections.abc import Sequence

from qvg_paged.scheduler import StreamView, SystemView


class ShortestFirst:
    """The stream with the fewest frames to go is next; one that has waited long enough goes before it.

    Args:
        patience: seconds of waiting that count as one frame less to go, so that long streams do not starve.
        spare_frames: how many more frames to go a running stream must have to make room for a waiting one.
    """

    def __init__(self, patience: float = 1.0, spare_frames: int = 48) -> None:
        self.patience = patience
        self.spare_frames = spare_frames

    def rank(self, view: SystemView) -> Sequence[str]:
        """All waiting streams, best first."""
        ordered = sorted(view.waiting, key=lambda s: (self._to_go(s) - view.waited(s) / self.patience, s.arrival))
        return [stream.id for stream in ordered]

    def park(self, view: SystemView, stream: StreamView | None) -> Sequence[str]:
        """Parkable streams with more to go than the one that needs room; all of them if memory ran short (None)."""
        least = -1 if stream is None else self._to_go(stream) + self.spare_frames
        found = [s for s in view.running if s.id in view.parkable and self._to_go(s) > least]
        return [s.id for s in sorted(found, key=lambda s: (-self._to_go(s), -s.arrival))]

    @staticmethod
    def _to_go(stream: StreamView) -> int:
        return stream.request.frames - stream.committed
