"""Conversations: chat templates, token ids, an exact mask of the assistant's words, and prompts to be answered.

chat = load_chat_format(load_tokenizer("tokenizer"), "llama-3")
ids, mask = chat.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
"""

from __future__ import annotations

from longspan.data.chat.continued import BRANCHES
from longspan.data.chat.encoder import ChatTokens
from longspan.data.chat.format import ChatFormat, load_chat_format
from longspan.data.chat.messages import Message, MessagesError, as_messages
from longspan.data.chat.prompt import ChatPrompt
from longspan.data.chat.template import shipped_templates

__all__ = [
    "BRANCHES",
    "ChatFormat",
    "ChatPrompt",
    "ChatTokens",
    "Message",
    "MessagesError",
    "as_messages",
    "load_chat_format",
    "shipped_templates",
]
