"""Ray's workers and the product's child processes, forked from a process that has imported what they import: a worker
of Ray Train that starts anew spends eight seconds of CPU on that, a process that prepares data five, an actor without
torch two. What they then run is the same program.

Both are started by a path to Python. `warm_python` gives that of a small program which hands its command, environment,
directory and open files to the warm process; what is neither goes on as the real Python.
"""

import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Nothing that imports Ray: it reads the settings of its process, the job's number among them, where it is loaded.
PRELOADED = (
    "deepspeed",
    "fastapi",
    "ftray.train.loop",
    "ftray.train.engine.build",
    "ftray.train.hooks.callbacks",
    "ftray.infer.torch_engine.engine",
    "google.protobuf",
    "grpc.aio",
    "jsonschema",
    "opentelemetry.sdk.metrics",
    "pandas",
    "peft",
    "prometheus_client",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "requests",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "uvicorn",
)
CHILD = "ftray.child_process"
SETUP, WORKER = "setup_worker.py", "default_worker.py"
CONTEXT = "--serialized-runtime-env-context="

# Without site-packages, so that it starts in 20 ms. It is there as long as what it started, and passes SIGTERM on.
SHIM = """#!{python} -ISE
import json, os, signal, socket, sys
command = [{python!r}, *sys.argv[1:]]
if command[1:2] and command[1].endswith({setup!r}) or command[1:3] == ["-m", {child!r}]:
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect({address!r})
        asked = json.dumps([command, dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(warm, [len(asked).to_bytes(8, "little")], [0, 1, 2])
        warm.sendall(asked)
        process = int.from_bytes(warm.recv(8), "little")
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(process, number))
        if command[1] == "-m":
            warm.recv(1)
else:
    os.execv({python!r}, command)
"""


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """Its path; what it started lives on, and it works as long as this process lives."""
    directory = Path(tempfile.mkdtemp(prefix="ftray-warm-"))
    address, shim = str(directory / "socket"), directory / "python"
    shim.write_text(SHIM.format(python=sys.executable, setup=SETUP, child=CHILD, address=address))
    shim.chmod(0o755)
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}  # DeepSpeed reads it when it is imported
    warm = subprocess.Popen([sys.executable, __file__, address], env=environment)
    try:
        end = time.monotonic() + 120
        while not os.path.exists(address):
            assert warm.poll() is None, "the warm process has ended"
            assert time.monotonic() < end, "the warm process did not start"
            time.sleep(0.05)
        yield str(shim)
    finally:
        warm.terminate()
        warm.wait()
        shutil.rmtree(directory)


def serve(address: str) -> None:
    """The warm process."""
    for name in PRELOADED:
        __import__(name)
    assert "ray" not in sys.modules
    assert threading.active_count() == 1, "a process with threads is not to be forked"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who ends is not waited for
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen(64)
        os.rename(f"{address}.new", address)
        listening.settimeout(1)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                asking, _ = listening.accept()
                if os.fork() == 0:
                    listening.close()
                    become(asking)
                asking.close()


def become(asking: socket.socket) -> None:
    """In the forked process: the program that was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, *_ = socket.recv_fds(asking, 8, 3)
    left, parts = int.from_bytes(length, "little"), []
    while left:
        parts.append(asking.recv(left))
        left -= len(parts[-1])
    command, environment, directory = json.loads(b"".join(parts))
    asking.sendall(os.getpid().to_bytes(8, "little"))  # and stays open until this process ends
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    if command[1] == "-m":
        sys.path[:] = [*environment["PYTHONPATH"].split(os.pathsep)]
        sys.argv = command[2:]
        runpy.run_module(CHILD, run_name="__main__")
    else:
        run_worker(command)
    sys.exit(0)


def run_worker(command: list[str]) -> None:
    """What setup_worker.py does, and then Ray's worker."""
    context = next((json.loads(word[len(CONTEXT) :]) for word in command if word.startswith(CONTEXT)), {})
    worker = next((i for i, word in enumerate(command) if word.endswith(WORKER)), None)
    if worker is None or context.get("command_prefix") or context.get("override_worker_entrypoint"):
        os.execv(command[0], command)
    os.environ.update(context.get("env_vars") or {})
    if threads := os.environ.get("OMP_NUM_THREADS"):  # Ray's wish, which a library reads where it is loaded
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = [word for word in command[worker:] if not word.startswith((CONTEXT, "--language="))]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
