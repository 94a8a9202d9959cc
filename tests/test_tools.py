import asyncio
import functools

import pytest

from grpo_fast.tools import make_toolbox, parse_response, run_calls, warn_experimental
from grpo_fast.tools.chat import tool_chat
from tests.tiny_lm import CHAT_TEMPLATE
from tests.tool_chats import (
    CHATML,
    FAMILIES,
    HERMES,
    chat,
    clock,
    encode,
    make_tokenizer,
    text,
    weather,
    weather_async,
)

USER = {"role": "user", "content": "weather?"}
REPLY = {"role": "tool", "name": "weather", "content": "12 degrees, <b>wind</b> & 'rain'"}


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "_"))
def family(request):
    return FAMILIES[request.param]


def make(family, tools=(weather, clock)):
    tokenizer = make_tokenizer(family.template, family.eos)
    return tokenizer, make_toolbox(tokenizer, list(tools), None)


def written(toolbox, message):
    """The prompt, and what of the rendered `message` the model itself would write."""
    prompt = toolbox.chat.render([USER], generation_prompt=True)
    turn = toolbox.chat.render([USER, message])
    eos = toolbox.chat.tokenizer.eos_token
    assert turn.startswith(prompt)
    turn = turn.removeprefix(prompt)
    return prompt, turn[: turn.index(eos) + len(eos)] if eos in turn else turn


def call(name, /, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "calls",
    [
        [],
        [("weather", {"city": "Paris, France", "days": 3})],
        [("weather", {"city": "75001", "days": 2}), ("weather", {"city": "Rome (north)", "days": 1})],
    ],
    ids=len,
)
def test_calls_are_read_as_the_template_writes_them(family, calls):
    tokenizer, toolbox = make(family)
    calls = calls[: family.num_calls]
    content = "" if calls else "no need of tools"
    message = toolbox.chat.style.assistant(calls) | {"content": content}
    if not calls:
        del message["tool_calls"]
    prompt, turn = written(toolbox, message)

    read = parse_response(tokenizer, encode(tokenizer, turn), prefix=encode(tokenizer, prompt), tools=toolbox.tools)

    assert read["role"] == "assistant"
    assert read["content"] == content
    assert read.get("tool_calls", []) == [call(name, **arguments) for name, arguments in calls]


def test_text_and_reasoning_beside_a_call():
    tokenizer, toolbox = make(FAMILIES["hermes, thinking"])
    message = toolbox.chat.style.assistant([("clock", {})])
    prompt, turn = written(toolbox, message | {"content": "let me look", "reasoning_content": "I do not know"})
    read = parse_response(tokenizer, encode(tokenizer, turn), prefix=encode(tokenizer, prompt), tools=toolbox.tools)
    assert read == {
        "role": "assistant",
        "content": "let me look",
        "reasoning_content": "I do not know",
        "tool_calls": [call("clock")],
    }


def test_reasoning_that_the_prompt_opens():
    tokenizer, toolbox = make(FAMILIES["xml, thinking prompt"])
    prompt = encode(tokenizer, toolbox.chat.render([USER], generation_prompt=True))
    read = parse_response(tokenizer, encode(tokenizer, "sun?\n</think>\n\nsun<|im_end|>"), prefix=prompt)
    assert read == {"role": "assistant", "content": "sun", "reasoning_content": "sun?"}


def test_the_schema_says_which_tagged_arguments_are_numbers():
    tokenizer, toolbox = make(FAMILIES["arg_key"])
    turn = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>75001</arg_value>\n"
    turn += "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    ids = encode(tokenizer, turn)
    typed = parse_response(tokenizer, ids, prefix=[], tools=toolbox.tools)
    assert typed["tool_calls"] == [call("weather", city="75001", days=2)]
    assert parse_response(tokenizer, ids, prefix=[])["tool_calls"] == [call("weather", city="75001", days="2")]


