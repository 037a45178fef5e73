"""What each tenant has had, by the log's own figures, and how far two of them drifted apart while both were in line."""

from stress.ledger import Ledger

__all__ = ["Service"]

FOLLOWED_TENANTS = 8


class Service:
    """Follows the cost units of the tenants of a ledger.

    Attributes:
        largest_gap: largest change of the difference in weighted service of two tenants that were in line all the time.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._dearest = 0.0
        self._slots = 0
        self._gaps: dict[tuple[str, str], tuple[float, float]] = {}
        self.largest_gap = 0.0

    def forget(self) -> None:
        """Weights have changed: gaps count from here."""
        self._gaps = {}

    def charge(self, seconds: float) -> None:
        """What the plan before cost its tenants."""
        ledger = self._ledger
        config, pool = ledger.open["config"], ledger.open["pool_nbytes"]
        roomy = ledger.roomy()
        for tenant, name, nbytes, branches in ledger.held:
            cost = config["chunk_cost"] * branches + config["pool_second_cost"] * seconds * nbytes / pool
            stream = ledger.streams[name]
            stream.spent += cost
            ledger.tenants[tenant].service += cost
            parkable = roomy and stream.backed
            self._dearest = max(self._dearest, cost * config["min_chunks"] if parkable else stream.spent)
        self._slots = max(self._slots, len(ledger.held))

    def follow(self) -> None:
        """The gaps after a plan."""
        tenants = self._ledger.tenants
        names = sorted(self._ledger.places.tenants.keys() & tenants.keys())[:FOLLOWED_TENANTS]
        shares = [(name, tenants[name].service / tenants[name].weight) for name in names]
        gaps: dict[tuple[str, str], tuple[float, float]] = {}
        for place, (one, first) in enumerate(shares):
            for two, second in shares[place + 1 :]:
                gap = first - second
                least, most = self._gaps.get((one, two), (gap, gap))
                least, most = gaps[one, two] = (min(least, gap), max(most, gap))
                self.largest_gap = max(self.largest_gap, most - least)
        self._gaps = gaps

    @property
    def unit(self) -> float:
        """U: the dearest unit that is not interrupted, by weight, times the streams that run together.

        A unit is what a stream finishes before it may be parked, and a policy may let tenants get ahead by some chunks
        before it parks; where not everybody can be parked, it is a whole stream.
        """
        ledger = self._ledger
        least = min((tenant.weight for tenant in ledger.tenants.values()), default=1.0)
        ahead = ledger.open["policy_settings"].get("quantum", 0.0) if ledger.parks else 0.0
        return float(self._dearest / least * (self._slots + ahead))
