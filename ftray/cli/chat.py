"""`ftray chat`"""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ftray.cli.arguments import RegistryOption


def chat(
    model: Annotated[str, typer.Argument(help="An adapter (NAME, NAME@N, NAME@ALIAS) or a base model.")],
    url: Annotated[
        str | None, typer.Option(help="Talk to a running endpoint; without it, a model in this process.")
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

    def ask(messages: list[dict]) -> Iterator[str]:
        body = {
            "model": model,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "stream": True,
        }
        address = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        try:
            with httpx.stream("POST", address, json=body, timeout=300) as response:
                if response.status_code != 200:
                    problem = json.loads(response.read())["error"]["message"]
                    raise UserError(f"{url}: {problem}")
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise FtrayError(f"{url}: {chunk['error']['message']}")
                        yield chunk["choices"][0]["delta"].get("content", "")
        except httpx.HTTPError as error:
            raise FtrayError(f"{url}: the endpoint does not answer ({error}); is `ftray serve` running?") from None

    return ask
