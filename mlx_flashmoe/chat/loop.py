"""The chat itself: reads messages and commands until there are no more."""

from __future__ import annotations

from mlx_flashmoe.chat.commands import Commands
from mlx_flashmoe.chat.conversation import Conversation
from mlx_flashmoe.chat.editor import Reader
from mlx_flashmoe.chat.view import PlainView, TerminalView
from mlx_flashmoe.errors import FlashMoEError


def chat(conversation: Conversation, reader: Reader, view: TerminalView | PlainView) -> None:
    """Returns when the user leaves.

    Raises:
        FlashMoEError, KeyboardInterrupt: only from a pipe, where there is no user who could react to them.
    """
    commands = Commands(conversation, view)
    if reader.interactive:
        view.note("/help lists commands. Alt-Enter begins a new line, Ctrl-C stops an answer.")
    unsent = ""
    while not commands.done:
        try:
            text = reader.read(unsent)
            unsent = ""
            if not text.strip():
                continue
            if commands.is_command(text):
                commands.run(text)
                text, commands.again = commands.again, ""
                unsent, commands.edited = commands.edited, ""
                if not text:
                    continue
            conversation.say(text)
            unsent = conversation.unsent
            if conversation.stopped:
                # Neither are the messages sent that were typed after the one that was stopped.
                reader.drop_typed()
                view.note("stopped")
                if not reader.interactive:
                    raise KeyboardInterrupt
        except EOFError:
            return
        except KeyboardInterrupt:
            if not reader.interactive:
                raise
        except FlashMoEError as e:
            if not reader.interactive:
                raise
            unsent = conversation.unsent
            if unsent:
                reader.drop_typed()
            view.error(str(e))
