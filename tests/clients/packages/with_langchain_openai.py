from chain import talk
from common import main
from langchain_openai import ChatOpenAI

main(lambda address, question: talk(ChatOpenAI(model="any", base_url=f"{address}/v1", api_key="none"), question))
