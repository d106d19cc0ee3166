"""`ftray.load`: a model in this process, with adapters swapped under it."""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftray.api.local import base_of, load_engine, resolve_adapter
from ftray.config.chat import ChatConfig
from ftray.errors import UserError
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request, SamplingParams, TokenEvent
from ftray.infer.renderers import Renderers
from ftray.infer.thoughts import split, thought_stream
from ftray.model.base import kept_chat

if TYPE_CHECKING:
    from ftray.infer.torch_engine.engine import TorchEngine

Messages = str | list[dict[str, Any]]  # a text is one user turn


class Model:
    """A base in memory; any of its adapters answers when it is named, and is loaded then."""

    def __init__(self, engine: "TorchEngine", adapter: str | None, *, registry: str):
        self.engine = engine
        self.adapter = adapter  # that answers where a call names none; None: the base
        self._registry = registry
        self._renderers = Renderers(engine.base)
        self._chats: dict[str | None, ChatConfig | None] = {
            None: kept_chat(engine.base.directory) or ChatConfig(),
            adapter: engine.base.chat,
        }  # of adapters, by key
        self._num_requests = 0
        self._events: dict[str, deque[TokenEvent]] = {}  # of streams that are being read

    def use(self, adapter: str | None) -> "Model":
        """From now on this one answers: NAME@VERSION, NAME@ALIAS, a PEFT directory; None: the base."""
        self.adapter = self._loaded(adapter)
        return self

    def chat(self, messages: Messages, *, adapter: str | None = None, **sampling: Any) -> str:
        """The answer. `sampling`: keys of `SamplingParams`, such as temperature=0 and max_tokens=64."""
        return "".join(self.stream(messages, adapter=adapter, **sampling))

    def stream(self, messages: Messages, *, adapter: str | None = None, **sampling: Any) -> Iterator[str]:
        """The answer in pieces, as they come; what the model thinks before it is left out."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        key = self.adapter if adapter is None else self._loaded(adapter)
        self._num_requests += 1
        renderer = self._renderers.of(self._chats[key])
        stops = frozenset(renderer.stop_ids)
        ends = self.engine.stop_ids | stops
        request = Request(
            f"chat-{self._num_requests}",
            renderer.prompt_ids(turns),
            SamplingParams(**sampling),
            key,
            stop_ids=stops,
        )
        if request.sampling.n != 1:
            raise UserError("n: a chat has one answer; call it several times")
        frame = renderer.template.thought_frame
        thoughts = thought_stream(frame, self.engine.tokenizer, request.prompt_ids)
        self.engine.add(request)
        mine = self._events[request.id] = deque()
        try:
            while mine or self.engine.has_work:
                if not mine:
                    self._step()
                while mine:
                    event = mine.popleft()
                    yield event.text if thoughts is None else split(event, thoughts, ends)[1]
                    if event.finish_reason is not None:
                        return
        finally:
            self.engine.cancel(request.id)  # whoever stops reading leaves nothing behind
            del self._events[request.id]

    def _step(self) -> None:
        """Several streams may be read in turn: each gets its own."""
        for event in self.engine.step():
            if event.request_id in self._events:
                self._events[event.request_id].append(event)

    def close(self) -> None:
        """Frees its memory."""
        self.engine.close()

    def _loaded(self, adapter: str | None) -> str | None:
        if adapter is None:
            return None
        found = resolve_adapter(adapter, self._registry, self.engine.base)
        if found.key not in self.engine.stats().adapters:
            load_adapter(self.engine, found.key, found.directory)
        self._chats[found.key] = found.chat
        return found.key


def load(model: str, *, registry: str = "registry", base_model: str | None = None, context_tokens: int = 2048) -> Model:
    """A base model, or an adapter over its base (NAME@VERSION, NAME@ALIAS, a PEFT directory). `base_model`: of an
    adapter that does not say which it was trained for."""
    base, adapter = base_of(model, registry, base_model=base_model)
    engine, key = load_engine(base, adapter, registry, context_tokens=context_tokens)
    return Model(engine, key, registry=registry)
