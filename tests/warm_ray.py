"""Ray's workers, forked from a process that has imported what they import: one of Ray Train that starts anew spends
eight seconds of CPU on that, an actor without torch two. What a worker then runs is Ray's own program, unchanged.

Raylets start workers by `sys.executable`. `forking_python` puts a small program in its place that hands the command,
environment, directory and open files to the warm process; what is not a worker goes on as the real Python.
"""

import contextlib
import json
import os
import runpy
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
SETUP, WORKER = "setup_worker.py", "default_worker.py"
CONTEXT = "--serialized-runtime-env-context="

# Started by the raylet for each process: no site-packages, so that it starts in 20 ms.
SHIM = """#!{python} -ISE
import json, os, socket, sys
command = [{python!r}, *sys.argv[1:]]
if len(command) > 1 and command[1].endswith({setup!r}):
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect({address!r})
        asked = json.dumps([command, dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(warm, [len(asked).to_bytes(8, "little")], [0, 1, 2])
        warm.sendall(asked)
        warm.recv(1)
else:
    os.execv({python!r}, command)
"""


@contextlib.contextmanager
def forking_python() -> Iterator[None]:
    """Sessions that start in it fork their workers, as long as this process lives."""
    directory = Path(tempfile.mkdtemp(prefix="ftray-warm-"))
    address = str(directory / "socket")
    real, shim = sys.executable, directory / "python"
    shim.write_text(SHIM.format(python=real, setup=SETUP, address=address))
    shim.chmod(0o755)
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}  # DeepSpeed reads it when it is imported
    subprocess.Popen([real, __file__, address], env=environment, stdin=subprocess.PIPE)  # ends with our end of the pipe
    end = time.monotonic() + 120
    while not os.path.exists(address):
        assert time.monotonic() < end, "the warm process did not start"
        time.sleep(0.05)
    sys.executable = str(shim)
    try:
        yield
    finally:
        sys.executable = real


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
                    become_worker(asking)
                asking.close()


def become_worker(asking: socket.socket) -> None:
    """In the forked process: what setup_worker.py does, and then Ray's worker."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, *_ = socket.recv_fds(asking, 8, 3)
    left, parts = int.from_bytes(length, "little"), []
    while left:
        parts.append(asking.recv(left))
        left -= len(parts[-1])
    command, environment, directory = json.loads(b"".join(parts))
    asking.close()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    context = next((json.loads(word[len(CONTEXT) :]) for word in command if word.startswith(CONTEXT)), {})
    worker = next((i for i, word in enumerate(command) if word.endswith(WORKER)), None)
    if worker is None or context.get("command_prefix") or context.get("override_worker_entrypoint"):
        os.execv(command[0], command)
    os.environ.update(context.get("env_vars") or {})
    if threads := os.environ.get("OMP_NUM_THREADS"):  # Ray's wish, which a library reads where it is loaded
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = command[worker:]
    sys.argv = [word for word in sys.argv if not word.startswith((CONTEXT, "--language="))]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
