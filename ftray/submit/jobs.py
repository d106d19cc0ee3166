"""Jobs on a cluster, from a machine that has only the client: submitted, followed, stopped and gone on with by name.

A run, sweep or endpoint has a name, and on a cluster one job at a time. The job's metadata carry it, so nothing is kept
here: whoever has the config can follow or stop the job from any machine.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ftray import __version__
from ftray.errors import FtrayError, UserError
from ftray.storage.machine import user_name

NAME, KIND, OWNER, DIGEST, VERSION = "ftray_name", "ftray_kind", "ftray_owner", "ftray_config", "ftray_version"
COMMANDS = {"run": "train", "sweep": "sweep", "serve": "serve", "pipeline": "pipeline"}
GRACE_S = 300.0  # for a run to save, before it is ended
END_S = 90  # between SIGTERM and SIGKILL; Ray gives 3, in which an endpoint on a busy head has not left yet
POLL_S = 1.0
CONNECT_S = 3.0
TOKEN_FIX = "set RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)

Log = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a config file and its overrides ask a cluster for."""

    kind: str
    name: str
    config: Path  # inside the working directory
    overrides: tuple[str, ...]
    digest: str  # of the resolved config

    def entrypoint(self, working_dir: Path, *, retries: int) -> str:
        """`jobs/` where the upload has it; else the ftray that the nodes have. A driver that dies is started again."""
        command = COMMANDS[self.kind]
        script = Path("jobs") / f"{command}.py"
        program = ["python", str(script)] if (working_dir / script).is_file() else ["python", "-m", "ftray", command]
        watched = ["python", "-m", "ftray.submit.supervise", str(retries), "--"] if retries else []
        return shlex.join([*watched, *program, self.config.as_posix(), *self.overrides])

    @property
    def metadata(self) -> dict[str, str]:
        return {
            NAME: self.name,
            KIND: self.kind,
            OWNER: user_name(),
            DIGEST: self.digest,
            VERSION: __version__,
        }


def describe_job(kind: str, name: str, config: str, overrides: Sequence[str], *, resolved: Any, root: Path) -> Job:
    """Raises `UserError` where the file would not be in the upload. `root`: the working directory."""
    path = Path(config)
    inside = path if not path.is_absolute() else None
    if path.is_absolute() and path.is_relative_to(root.resolve()):
        inside = path.relative_to(root.resolve())
    if inside is None or ".." in inside.parts:
        raise UserError(f"{config}: lies outside of {root.resolve()}, which is what the job gets; copy it there")
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:12]
    return Job(kind, name, inside, tuple(overrides), digest)


def read_runtime_env(path: str) -> dict[str, Any]:
    """What Ray makes on the nodes for a job. Raises `UserError` for what Ray would refuse there, and for secrets: it is
    all in `ray job list` and in Ray's logs."""
    from ray.runtime_env import RuntimeEnv
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        read = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(read, dict) or "working_dir" in read:
            raise ValueError("give a mapping without working_dir, which is --working-dir")
        RuntimeEnv(**read)
        if secret := next((name for name in read.get("env_vars", {}) if SECRET.search(name)), None):
            raise ValueError(f"env_vars.{secret}: everyone would read it in `ray job list`; set it on the head node")
    except (OSError, YAMLError, TypeError, ValueError) as error:
        raise UserError(f"--runtime-env: {path}: {str(error).strip().splitlines()[0]}") from None
    return read


