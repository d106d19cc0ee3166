"""`ftray chat`"""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from ftray.cli.arguments import RegistryOption

if TYPE_CHECKING:
    import httpx


def chat(
    model: Annotated[str, typer.Argument(help="An adapter (NAME, NAME@N, NAME@ALIAS) or a base model.")],
    url: Annotated[
        str | None,
        typer.Option(
            help="Talk to a running endpoint (its key in OPENAI_API_KEY, if it asks); else to a model in this process."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    registry: RegistryOption = "registry",
) -> None:
    """Talk with a model. An empty line or Ctrl-D ends; /new starts over."""
    start = [{"role": "system", "content": system}] if system else []
    ask = (
        over_http(url, model, temperature, max_tokens) if url else in_process(model, registry, temperature, max_tokens)
    )
    messages = list(start)
    while (line := read_line()) is not None:
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        for text in ask(messages):
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})


def read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip() or None
    except EOFError:
        return None


def in_process(model: str, registry: str, temperature: float, max_tokens: int):
    from ftray.api.model import load

    loaded = load(model, registry=registry)

    def ask(messages: list[dict]) -> Iterator[str]:
        return loaded.stream(messages, temperature=temperature, max_tokens=max_tokens)

    return ask


def over_http(url: str, model: str, temperature: float, max_tokens: int):
    import json

    import httpx

    from ftray.errors import FtrayError, UserError

    endpoint = f"{url.rstrip('/').removesuffix('/v1')}/v1"
    check_model(endpoint, model)

    def ask(messages: list[dict]) -> Iterator[str]:
        body = {
            "model": model,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "stream": True,
        }
        try:
            with httpx.stream(
                "POST", f"{endpoint}/chat/completions", json=body, headers=key(), timeout=300
            ) as response:
                if response.status_code != 200:
                    raise UserError(f"{url}: {problem_of(response)}")
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise FtrayError(f"{url}: {chunk['error']['message']}")
                        yield chunk["choices"][0]["delta"].get("content", "")
        except httpx.HTTPError as error:
            raise silent(url, error) from None

    return ask


def check_model(endpoint: str, model: str) -> None:
    """Before anything is typed. Raises `UserError`."""
    import httpx

    from ftray.errors import UserError

    try:
        response = httpx.get(f"{endpoint}/models/{quote(model)}", headers=key(), timeout=30)
    except httpx.HTTPError as error:
        raise silent(endpoint, error) from None
    if response.status_code != 200:
        raise UserError(f"{endpoint}: {problem_of(response)}")


def key() -> dict[str, str]:
    """As OpenAI's clients find it."""
    found = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {found}"} if found else {}


def problem_of(response: "httpx.Response") -> str:
    """What the endpoint says, or something in between."""
    from ftray.cli.rollout import message_of

    response.read()
    return message_of(response)


def silent(url: str, error: Exception) -> Exception:
    from ftray.errors import FtrayError

    return FtrayError(f"{url}: the endpoint does not answer ({error}); is `ftray serve` running?")
