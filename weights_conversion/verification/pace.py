"""How far the two proofs may be apart that run side by side."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from weights_conversion.mapping.parameters import Instance, Role

LAYERS_AHEAD = 1


class Stopped(Exception):
    """The other proof has failed."""


class Pace:
    """How far both proofs are. May be used from several threads; once one of them has ended, nobody waits any more.

    Stations are what is compared before the forward pass needs it: 0 is the embedding, then each layer, then the rest.
    """

    def __init__(self, layers: int, parameters: Sequence[Instance]) -> None:
        self._layers, self._changed = layers, threading.Condition()
        self._left = Counter(self.station(instance) for instance in parameters)
        self._running, self._free, self._stopped = 1, False, False

    def station(self, instance: Instance) -> int:
        if instance.row.role is Role.EMBEDDING:
            return 0
        return self._layers + 1 if instance.layer is None or instance.predicts else instance.layer + 1

    def compares(self, instance: Instance) -> None:
        """Called before a piece of a parameter is compared: waits while that is too far ahead of the forward pass."""
        station = self.station(instance)
        with self._changed:
            self._changed.wait_for(
                lambda: self._free or self._stopped or station <= self._running + LAYERS_AHEAD
            )  # fmt: skip
            if self._stopped:
                raise Stopped

    def has_compared(self, instance: Instance) -> None:
        """Called when the last piece of a parameter has been."""
        with self._changed:
            self._left[self.station(instance)] -= 1
            self._changed.notify_all()

    def runs(self, layer: int) -> None:
        """Called before a layer is run, and with their number before what follows: waits until it is compared."""
        with self._changed:
            self._running = layer + 1
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._free or self._stopped or not any(self._left[at] > 0 for at in range(layer + 2))
            )  # fmt: skip
            if self._stopped:
                raise Stopped

    def free(self) -> None:
        with self._changed:
            self._free = True
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
