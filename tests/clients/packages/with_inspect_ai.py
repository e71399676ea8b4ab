from tempfile import TemporaryDirectory

from common import AGAIN, main, read_file
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, solver, use_tools
from inspect_ai.tool import tool


@tool(name="read_file")
def reader():
    async def read(path: str) -> str:
        """Reads a file.

        Args:
            path: of the file.
        """
        return read_file(path)

    return read


@solver
def again():
    async def ask(state, generate):
        state.metadata["first"] = state.output.completion
        state.messages.append(ChatMessageUser(content=AGAIN))
        return await generate(state)

    return ask


def talk(question):
    steps = [use_tools(reader()), generate(), again()]
    task = Task([Sample(question, target="heron")], solver=steps, scorer=includes())
    with TemporaryDirectory() as folder:
        (log,) = eval(task, model="openai/any", log_dir=folder, display="none")
        assert log.status == "success", log.error
        (sample,) = log.samples  # read from the folder
    return sample.metadata["first"], sample.output.completion, sample.output.usage.input_tokens_cache_read


main(talk)
