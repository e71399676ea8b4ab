"""The Responses API: items in, items and events out, and the openai package as it is."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytest.importorskip("uvicorn")

from test_server import SCHEMA, call, running  # noqa: E402

from mlx_flashmoe.server.errors import ApiError  # noqa: E402
from mlx_flashmoe.server.responses_events import Output  # noqa: E402
from mlx_flashmoe.server.responses_input import Conversation, as_items, seal  # noqa: E402
from mlx_flashmoe.server.responses_store import ResponseStore  # noqa: E402
from mlx_flashmoe.server.responses_tools import ClientTools  # noqa: E402
from mlx_flashmoe.tools import CallDelta, CallStart, Event, Text, Thinking, ToolCall  # noqa: E402

TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}
PATCH = {"type": "custom", "name": "patch", "description": "Changes files", "format": {"type": "text"}}
SPACES = [
    {"type": "namespace", "name": "mcp__a__", "tools": [TOOL, {"name": "same"}]},
    {"type": "namespace", "name": "team_v1", "tools": [{"type": "function", "name": "same"}, PATCH]},
]
TOOLS = [TOOL, PATCH, *SPACES, {"type": "web_search"}, {"type": "mcp", "server_label": "x"}]
CALLS = f"SAY(Let me see.\n\n{call(place='Zürich', days=3)}\n{call(place='42', days=1)})"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as (address, _):
        yield address


@pytest.fixture
def gpt(address: str) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def messages(given: Any, instructions: Any = None, tools: Any = None) -> list[dict[str, Any]]:
    return Conversation(as_items(given), instructions, ClientTools(tools)).messages


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def made(name: str, arguments: Any, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# Input


REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None}
FUNCTION = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "done"}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]}

TABLE: list[tuple[str, Any, list[dict[str, Any]]]] = [
    ("text", "hi", [user("hi")]),
    ("nothing", [], [user("")]),
    ("message without a type", [{"role": "user", "content": "hi"}], [user("hi")]),
    ("texts and null among items", ["hi", None], [user("hi")]),
    (
        "developer messages at their place",
        [{"role": "developer", "content": "a"}, user("b"), {"role": "developer", "content": "c"}],
        [{"role": "system", "content": "a"}, user("b"), {"role": "system", "content": "c"}],
    ),
    (
        "parts",
        [
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": t} for t in ("a", "b")],
            }
        ],
        [user("ab")],
    ),
    (
        "one answer is one message",
        [
            user("x"),
            {**REASONING, "content": [{"type": "reasoning_text", "text": "hm"}]},
            SAID,
            FUNCTION,
            {**FUNCTION, "call_id": "c2"},
            RESULT,
            {**RESULT, "call_id": "c2"},
            SAID,
        ],
        [
            user("x"),
            {
                "role": "assistant",
                "content": "ok",
                "reasoning_content": "hm",
                "tool_calls": [made("f", {"a": 1}, "c1"), made("f", {"a": 1}, "c2")],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
            {"role": "tool", "tool_call_id": "c2", "content": "done"},
            {"role": "assistant", "content": "ok"},
        ],
    ),
    (
        "reasoning after an answer begins another",
        [
            user("x"),
            SAID,
            {**REASONING, "summary": [{"type": "summary_text", "text": "hm"}]},
            SAID,
        ],
        [
            user("x"),
            {"role": "assistant", "content": "ok"},
            {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
        ],
    ),
    (
        "encrypted thinking: ours is read, others' is not",
        [
            user("x"),
            {**REASONING, "encrypted_content": seal("hm ✓")},
            FUNCTION,
            RESULT,
            {**REASONING, "encrypted_content": "gAAAA-of-another-server"},
            {**REASONING, "encrypted_content": "mlx-flashmoe:%%%"},
            SAID,
        ],
        [
            user("x"),
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hm ✓",
                "tool_calls": [made("f", {"a": 1}, "c1")],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
            {"role": "assistant", "content": "ok"},
        ],
    ),
    (
        "results in the order of the calls",
        [
            user("x"),
            FUNCTION,
            {**FUNCTION, "call_id": "c2"},
            {**RESULT, "call_id": "c2", "output": "2"},
            {**RESULT, "output": [{"type": "input_text", "text": "1"}]},
        ],
        [
            user("x"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [made("f", {"a": 1}, "c1"), made("f", {"a": 1}, "c2")],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            {"role": "tool", "tool_call_id": "c2", "content": "2"},
        ],
    ),
    (
        "calls with broken arguments, of namespaces, and with free text",
        [
            user("x"),
            {**FUNCTION, "arguments": '{"a": '},
            {**FUNCTION, "call_id": "c2", "namespace": "mcp__b__", "arguments": None},
            {"type": "custom_tool_call", "call_id": "c3", "name": "patch", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "c3", "output": "ok"},
        ],
        [
            user("x"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    made("f", {"arguments": '{"a": '}, "c1"),
                    made("mcp__b__f", {}, "c2"),
                    made("patch", {"input": "*** Begin"}, "c3"),
                ],
            },
            {"role": "tool", "tool_call_id": "c3", "content": "ok"},
        ],
    ),
    (
        "items of tools that others run are skipped",
        [
            user("x"),
            {"type": "web_search_call", "id": "ws", "status": "completed", "action": {"type": "search"}},
            {"type": "compaction", "encrypted_content": "x"},
            {"type": "from_the_future", "content": [{"text": "y"}]},
            SAID,
        ],
        [user("x"), {"role": "assistant", "content": "ok"}],
    ),
    (
        "an image in a tool's result, and in an older message",
        [
            {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]},
            FUNCTION,
            {**RESULT, "output": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]},
            user("x"),
        ],
        [
            user("[image: this model reads text only and cannot see it]"),
            {"role": "assistant", "content": "", "tool_calls": [made("f", {"a": 1}, "c1")]},
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": "[image: this model reads text only and cannot see it]",
            },
            user("x"),
        ],
    ),
]


@pytest.mark.parametrize(("given", "right"), [pytest.param(*row[1:], id=row[0]) for row in TABLE])
def test_items_become_messages(given: Any, right: list[dict[str, Any]]) -> None:
    assert messages(given) == right
    assert messages(given, "Be kind.") == [{"role": "system", "content": "Be kind."}, *right]


def test_an_image_in_the_newest_message_is_refused_by_name() -> None:
    with pytest.raises(ApiError, match=r"input\.0\.content\.0: input_image is not supported"):
        messages([{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}])


def test_tools_that_items_bring() -> None:
    leading = {"type": "additional_tools", "role": "developer", "tools": [TOOL, {"type": "web_search"}]}
    tools = ClientTools([PATCH])
    conversation = Conversation([leading, user("x")], None, tools)
    assert conversation.messages == [user("x")]
    assert [t["function"]["name"] for t in tools.offered.tools] == ["patch", "weather"]
    assert tools.offered.left_out == {"web_search": 1} and not conversation.loaded

    later = {"type": "tool_search_output", "call_id": "t", "tools": [SPACES[0]]}
    tools = ClientTools([PATCH])
    conversation = Conversation([user("x"), later], None, tools)
    assert [t["function"]["name"] for t in tools.offered.tools] == ["patch"]
    assert [t["function"]["name"] for t in conversation.loaded] == ["mcp__a__weather", "mcp__a__same"]
    assert "mcp__a__weather" in conversation.messages[-1]["content"]


def test_tools_have_names_that_lead_back_to_the_client() -> None:
    tools = ClientTools(TOOLS)
    names = [t["function"]["name"] for t in tools.offered.tools]
    assert names == ["weather", "patch", "mcp__a__weather", "mcp__a__same", "team_v1__same", "team_v1__patch"]
    assert tools.offered.left_out == {"web_search": 1, "mcp": 1}
    assert tools.called("team_v1__same") == ("same", "team_v1", False)
    assert tools.called("team_v1__patch") == ("patch", "team_v1", True)
    assert tools.called("unheard_of") == ("unheard_of", None, False)
    assert (
        tools.choice({"type": "function", "name": "same", "namespace": "mcp__a__"})["name"] == "mcp__a__same"
    )


# Output


NAMES = ["weather", "patch", "mcp__a__same", "team_v1__same", "team_v1__patch"]
PIECES = st.text(min_size=1, max_size=8)
ARGUMENTS = st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=8)), max_size=3)


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """An answer in pieces: thinking, text and calls, in the order in which models write them."""
    events: list[Event] = [Thinking(t) for t in draw(st.lists(PIECES, max_size=3))]
    events += [Text(t) for t in draw(st.lists(PIECES, max_size=3))]
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        custom = name.endswith("patch")
        arguments = {"input": draw(st.text(max_size=8))} if custom else draw(ARGUMENTS)
        events.append(ToolCall(name, arguments, "raw"))
    return events


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a client puts together from events, by the rules of the API."""
    items: list[dict[str, Any]] = []
    for event in json.loads(json.dumps(events)):
        what = event["type"].removeprefix("response.")
        if what == "output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
            continue
        item = items[event["output_index"]]
        if what == "output_item.done":
            added = {**item, "status": event["item"]["status"]}
            if "encrypted_content" in event["item"]:
                added["encrypted_content"] = event["item"]["encrypted_content"]
            assert added == event["item"]
            items[event["output_index"]] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        if what in ("content_part.added", "reasoning_summary_part.added"):
            parts = item["content" if what.startswith("content") else "summary"]
            assert event.get("content_index", event.get("summary_index")) == len(parts)
            parts.append(event["part"])
        elif what in ("content_part.done", "reasoning_summary_part.done"):
            parts = item["content" if what.startswith("content") else "summary"]
            assert parts[0] == event["part"]
        else:
            kind, _, end = what.rpartition(".")
            place, key = {
                "output_text": ("content", "text"),
                "reasoning_text": ("content", "text"),
                "reasoning_summary_text": ("summary", "text"),
                "function_call_arguments": (None, "arguments"),
                "custom_tool_call_input": (None, "input"),
            }[kind]
            target = item if place is None else item[place][0]
            if end == "delta":
                target[key] += event["delta"]
            else:
                assert end == "done" and target[key] == event[key]
    return [item for item in items if item["status"] != "in_progress"]


