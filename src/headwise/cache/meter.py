"""How many bytes of keys and values a cache has held at most."""


class Meter:
    """The most bytes that the layers of a cache have held at once. Layers tell it; it does not hold on to them."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.peak = 0
        self.uncut_peak = 0  # before anything was cut

    def report(self, layer: int, nbytes: int) -> None:
        """A layer (by its index in the model) now holds so many bytes."""
        self.held[layer] = nbytes
        self.peak = max(self.peak, sum(self.held.values()))

    def start_cutting(self) -> None:
        """A layer is about to be cut."""
        self.uncut_peak = self.uncut_peak or self.peak

    def fork(self) -> "Meter":
        """For a cache that goes on from here."""
        twin = Meter()
        twin.held, twin.peak, twin.uncut_peak = dict(self.held), self.peak, self.uncut_peak
        return twin
