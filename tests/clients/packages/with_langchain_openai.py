from chain import talk
from common import main
from langchain_openai import ChatOpenAI


def model(address):
    return ChatOpenAI(model="any", base_url=f"{address}/v1", api_key="none")


main(lambda address, question: talk(model(address), question))
