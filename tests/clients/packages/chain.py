from common import AGAIN, read_file
from langchain_core.tools import tool


def talk(model, question):
    """Asks a chat model of LangChain's, which reads the file when it wants to."""
    reader = tool(read_file)
    model = model.bind_tools([reader])
    messages = [("user", question)]
    asked = model.invoke(messages)
    messages += [asked, *(reader.invoke(call) for call in asked.tool_calls)]
    first = model.invoke(messages)
    messages += [first, ("user", AGAIN)]
    again = model.invoke(messages)
    return first.text, again.text, again.usage_metadata["input_token_details"]["cache_read"]