@pytest.mark.parametrize(
    "turn",
    [
        '<tool_call>\n{"name": "clock", "argu\n</tool_call>',
        '<tool_call>\n{"name": "clo',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
    ids=["broken", "cut", "no name", "number for a name", "no object", "deep"],
)
def test_malformed_calls_are_plain_content(turn):
    tokenizer, toolbox = make(HERMES)
    read = parse_response(tokenizer, encode(tokenizer, turn + "<|im_end|>"), prefix=[], tools=toolbox.tools)
    assert read == {"role": "assistant", "content": turn}


def test_a_call_may_leave_out_arguments_and_a_completion_everything():
    tokenizer, _ = make(HERMES)
    ids = encode(tokenizer, '<tool_call>{"name": "clock"}</tool_call><|im_end|>')
    assert parse_response(tokenizer, ids, prefix=[])["tool_calls"] == [call("clock")]
    assert parse_response(tokenizer, [], prefix=[]) == {"role": "assistant", "content": ""}


def test_inner_marks_of_a_call_may_be_forgotten():
    tokenizer, _ = make(FAMILIES["xml, thinking prompt"])
    turn = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</tool_call>\nwait<|im_end|>"
    read = parse_response(tokenizer, encode(tokenizer, turn), prefix=[])
    assert read == {"role": "assistant", "content": "wait", "tool_calls": [call("weather", city="Oslo")]}


def test_reasoning_has_the_name_that_the_template_reads():
    family = FAMILIES["hermes, thinking"]
    for name in ("thinking", "reasoning_content"):
        tokenizer, _ = make(family._replace(template=family.template.replace("reasoning_content", name)))
        read = parse_response(tokenizer, encode(tokenizer, "<think>\nhm\n</think>\n\nsun<|im_end|>"), prefix=[])
        assert read == {"role": "assistant", "content": "sun", name: "hm"}


def test_commas_in_text_open_no_python_call():
    tokenizer, _ = make(FAMILIES["python"])
    turn = "well, clock(x=1)<|tool_call_start|>"
    turn += "[weather(city=['a', 'b, (c'], days={\"x\": [1, {}]}), clock()]<|tool_call_end|>"
    read = parse_response(tokenizer, encode(tokenizer, turn + "<|im_end|>"), prefix=[])
    assert read["content"] == "well, clock(x=1)"
    assert read["tool_calls"] == [call("weather", city=["a", "b, (c"], days={"x": [1, {}]}), call("clock")]


def test_harmony_takes_the_recipient_before_and_behind_the_channel():
    tokenizer, _ = make(FAMILIES["harmony"])
    turn = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
    turn += '<|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
    read = parse_response(tokenizer, encode(tokenizer, turn), prefix=encode(tokenizer, "<|start|>assistant"))
    assert read == {
        "role": "assistant",
        "content": "",
        "thinking": "hm",
        "tool_calls": [call("weather", city="Oslo")],
    }


def test_tokens_that_end_a_turn_are_no_content():
    tokenizer = make_tokenizer(*FAMILIES["arg_key"][:2])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|observation|>"]})
    make_toolbox(tokenizer, [clock], None, eos_token_ids=[tokenizer.convert_tokens_to_ids("<|observation|>")])
    read = parse_response(tokenizer, encode(tokenizer, "<tool_call>clock\n</tool_call><|observation|>"), prefix=[])
    assert read == {"role": "assistant", "content": "", "tool_calls": [call("clock")]}


def test_a_suffix_takes_a_call_to_the_next_turn(family):
    tokenizer, toolbox = make(family)
    asked = [USER, toolbox.chat.style.assistant([("weather", {"city": "Oslo"})])]
    whole = toolbox.chat.render([*asked, toolbox.chat.style.reply(REPLY, 0)], generation_prompt=True)
    _, turn = written(toolbox, asked[1])
    # reasoning may be rendered in another way once a reply follows
    turn = turn[turn.index("</think>") + len("</think>\n\n") :] if "</think>" in turn else turn

    suffix = tokenizer.decode(toolbox.chat.suffix_ids([REPLY]))

    assert REPLY["content"] in suffix
    assert whole.endswith(suffix)
    assert whole.removesuffix(suffix).endswith(turn)


def test_the_kwargs_of_the_template_reach_the_suffix():
    prompt = "{% if add_generation_prompt and quiet %}" + text("<think></think>") + "{% endif %}"
    tokenizer = make_tokenizer(HERMES.template + prompt, HERMES.eos)
    chat = make_toolbox(tokenizer, [clock], None, chat_template_kwargs={"quiet": True}).chat
    assert tokenizer.decode(chat.suffix_ids([REPLY])).endswith("<|im_start|>assistant\n<think></think>")


def test_a_template_named_for_tools_is_used():
    tokenizer = make_tokenizer(HERMES.template, HERMES.eos)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": HERMES.template}
    assert tool_chat(tokenizer).suffix_ids([REPLY]) == make(HERMES)[1].chat.suffix_ids([REPLY])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template is None"),
        (CHAT_TEMPLATE, "leaves out the tool's name"),
        (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}",
            "raised TemplateError: no tools",
        ),
        (
            chat(**CHATML, call="{% set after = '!' %}" + text("<call>") + "{{ f | tojson }}").replace(
                text("<|im_end|>\n") + "{% else %}",
                "{% if loop.last %}?{% endif %}" + text("<|im_end|>\n") + "{% else %}",
            ),
            "ends a turn that calls tools in another way",
        ),
        (chat(**CHATML, call="{{ f.arguments }} of {{ f.name }}"), "cannot tell how the chat template writes"),
    ],
    ids=["none", "drops calls", "refuses", "another end", "unreadable"],
)
def test_templates_that_cannot_be_used_are_refused(template, message):
    tokenizer = make_tokenizer(template, HERMES.eos)
    with pytest.raises(ValueError, match=message):
        make_toolbox(tokenizer, [clock], None)


