from agents import Agent, Runner, SQLiteSession, function_tool, set_tracing_disabled
from common import AGAIN, main, read_file


def talk(question):
    set_tracing_disabled(True)
    agent = Agent("reader", instructions="You read files.", tools=[function_tool(read_file)], model="any")
    session = SQLiteSession("one")
    first = Runner.run_sync(agent, question, session=session)
    again = Runner.run_sync(agent, AGAIN, session=session)
    usage = again.context_wrapper.usage
    return first.final_output, again.final_output, usage.input_tokens_details.cached_tokens


main(talk)
