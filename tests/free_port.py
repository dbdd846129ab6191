"""Ports for tests, so that two copies of the suite run side by side."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux gives to outgoing connections: nobody takes one between here and use.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    # Hypothesis and tests seed `random`; two suites with one seed would ask for the same ports.
    drawn = random.SystemRandom()
    while True:
        port = drawn.choice(PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