def as_written(answer: list[Event]) -> Iterator[Event]:
    """Parts of an answer, calls in the pieces in which they are written."""
    for part in answer:
        if isinstance(part, ToolCall):
            text = json.dumps(part.arguments, ensure_ascii=False)
            yield CallStart(part.name)
            yield from (CallDelta(text[i : i + 5]) for i in range(0, len(text), 5))
        yield part


@given(answers(), st.booleans(), st.booleans(), st.booleans())
def test_events_folded_are_the_items_and_the_items_are_the_answer(
    answer: list[Event], summary: bool, sealed: bool, whole: bool
) -> None:
    tools = ClientTools(TOOLS)
    output = Output(tools, summary, sealed)
    events = [json.loads(json.dumps(e)) for piece in as_written(answer) for e in output.feed(piece)]
    events += [json.loads(json.dumps(e)) for e in output.finish(whole)]
    items = output.items
    assert folded(events) == items
    assert all(item["status"] != "in_progress" for item in items)

    # The next request has these items in its input: the conversation has the message that the model wrote. Codex
    # sends reasoning back without its text.
    back = [
        {k: v for k, v in item.items() if k != "content" or item["type"] != "reasoning" or not sealed}
        for item in items
    ]
    thinking = "".join(e.text for e in answer if isinstance(e, Thinking))
    text = "".join(e.text for e in answer if isinstance(e, Text))
    calls = [(e.name, e.arguments) for e in answer if isinstance(e, ToolCall)]
    written = messages([user("x"), *back], tools=TOOLS)[1:]
    if not whole and not (thinking or text or calls):
        assert written == []
        return
    (message,) = written
    if not text.lstrip().startswith("<think>"):
        assert (message.get("reasoning_content", ""), message["content"]) == (thinking, text)
    told = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    assert told == calls


