"""Kernels written in Gluon, which other kernels stand in for wherever they do not compile.

Gluon is experimental and changes from release to release of Triton.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version

import torch

__all__ = ["GluonKernel", "NotCompiled"]


class NotCompiled(Exception):  # noqa: N818 - whoever launches a kernel catches it
    """A kernel did not compile."""

    def __init__(self, kernel: "GluonKernel", reason: Exception) -> None:
        super().__init__()
        self._kernel, self._reason = kernel, reason

    def give_up(self, device: torch.device) -> None:
        """Leave `device` to other kernels from now on, and say why."""
        self._kernel.give_up(device, self._reason)


class GluonKernel:
    """Where a kernel can be used.

    Args:
        module: of `qvg_paged.kernels`; imported once somebody asks.
        fallback: what happens instead, as a warning says it.

    Attributes:
        given_up: devices for which it does not compile.
    """

    def __init__(self, module: str, fallback: str) -> None:
        self.given_up: set[torch.device] = set()
        self._module, self._fallback = module, fallback
        self._imported: set[torch.device] = set()

    def runs_on(self, device: torch.device, least: tuple[int, int], below: tuple[int, int] | None = None) -> bool:
        """Whether `device` is an NVIDIA GPU of capability `least` up to `below`, and Triton has what it takes."""
        if device in self.given_up or device.type != "cuda" or torch.version.cuda is None:
            return False
        capability = torch.cuda.get_device_capability(device)
        if capability < least or (below is not None and capability >= below):
            return False
        return device in self._imported or self._imports(device)

    def _imports(self, device: torch.device) -> bool:
        try:
            import_module(f"qvg_paged.kernels.{self._module}")
        except Exception as error:  # whatever another release of Triton raises
            self.give_up(device, error)
            return False
        self._imported.add(device)
        return True

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Launches of the kernel: what a compiler raises, told from what a device does, becomes `NotCompiled`."""
        from triton.errors import TritonError  # noqa: PLC0415 - triton is only loaded where it is used

        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (TritonError, RuntimeError, AttributeError, TypeError) as error:
            raise NotCompiled(self, error) from error

    def give_up(self, device: torch.device, error: Exception) -> None:
        """Leave `device` to other kernels from now on, and say why."""
        self.given_up.add(device)
        reason = str(error).strip().splitlines()[:1]
        warnings.warn(
            f"{self._fallback} on {device}: Triton {version('triton')} does not compile the Gluon one "
            f"({type(error).__name__}{': ' * bool(reason)}{''.join(reason)})",
            RuntimeWarning,
            stacklevel=2,
        )
