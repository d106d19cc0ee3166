"""The renderers of one engine's adapters: each renders conversations as its adapter was trained."""

from dataclasses import replace

from ftray.config.chat import ChatConfig
from ftray.model.base import BaseModel, load_tokenizer
from ftray.model.chat import ChatRenderer
from ftray.model.chat.settings import with_chat


class Renderers:
    """For any thread."""

    def __init__(self, base: BaseModel, *, remembers: bool = True):
        self._base = base
        self._tokenizer = load_tokenizer(replace(base, chat=ChatConfig()))
        self._remembers = remembers
        self._made: dict[str, ChatRenderer] = {}

    def of(self, chat: ChatConfig | None) -> ChatRenderer:
        """None: as the base's own `chat` says. Raises `UserError` where the base's tokenizer cannot render so."""
        settings = chat or self._base.chat
        key = settings.model_dump_json()
        renderer = self._made.get(key)
        if renderer is None:
            renderer = ChatRenderer(with_chat(self._tokenizer, settings), remembers=self._remembers)
            renderer = self._made.setdefault(key, renderer)
        return renderer
