from chain import talk
from common import main
from langchain_openai import ChatOpenAI

main(lambda question: talk(ChatOpenAI(model="any"), question))
