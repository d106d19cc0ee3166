"""What a request asks, as token ids."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ftray.infer.calls import answer_stream
from ftray.infer.checks import check_token_ids, too_long
from ftray.infer.protocol import Engine
from ftray.infer.renderers import Renderers
from ftray.infer.thoughts import AnswerStream
from ftray.model.base import BaseModel, chat_in
from ftray.model.chat import ChatRenderer, read_messages
from ftray.registry import Registry
from ftray.serve.protocol import GenerateJob

KNOWN_VERSIONS = 4096  # whose renderers are remembered: they never change


class PromptReader:
    """For any thread: a text of megabytes takes seconds."""

    def __init__(self, engine: Engine, base: BaseModel, registry: Registry, *, context_tokens: int):
        self._engine = engine
        self._context_tokens = context_tokens
        self._longest_token = max(map(len, engine.tokenizer.get_vocab()))
        # Nothing is remembered: nobody may learn by the time what others have asked.
        renderers = Renderers(base, remembers=False)

        def of_version(adapter: str | None) -> ChatRenderer:
            return renderers.of(chat_in(registry.get(adapter).metadata) if adapter is not None else None)

        self._of_version = lru_cache(KNOWN_VERSIONS)(of_version)

    def renderer(self, adapter: str | None) -> ChatRenderer:
        """As the version was trained, where it says so. Raises `FtrayError` where it cannot be read."""
        return self._of_version(adapter)

    def chat(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], *, adapter: str | None = None
    ) -> list[int]:
        """Raises `UserError`."""
        plain = read_messages(messages)
        self._check_length(sum(len(message["content"]) for message in plain), param="messages")
        return self.renderer(adapter).prompt_ids(plain, tools)

    def stop_ids(self, job: GenerateJob) -> frozenset[int]:
        """Of what its adapter was trained to write."""
        return frozenset(self.renderer(job.adapter).stop_ids)

    def streams(self, job: GenerateJob, prompts: list[list[int]]) -> dict[int, AnswerStream]:
        """Of thoughts and calls, by number of the answer. One that a structure guides has none: it is what it must be
        from its beginning."""
        if not job.is_chat or job.echo or job.sampling.structure is not None:
            return {}
        template, tokenizer, n = self.renderer(job.adapter).template, self._engine.tokenizer, job.sampling.n
        # A stop string may stand within a mark: then calls are read as the text that they are.
        tools = job.tools if not job.sampling.stop else ()
        answers = [(number, prompts[number // n]) for number in range(job.num_answers)]
        streams = {number: answer_stream(template, tokenizer, prompt, tools=tools) for number, prompt in answers}
        return {number: stream for number, stream in streams.items() if stream is not None}

    def text(self, text: str | list[int], *, key: str, with_special: bool = True) -> list[int]:
        """Raises `UserError`, naming `key`."""
        if isinstance(text, str):
            self._check_length(len(text), param=key)
            return self._engine.tokenizer(text, add_special_tokens=with_special)["input_ids"]
        check_token_ids(text, key=key, vocab_size=self._engine.vocab_size)
        return list(text)

    def _check_length(self, num_characters: int, *, param: str) -> None:
        """Before anything is tokenised: so many characters are more tokens than fit, whichever they are."""
        least = num_characters // self._longest_token
        if least > self._context_tokens:
            raise too_long(f"at least {least}", context_tokens=self._context_tokens, param=param)
