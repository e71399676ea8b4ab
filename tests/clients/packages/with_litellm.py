import json

import litellm
from common import AGAIN, main, read_file

TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}


def talk(question):
    def ask():
        answer = litellm.completion("openai/any", messages, tools=[TOOL])
        messages.append(answer.choices[0].message)
        return answer

    messages = [{"role": "user", "content": question}]
    (call,) = ask().choices[0].message.tool_calls
    text = read_file(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
    first = ask().choices[0].message.content
    messages.append({"role": "user", "content": AGAIN})
    again = ask()
    return first, again.choices[0].message.content, again.usage.prompt_tokens_details.cached_tokens


main(talk)