def with_time_to_end(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Ray's supervisor of a job reads it in its own environment, which is the job's."""
    return runtime_env | {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(END_S)} | (runtime_env.get("env_vars") or {})}


def connect(address: str | None) -> Any:
    """Raises `UserError` with the reason in the user's terms."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # they would tell of every package and connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    check_job_server(address)
    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        reported = str(error).strip().splitlines()[0]
        where = address or "no address was given and RAY_ADDRESS is not set"
        hint = ""
        if "auth" in reported.lower() or "401" in reported or "403" in reported:
            hint = f"; {TOKEN_FIX}"
        raise UserError(f"--address: {where}: {reported}{hint}") from None


def check_job_server(address: str | None) -> None:
    """That an address is a dashboard's and not Ray's own, at which Ray's client would wait. Raises `UserError`."""
    given = address or os.environ.get("RAY_ADDRESS", "")
    if not given or given == "auto":
        return
    source = "--address" if address else "RAY_ADDRESS"
    if "://" not in given:
        raise UserError(
            f"{source}: {given} is no URL; the job server is the dashboard's, such as http://{given.partition(':')[0]}:8265"
        )
    if not given.startswith(("http://", "https://")):
        return
    url = urlsplit(given)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {given}: no job server answers there ({error})") from None


class Jobs:
    def __init__(self, client: Any, *, log: Log):
        self._client = client
        self._log = log

    def running(self, name: str) -> str | None:
        """The job that has this name now."""
        for info in self._client.list_jobs():
            if (info.metadata or {}).get(NAME) == name and not info.status.is_terminal():
                return info.submission_id
        return None

    def submit(self, job: Job, working_dir: Path, *, runtime_env: dict[str, Any], retries: int) -> str:
        """A job that runs under this name already is not started twice. Raises `UserError` where it runs another
        config."""
        if (found := self.running(job.name)) is not None:
            theirs = self._client.get_job_info(found).metadata
            if theirs[DIGEST] != job.digest:
                raise UserError(
                    f"{job.name}: a job of this name runs with another config ({found}, by {theirs[OWNER]}); stop it "
                    "with --stop, or choose another name"
                )
            self._log(f"{job.name} runs already as {found}")
            return found
        submitted = self._client.submit_job(
            entrypoint=job.entrypoint(working_dir, retries=retries),
            submission_id=f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            runtime_env=with_time_to_end(runtime_env) | {"working_dir": str(working_dir)},
            metadata=job.metadata,
        )
        self._log(f"submitted {submitted}")
        return submitted

    def follow(self, submission_id: str) -> int:
        """Prints what the job prints until it ends; returns its exit code. A connection that breaks is made again, and
        goes on after what was printed."""
        printed = 0
        while True:
            printed = asyncio.run(self._tail(submission_id, skip=printed))
            info = self._client.get_job_info(submission_id)
            if info.status.is_terminal():
                self._print_rest(submission_id, skip=printed)
                return self._exit_code(info)
            time.sleep(POLL_S)

    async def _tail(self, submission_id: str, *, skip: int) -> int:
        """Number of characters of the log that are printed now."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(submission_id):
                fresh = text[max(0, skip - seen) :]
                seen += len(text)
                print(fresh, end="", flush=True)
        except (RuntimeError, OSError):
            pass  # the loop above looks whether the job lives
        return max(seen, skip)

    def _print_rest(self, submission_id: str, *, skip: int) -> None:
        text = self._client.get_job_logs(submission_id)
        print(text[skip:], end="", flush=True)

    def _exit_code(self, info: Any) -> int:
        self._log(f"{info.submission_id} {info.status.value.lower()}")
        if info.status.value == "SUCCEEDED":
            return 0
        return info.driver_exit_code or 1

    def stop(self, job: Job, *, runs_dir: str | None, working_dir: Path, runtime_env: dict[str, Any]) -> None:
        """A run saves first. `runs_dir`: of a run. Raises `UserError` where none runs."""
        found = self.running(job.name)
        if found is None:
            raise UserError(f"{job.name}: no job of this name runs")
        if runs_dir is not None:
            asking = self._client.submit_job(
                entrypoint=shlex.join(["python", "-m", "ftray", "runs", "stop", job.name, "--runs-dir", runs_dir]),
                runtime_env=runtime_env | {"working_dir": str(working_dir)},
                metadata={NAME: f"{job.name}/stop", OWNER: user_name()},
            )
            self._log(f"{found} is asked to save and end")
            self._wait(asking, timeout_s=GRACE_S)
            if self._client.get_job_info(asking).status.value == "SUCCEEDED" and self._wait(found, timeout_s=GRACE_S):
                return
        self._client.stop_job(found)
        if not self._wait(found, timeout_s=GRACE_S):
            raise FtrayError(f"{found} does not end; look at the cluster's dashboard")

    def _wait(self, submission_id: str, *, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self._client.get_job_info(submission_id).status.is_terminal():
                self._log(f"{submission_id} has ended")
                return True
            time.sleep(POLL_S)
        return False
