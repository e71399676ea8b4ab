from chain import talk
from common import main
from langchain_anthropic import ChatAnthropic


def model(address):
    return ChatAnthropic(model="any", base_url=address, api_key="none")


main(lambda address, question: talk(model(address), question))
