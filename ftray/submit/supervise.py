"""`python -m ftray.submit.supervise RETRIES -- COMMAND ...`: a job's driver, started again when it dies.

A driver that ends by itself, whatever its exit code says, has ended: a mistake stays one on every try. One that a
signal took (out of memory, a crash in a library) is started again, and goes on from its checkpoint as the same command
does. It stands between Ray's job supervisor and the driver, on the node where the job runs; no client is needed for it.
"""

import signal
import subprocess
import sys
import time

PAUSE_S = 5.0
ASKED = (signal.SIGTERM, signal.SIGINT)  # to end: passed on, never a reason to start again


def supervise(command: list[str], *, retries: int) -> int:
    """The exit code of the last try; 128 + N where signal N took it."""
    asked = False
    process: subprocess.Popen | None = None

    def ask(number: int, _: object) -> None:
        nonlocal asked
        asked = True
        if process is not None and process.poll() is None:
            process.send_signal(number)

    for number in ASKED:
        signal.signal(number, ask)
    for left in reversed(range(retries + 1)):
        process = subprocess.Popen(command)
        if asked:  # meanwhile
            process.terminate()
        code = process.wait()
        if code >= 0:
            return code
        if asked or left == 0:
            return 128 - code
        print(f"the driver died of {signal.Signals(-code).name}; starts again, {left} tries left", flush=True)
        time.sleep(PAUSE_S)
        if asked:
            return 128 - code
    raise AssertionError("unreachable")


def main() -> None:
    retries, separator, *command = sys.argv[1:]
    if separator != "--" or not command:
        sys.exit("usage: python -m ftray.submit.supervise RETRIES -- COMMAND ...")
    sys.exit(supervise(command, retries=int(retries)))


if __name__ == "__main__":
    main()
