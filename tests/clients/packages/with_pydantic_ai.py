from common import AGAIN, main, read_file
from pydantic_ai import Agent


def talk(question):
    agent = Agent("openai:any", tools=[read_file])
    first = agent.run_sync(question)
    again = agent.run_sync(AGAIN, message_history=first.all_messages())
    usage = again.usage
    return first.output, again.output, usage.cache_read_tokens


main(talk)