def test_a_response_template_of_the_user_stays():
    tokenizer = make_tokenizer(HERMES.template, HERMES.eos)
    own = {"start_anchor": "x", "fields": {"content": {}}}
    tokenizer.response_template = own
    make_toolbox(tokenizer, [clock], None)
    assert tokenizer.response_template is own


def test_a_legacy_response_schema_is_named():
    tokenizer = make_tokenizer(HERMES.template, HERMES.eos)
    tokenizer.response_schema = {"type": "object"}
    with pytest.warns(FutureWarning, match="response_schema is not read"):
        make_toolbox(tokenizer, [clock], None)
    assert tokenizer.response_template


def undocumented(city: str):
    return city


def untyped(city):
    """Tell the weather.

    Args:
        city: Where.
    """


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (clock, "tools must be a list of functions, it is function"),
        ([functools.partial(weather, days=1)], "is partial"),
        ([undocumented], "undocumented needs type hints and a docstring"),
        ([untyped], "untyped needs type hints and a docstring"),
        ([clock, weather, clock], "of one name apart: clock"),
    ],
    ids=["no list", "no function", "no docstring", "no types", "one name"],
)
def test_tools_that_cannot_be_used_are_refused(tools, message):
    with pytest.raises(ValueError, match=message):
        make_toolbox(make_tokenizer(HERMES.template, HERMES.eos), tools, None)


def test_without_tools_there_is_no_toolbox():
    assert make_toolbox(make_tokenizer(None, "<eos>"), [], None) is None


def test_a_toolbox_says_what_it_holds():
    _, toolbox = make(HERMES, [weather, weather_async])
    assert toolbox.tools == toolbox.standalone == toolbox.tools_of() == [weather, weather_async]
    assert toolbox.has_async
    assert not make(HERMES)[1].has_async
    assert toolbox.functions() == {"weather": weather, "weather_async": weather_async}


def test_experimental_warning_is_silenced_as_in_trl(monkeypatch, recwarn):
    with pytest.warns(UserWarning, match="rollout_func is experimental"):
        warn_experimental("rollout_func")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    recwarn.clear()
    warn_experimental("rollout_func")
    assert not recwarn


TOOLSET = {"weather": weather, "clock": clock, "weather_async": weather_async}


@pytest.mark.parametrize(
    ("call", "content", "failed"),
    [
        (call("weather", city="Oslo", days=2), "Oslo has 2 sunny days", False),
        (call("weather", city="Atlantis"), "{'error': \"'no such city'\"}", True),
        (call("weather"), "missing 1 required positional argument", True),
        (call("weather_async", city="Atlantis"), "{'error': \"'no such city'\"}", True),
        (call("weather_async", town="Oslo"), "unexpected keyword argument", True),
        (call("wether", city="Oslo"), "{'error': 'Tool wether not found.'}", True),
        ({"type": "code", "name": "python"}, "{'error': 'Unsupported tool call type: code'}", True),
        ({"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}, "Oslo has 1", False),
        ({"type": "function", "function": {"name": "weather", "arguments": [1]}}, "error", True),
        ({"name": "clock", "arguments": {}}, "noon", False),
    ],
)
def test_what_a_call_comes_to(call, content, failed):
    [[reply]] = run_calls([[call]], [TOOLSET])
    assert reply.message["role"] == "tool"
    assert content in reply.message["content"]
    assert reply.failed is failed
    assert reply.images == []


def test_blocks_that_a_tool_returns_are_passed_on():
    blocks = [{"type": "image", "image": "pixels"}, {"type": "text", "text": "a map"}]
    [[reply]] = run_calls([[call("draw")]], [{"draw": lambda: blocks}])
    assert reply.message == {"role": "tool", "name": "draw", "content": blocks}
    assert reply.images == ["pixels"]


def test_async_tools_run_together_and_replies_keep_the_order_of_the_calls():
    arrived, everyone = [], asyncio.Event()

    async def meet(name):
        # returns only if all three run at the same time
        arrived.append(name)
        if len(arrived) == 3:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), timeout=10)
        return name

    tools = {"meet": meet, "clock": clock}
    replies = run_calls(
        [[call("meet", name="a"), call("clock"), call("meet", name="b")], [call("meet", name="c")]], [tools] * 2
    )
    assert [[reply.message["content"] for reply in row] for row in replies] == [["a", "noon", "b"], ["c"]]
