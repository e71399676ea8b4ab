"""The terminal chat: a conversation with a model, its tools, and what it looks like."""
