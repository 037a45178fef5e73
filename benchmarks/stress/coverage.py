"""Which faults hit streams in which phase, over many runs."""

from collections import Counter
from collections.abc import Mapping

from stress.faults import FAULTS
from stress.run import PHASES

__all__ = ["missing_faults", "print_matrix", "rows"]

Fired = Mapping[tuple[str, str], int]


def rows(fired: Fired) -> list[dict[str, object]]:
    """One row per fault and phase that was seen."""
    return [{"fault": fault, "phase": phase, "count": count} for (fault, phase), count in sorted(fired.items())]


def missing_faults(fired: Fired) -> list[str]:
    """Faults that never happened."""
    seen = {fault for fault, _ in fired}
    return [fault for fault in FAULTS if fault not in seen]


def print_matrix(fired: Fired) -> str:
    """The counts as text: faults down, phases across."""
    total: Counter[str] = Counter()
    for (fault, _), count in fired.items():
        total[fault] += count
    names = [*FAULTS, *sorted(set(total) - set(FAULTS))]
    phases = [phase or "(no stream)" for phase in PHASES]
    lines = [" " * 18 + "".join(f"{phase:>12}" for phase in phases)]
    for fault in names:
        counts = [fired.get((fault, phase), 0) for phase in PHASES]
        lines.append(f"{fault:<18}" + "".join(f"{count or '.':>12}" for count in counts))
    pairs = sum(count > 0 for count in fired.values())
    lines.append(
        f"{pairs} pairs of phase and fault, {sum(total.values())} faults, never fired: {missing_faults(fired)}"
    )
    return "\n".join(lines)