@given(answers(), st.sampled_from(NAMES), st.text(max_size=9), st.booleans())
def test_a_call_that_is_cut_is_never_one_that_a_client_runs(
    answer: list[Event], name: str, begun: str, summary: bool
) -> None:
    output = Output(ClientTools(TOOLS), summary, sealed=False)
    written = [*as_written(answer), CallStart(name), *([CallDelta(begun)] if begun else [])]
    events = [json.loads(json.dumps(e)) for piece in written for e in output.feed(piece)]
    events += [json.loads(json.dumps(e)) for e in output.finish(False, "<tool_call>be")]
    assert folded(events) == output.items
    last = output.items[-1]
    assert (last["type"], last["status"]) == ("message", "incomplete")
    assert last["content"][0]["text"].endswith("<tool_call>be")
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    calls = [item for item in done if item["type"] in ("function_call", "custom_tool_call")]
    assert len(calls) == sum(isinstance(e, ToolCall) for e in answer)


# Stored responses


def response(number: int, text: str = "") -> dict[str, Any]:
    return {"id": f"r{number}", "output": [{"id": f"m{number}", "text": text}]}


def test_the_store_is_bounded_and_forgets_the_least_used() -> None:
    store = ResponseStore(most_responses=3)
    for number in range(3):
        store.put(response(number), [])
    store.get("r0")
    store.put(response(3), [])
    assert store.get("r0") and store.get("r3")
    with pytest.raises(ApiError, match="'r1' is not stored here"):
        store.get("r1")

    store = ResponseStore(most_bytes=1000)
    store.put(response(0, "x" * 600), [])
    store.put(response(1, "x" * 600), [])
    with pytest.raises(ApiError):
        store.get("r0")
    store.put(response(2, "x" * 2000), [])  # larger than all
    with pytest.raises(ApiError):
        store.get("r2")
    store.put(response(3), [{"id": "i", "type": "message"}])
    assert store.resolved([{"type": "item_reference", "id": "i"}]) == [{"id": "i", "type": "message"}]
    assert store.resolved([{"type": "item_reference", "id": "m3"}]) == response(3)["output"]
    store.delete("r3")
    with pytest.raises(ApiError, match="'m3' is not stored"):
        store.resolved([{"type": "item_reference", "id": "m3"}])


