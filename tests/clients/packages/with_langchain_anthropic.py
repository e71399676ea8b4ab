from chain import talk
from common import main
from langchain_anthropic import ChatAnthropic

main(lambda address, question: talk(ChatAnthropic(model="any", base_url=address, api_key="none"), question))
