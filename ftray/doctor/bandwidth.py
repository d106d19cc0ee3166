"""Do the nodes reach each other, and how fast? Plain TCP streams between all pairs, each direction by itself."""

import secrets
import socket
import statistics
import threading
import time
from collections.abc import Iterator

from ftray.doctor.checks import Finding

SEND_S = 0.5
CONNECT_S = 5.0
CHUNK = b"\0" * (1 << 20)
NONCE_BYTES = 16
MUCH_SLOWER = 4  # than the median


class Peer:
    """An actor of Ray's on each node: receives from the others, and sends to one when it is told to."""

    def __init__(self, address: str, nonce: bytes):
        self._nonce = nonce  # strangers are not listened to
        self._server = socket.create_server((address, 0))
        threading.Thread(target=self._receive, daemon=True).start()

    def port(self) -> int:
        return self._server.getsockname()[1]

    def _receive(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                connection.settimeout(CONNECT_S)
                try:
                    if not secrets.compare_digest(connection.recv(NONCE_BYTES, socket.MSG_WAITALL), self._nonce):
                        continue
                    received = 0
                    while count := len(connection.recv(len(CHUNK))):
                        received += count
                    connection.sendall(received.to_bytes(8, "big"))
                except OSError:
                    continue

    def send(self, address: str, port: int) -> float | str:
        """Bytes a second that arrived there, or why none did."""
        try:
            with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
                connection.sendall(self._nonce)
                began = time.perf_counter()
                while time.perf_counter() - began < SEND_S:
                    connection.sendall(CHUNK)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(CONNECT_S + SEND_S * 10)  # a slow link has a queue
                reported = connection.recv(8, socket.MSG_WAITALL)
                if len(reported) < 8:
                    return "another program answers there"
                return int.from_bytes(reported, "big") / (time.perf_counter() - began)
        except OSError as error:
            return str(error)


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every ordered pair once, no machine twice in a round: the circle method, each round in both directions."""
    seats: list[int | None] = [*range(count)]
    if count % 2:
        seats.append(None)
    half = len(seats) // 2
    for _ in range(len(seats) - 1):
        pairs = [
            (a, b) for a, b in zip(seats[:half], reversed(seats[half:]), strict=True) if a is not None and b is not None
        ]
        yield pairs
        yield [(b, a) for a, b in pairs]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def judge_links(rates: dict[tuple[str, str], float | str]) -> list[Finding]:
    """`rates`: of (from, to)."""
    findings = [
        Finding(
            "failed", "link", f"{a} does not reach {b}: {rate}", "open all ports between the nodes; look at routes", a
        )
        for (a, b), rate in rates.items()
        if isinstance(rate, str)
    ]
    measured = {link: rate for link, rate in rates.items() if not isinstance(rate, str)}
    if not measured:
        return findings
    median = statistics.median(measured.values())
    slow = {link: rate for link, rate in measured.items() if rate * MUCH_SLOWER < median}
    findings += [
        Finding(
            "warning",
            "link",
            f"{a} -> {b}: {describe(rate)}, the median is {describe(median)}",
            "look at cable, switch port, MTU and what else runs there: a step waits for the slowest",
            a,
        )
        for (a, b), rate in slow.items()
    ]
    slowest = min(measured, key=lambda link: measured[link])
    text = f"{len(measured)} links over TCP, median {describe(median)}, slowest {describe(measured[slowest])}"
    return [*findings, Finding("ok", "bandwidth", f"{text} ({slowest[0]} -> {slowest[1]})")]


def describe(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.2g} Gbit/s"