# The server, with the openai package


THINKS = "SAY(<think>\nHm.\n</think>\n\nIt is blue.)"


def test_an_answer_whole_and_in_events(gpt: Any) -> None:
    made = gpt.responses.create(model="any", input=THINKS, instructions="Short.", metadata={"a": "b"})
    assert (made.status, made.output_text, made.metadata) == ("completed", "It is blue.", {"a": "b"})
    reasoning, message = made.output
    assert reasoning.content[0].text == "Hm." and message.role == "assistant"
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert made.usage.input_tokens_details.cached_tokens == 0
    assert 0 < made.usage.output_tokens_details.reasoning_tokens < made.usage.output_tokens
    assert made.incomplete_details is None and made.error is None

    asked = {"instructions": "Short.", "metadata": {"a": "b"}}
    events = list(gpt.responses.create(model="any", input=THINKS, stream=True, **asked))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    final = events[-1].response
    changing = {"id", "created_at", "output"}
    assert final.model_dump(exclude=changing) == made.model_dump(exclude=changing)
    plain = [e.to_dict() for e in events if not hasattr(e, "response")]
    assert folded(plain) == [item.to_dict() for item in final.output]

    with gpt.responses.stream(model="any", input=THINKS, reasoning={"summary": "auto"}) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output[0].summary[0].text == "Hm."
    assert "response.reasoning_summary_text.delta" in kinds


def test_tools_round_trip_and_continue(gpt: Any) -> None:
    with gpt.responses.stream(model="any", input=CALLS, tools=[TOOL]) as stream:
        for _ in stream:
            pass
        first = stream.get_final_response()
    message, *calls = first.output
    assert message.content[0].text == "Let me see."
    assert [json.loads(c.arguments) for c in calls] == [
        {"place": "Zürich", "days": 3},
        {"place": "42", "days": 1},
    ]
    results: list[Any] = [
        {"type": "function_call_output", "call_id": c.call_id, "output": text}
        for c, text in zip(calls, ["rain", "SAY(It rains.)"])
    ]
    whole = gpt.responses.create(
        model="any", input=[{"role": "user", "content": CALLS}, *first.output, *results], tools=[TOOL]
    )
    stored = gpt.responses.create(model="any", input=results, tools=[TOOL], previous_response_id=first.id)
    references: list[Any] = [{"type": "item_reference", "id": i.id} for i in first.output]
    referred = gpt.responses.create(
        model="any", input=[{"role": "user", "content": CALLS}, *references, *results], tools=[TOOL]
    )
    for made in (whole, stored, referred):
        assert made.output_text == "It rains."
        assert made.usage.input_tokens == whole.usage.input_tokens
    assert stored.previous_response_id == first.id


def test_stored_responses_are_there_until_they_are_deleted(gpt: Any) -> None:
    made = gpt.responses.create(model="any", input="SAY(hi)")
    assert gpt.responses.retrieve(made.id).to_dict() == made.to_dict()
    streamed = list(gpt.responses.create(model="any", input="SAY(hi)", stream=True))[-1].response
    assert gpt.responses.retrieve(streamed.id).output_text == "hi"
    gpt.responses.delete(made.id)
    untold = gpt.responses.create(model="any", input="SAY(hi)", store=False)
    for name in (made.id, untold.id, "resp_never"):
        with pytest.raises(openai.NotFoundError, match="is not stored here"):
            gpt.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError, match="is not stored here"):
            gpt.responses.create(model="any", input="x", previous_response_id=name)


def test_an_answer_that_is_cut_says_so(gpt: Any) -> None:
    asked = {"model": "any", "input": "SAY(One, two, three.)", "max_output_tokens": 3}
    made = gpt.responses.create(**asked)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.output[-1].status == "incomplete" and made.output_text
    last = list(gpt.responses.create(**asked, stream=True))[-1]
    assert (last.type, last.response.output_text) == ("response.incomplete", made.output_text)


