from common import AGAIN, main, read_file
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


def talk(address, question):
    provider = OpenAIProvider(base_url=f"{address}/v1", api_key="none")
    agent = Agent(OpenAIResponsesModel("any", provider=provider), tools=[read_file])
    first = agent.run_sync(question)
    again = agent.run_sync(AGAIN, message_history=first.all_messages())
    usage = again.usage
    return first.output, again.output, usage.cache_read_tokens


main(talk)
