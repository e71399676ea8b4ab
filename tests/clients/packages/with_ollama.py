from common import AGAIN, main, read_file
from ollama import Client


def talk(question):
    client = Client()
    (model,) = client.list().models
    assert "tools" in client.show(model.model).capabilities
    messages = [{"role": "user", "content": question}]
    asked = client.chat(model.model, messages, tools=[read_file]).message
    messages.append(asked)
    for call in asked.tool_calls:
        text = read_file(**call.function.arguments)
        messages.append({"role": "tool", "tool_name": call.function.name, "content": text})
    stream = client.chat(model.model, messages, tools=[read_file], stream=True)
    first = "".join(part.message.content for part in stream)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": AGAIN}]
    again = client.chat(model.model, messages, tools=[read_file])
    return first, again.message.content, None


main(talk)
