"""Order of work on a device: a mark in a CUDA stream, or nothing on a CPU, where work is done when a call returns."""

import torch

__all__ = ["PASSED", "Fence"]


class Fence:
    """A point in the device's current stream: everything launched before it."""

    def __init__(self, event: torch.cuda.Event | None = None, device: torch.device | None = None) -> None:
        self._event = event
        self._device = device

    @classmethod
    def record(cls, device: torch.device) -> "Fence":
        """A fence behind all work launched so far on the current stream of `device`."""
        if device.type != "cuda":
            return PASSED
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return cls(event, device)

    def passed(self) -> bool:
        """Whether that work is done, without waiting."""
        return self._event is None or self._event.query()

    def order_after(self) -> None:
        """Let the device's current stream wait for that work; the host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        """Let the host wait for that work."""
        if self._event is not None:
            self._event.synchronize()


PASSED = Fence()
"""A fence behind nothing."""