def test_a_call_that_is_cut_is_text(gpt: Any) -> None:
    asked: dict[str, Any] = {"model": "any", "input": CALLS, "tools": [TOOL], "max_output_tokens": 40}
    made = gpt.responses.create(**asked)
    last = list(gpt.responses.create(**asked, stream=True))[-1].response
    for cut in (made, last):
        assert cut.status == "incomplete" and {item.type for item in cut.output} == {"message"}
        assert "<function=weather>" in cut.output_text
    assert made.output_text == last.output_text


def test_forms_and_choices_that_the_model_would_not_choose(gpt: Any) -> None:
    pytest.importorskip("llguidance")

    class Place(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        place: str
        days: int

    asked: dict[str, Any] = {
        "model": "any",
        "input": "SAY(No, never. FOREVER)",
        "reasoning": {"effort": "none"},
    }
    parsed = gpt.responses.parse(**asked, text_format=Place, max_output_tokens=150)
    assert isinstance(parsed.output_parsed, Place)
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "weather"}],
    }
    for choice in ("required", {"type": "function", "name": "weather"}, allowed):
        made = gpt.responses.create(**asked, tools=[TOOL], tool_choice=choice, max_output_tokens=400)
        kinds = {item.type for item in made.output}
        assert kinds == {"function_call"} and set(json.loads(made.output[0].arguments)) == {"place", "days"}
    space = {"type": "function", "name": "weather", "namespace": "mcp__a__"}
    made = gpt.responses.create(**asked, tools=TOOLS, tool_choice=space, max_output_tokens=400)
    assert (made.output[0].name, made.output[0].namespace) == ("weather", "mcp__a__")
    free = {"type": "custom", "name": "patch"}
    made = gpt.responses.create(**asked, tools=TOOLS, tool_choice=free, max_output_tokens=400)
    assert (made.output[0].type, made.output[0].name) == ("custom_tool_call", "patch")
    with pytest.raises(openai.BadRequestError, match="tool_choice asks for a tool that is not among tools"):
        gpt.responses.create(**asked, tools=[TOOL], tool_choice={"type": "function", "name": "other"})


def test_what_codex_sends(gpt: Any, address: str) -> None:
    """Its fields and items in their order; the field ``instructions`` is missing."""

    def said(role: str, text: str) -> dict[str, Any]:
        kind = "output_text" if role == "assistant" else "input_text"
        return {"type": "message", "id": "m", "role": role, "content": [{"type": kind, "text": text}]}

    body = {
        "model": "any",
        "stream": True,
        "input": [
            said("developer", "You are an agent."),
            said("developer", "Skills: none."),
            said("user", "<environment_context/>"),
            said("user", f"SAY({call(place='Bern', days=2)})"),
        ],
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "x",
        "client_metadata": {"a": "b"},
    }
    events = stream(address, body)
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert [(i["type"], i["name"], json.loads(i["arguments"])) for i in done] == [
        ("function_call", "weather", {"place": "Bern", "days": 2})
    ]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] == 0


def stream(address: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/responses", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200, response.read()
    lines = response.read().decode().splitlines()
    connection.close()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert names == [e["type"] for e in events]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    return events


def test_a_silent_stream_has_events_that_do_no_harm(gpt: Any, address: str) -> None:
    start = time.monotonic()
    events = stream(address, {"input": "LATE(1) SAY(hi)", "stream": True, "tools": [TOOL]})
    signs = [e for e in events if e["type"] == "response.in_progress"]
    assert len(signs) > 4 and time.monotonic() - start > 1
    with gpt.responses.stream(model="any", input="LATE(1) SAY(hi)") as answer:
        for _ in answer:
            pass
        assert answer.get_final_response().output_text == "hi"


def test_what_fails(gpt: Any, address: str) -> None:
    for body, message in (
        ({"input": 5}, "input: 5 is not valid"),
        ({"input": "x", "conversation": "c"}, "conversation is not supported"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt is not supported"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "x", "reasoning": {"effort": 5}}, "reasoning.effort"),
    ):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request("POST", "/v1/responses", json.dumps(body))
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        assert response.status == 400 and message in answer["error"]["message"], answer
    with pytest.raises(openai.InternalServerError, match="the disk is gone"):
        gpt.responses.create(model="any", input="SAY(One, two.) BREAK")
    *_, last = gpt.responses.create(model="any", input="SAY(One, two.) BREAK", stream=True)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert "the disk is gone" in last.response.error.message and last.response.error.code == "server_error"
