from chain import talk
from common import main
from langchain_anthropic import ChatAnthropic

main(lambda question: talk(ChatAnthropic(model="any"), question))
