"""Conversations as token ids: one renderer for training and serving, and what it knows of a chat template."""

from ftray.model.chat.messages import Message, check_messages, read_messages
from ftray.model.chat.renderer import ChatRenderer, Rendered, stop_token_ids

__all__ = ["ChatRenderer", "Message", "Rendered", "check_messages", "read_messages", "stop_token_ids"]
