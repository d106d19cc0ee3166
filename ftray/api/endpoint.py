"""`ftray.serve`: an endpoint from Python, such as a notebook."""

from pathlib import Path
from types import TracebackType
from typing import Any

from ftray.api.config import read_config
from ftray.config import ServeConfig


class Endpoint:
    """A running endpoint; `stop` or the end of a `with` block ends it."""

    def __init__(self, config: ServeConfig, url: str, *, owns_ray: bool):
        self.config = config
        self.url = url  # OpenAI clients take f"{url}/v1"
        self._owns_ray = owns_ray

    def chat(self, model: str, messages: str | list[dict[str, Any]], **settings: Any) -> str:
        """One answer over HTTP. `settings`: further keys of the request, such as temperature."""
        import httpx

        from ftray.errors import FtrayError

        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        body = {"model": model, "messages": turns, **settings}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=300)
        if answer.status_code != 200:
            raise FtrayError(f"{self.url}: {answer.json()['error']['message']}")
        return answer.json()["choices"][0]["message"]["content"]

    def stop(self) -> None:
        import ray

        from ftray.serve.app import stop_endpoint

        stop_endpoint()
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop()


def serve(config: ServeConfig | dict[str, Any] | str | Path, *overrides: str) -> Endpoint:
    """Starts an endpoint of `kind: serve` and returns once it answers; in the caller's Ray session, or one of its own.

    Raises `UserError` before anything is started where config, base, registry or port are wrong.
    """
    settings: ServeConfig = read_config(config, overrides, kind="serve")
    import ray

    from ftray.cluster.session import start_ray
    from ftray.infer.engines import check_engine
    from ftray.serve.app import is_deployed, start_endpoint, stop_endpoint
    from ftray.serve.checks import check_endpoint

    check_engine(settings.engine)
    owns_ray = not ray.is_initialized()
    check_endpoint(settings, in_session=not owns_ray)
    if owns_ray:
        start_ray()
    was_there = is_deployed()
    try:
        return Endpoint(settings, start_endpoint(settings), owns_ray=owns_ray)
    except BaseException:
        if not was_there:
            stop_endpoint()
        if owns_ray:
            ray.shutdown()
        raise
