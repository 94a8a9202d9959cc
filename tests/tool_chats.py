"""Small chat templates that write tool calls as the model families do, with a tokenizer of single characters."""

import json
import string
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    template: str
    eos: str
    # what one turn may call at most
    num_calls: int = 2


BAR, GAP = "\uff5c", "\u2581"


def token(words):
    """A DeepSeek token."""
    return f"<{BAR}{words.replace(' ', GAP)}{BAR}>"


def text(value):
    """A literal: as a Jinja expression no newline of it is trimmed."""
    return "{{ " + json.dumps(value, ensure_ascii=False) + " }}"


def chat(*, user, open, close, reply, prompt=None, before="", call, between="", after="", start=""):
    """Turns of user, assistant and tool; `call` and `start` are Jinja, the rest is literal text around contents."""
    return (
        "{% for m in messages %}{% if m.role == 'user' %}" + text(user[0]) + "{{ m.content }}" + text(user[1])
        + "{% elif m.role == 'assistant' %}" + text(open) + start + "{{ m.content }}{% if m.tool_calls %}"
        + text(before) + "{% for c in m.tool_calls %}{% set f = c.function %}" + call
        + "{% if not loop.last %}" + text(between) + "{% endif %}{% endfor %}" + text(after) + "{% endif %}"
        + text(close)
        + "{% else %}" + text(reply[0]) + "{{ m.content }}" + text(reply[1]) + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + text(open if prompt is None else prompt) + "{% endif %}"
    )  # fmt: skip


CHATML = {
    "user": ("<|im_start|>user\n", "<|im_end|>\n"),
    "open": "<|im_start|>assistant\n",
    "close": "<|im_end|>\n",
    "reply": ("<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n"),
}
OBJECT = text('{"name": "') + "{{ f.name }}" + text('", "arguments": ') + "{{ f.arguments | tojson }}" + text("}")
TAGGED = "{% for k, v in f.arguments.items() %}KEY{{ k }}IS{{ v }}END{% endfor %}"
# an empty block for a turn without reasoning, unless a reply follows
THINK = (
    "{% if m.reasoning_content %}" + text("<think>\n") + "{{ m.reasoning_content }}" + text("\n</think>\n\n")
    + "{% elif loop.last %}" + text("<think>\n\n</think>\n\n") + "{% endif %}"
)  # fmt: skip
GEMMA_VALUES = (
    "{% for k, v in f.arguments.items() %}{{ k }}:{% if v is string %}"
    + text('<|"|>') + "{{ v }}" + text('<|"|>') + "{% else %}{{ v }}{% endif %}"
    + "{% if not loop.last %},{% endif %}{% endfor %}"
)  # fmt: skip
PYTHON_VALUES = (
    "{% for k, v in f.arguments.items() %}{{ k }}={% if v is string %}'{{ v }}'{% else %}{{ v }}{% endif %}"
    "{% if not loop.last %}, {% endif %}{% endfor %}"
)


def tagged(key, assign, end):
    return TAGGED.replace("KEY", text(key)).replace("IS", text(assign)).replace("END", text(end))


HERMES = Family(
    chat(**CHATML, call=text("<tool_call>\n") + OBJECT + text("\n</tool_call>"), between="\n"), "<|im_end|>"
)
FAMILIES = {
    "hermes": HERMES,
    "hermes, thinking": Family(
        chat(**CHATML, start=THINK, call=text("\n<tool_call>\n") + OBJECT + text("\n</tool_call>")), "<|im_end|>"
    ),
    "xml, thinking prompt": Family(
        chat(
            **CHATML,
            start="{{ '<think>\\n' }}" + "{{ m.reasoning_content or '' }}" + text("\n</think>\n\n"),
            prompt="<|im_start|>assistant\n<think>\n",
            call=text("\n\n<tool_call>\n<function=") + "{{ f.name }}" + text(">\n")
            + tagged("<parameter=", ">\n", "\n</parameter>\n") + text("</function>\n</tool_call>"),
        ),
        "<|im_end|>",
    ),
    "arg_key": Family(
        chat(
            user=("<|user|>\n", ""),
            open="<|assistant|>",
            close="",
            reply=("<|observation|>\n<tool_response>\n", "\n</tool_response>"),
            call=text("\n<tool_call>") + "{{ f.name }}" + text("\n")
            + tagged("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n") + text("</tool_call>"),
        ),
        "<|endoftext|>",
    ),
    "bare object": Family(
        chat(
            user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            open="<|start_header_id|>assistant<|end_header_id|>\n\n",
            close="<|eot_id|>",
            reply=("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
            call="{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
            + OBJECT.replace("arguments\\\"", "parameters\\\""),
        ),
        "<|eot_id|>",
        num_calls=1,
    ),
    "harmony": Family(
        chat(
            user=("<|start|>user<|message|>", "<|end|>"),
            open="<|start|>assistant",
            close="",
            reply=("<|start|>functions.x to=assistant<|channel|>commentary<|message|>", "<|end|>"),
            start="{% if not m.tool_calls %}" + text("<|channel|>final<|message|>") + "{% endif %}",
            call=text(" to=functions.") + "{{ f.name }}" + text("<|channel|>commentary json<|message|>")
            + "{{ f.arguments | tojson }}" + text("<|call|>"),
        ),
        "<|return|>",
        num_calls=1,
    ),
    "own quotes": Family(
        chat(
            user=("<|turn>user\n", "<turn|>\n"),
            open="<|turn>model\n",
            close="<turn|>\n",
            reply=("<|turn>tool\n", "<turn|>\n"),
            call=text("<|tool_call>call:") + "{{ f.name }}" + text("{") + GEMMA_VALUES + text("}<tool_call|>"),
        ),
        "<turn|>",
    ),
    "fenced arguments as text": Family(
        chat(
            user=(token("User"), ""),
            open=token("Assistant"),
            close=token("end of sentence"),
            reply=(token("tool outputs begin"), token("tool outputs end")),
            before=token("tool calls begin"),
            call=text(token("tool call begin") + "function" + token("tool sep"))
            + "{{ f.name + '\\n```json\\n' + f.arguments + '\\n```' }}" + text(token("tool call end")),
            between="\n",
            after=token("tool calls end"),
        ),
        token("end of sentence"),
    ),
    "separated, nothing between": Family(
        chat(
            user=(token("User"), ""),
            open=token("Assistant"),
            close=token("end of sentence"),
            reply=(token("tool output begin"), token("tool output end")),
            before=token("tool calls begin"),
            call=text(token("tool call begin")) + "{{ f.name }}" + text(token("tool sep"))
            + "{{ f.arguments | tojson }}" + text(token("tool call end")),
            after=token("tool calls end"),
        ),
        token("end of sentence"),
    ),
    "named by id": Family(
        chat(
            user=("<|im_user|>user<|im_middle|>", "<|im_end|>"),
            open="<|im_assistant|>assistant<|im_middle|>",
            close="<|im_end|>",
            reply=("<|im_system|>tool<|im_middle|>", "<|im_end|>"),
            before="<|tool_calls_section_begin|>",
            call=text("<|tool_call_begin|>") + "{{ c.id }}" + text("<|tool_call_argument_begin|>")
            + "{{ f.arguments | tojson }}" + text("<|tool_call_end|>"),
            after="<|tool_calls_section_end|>",
        ),
        "<|im_end|>",
    ),
    "list of objects": Family(
        chat(
            user=("[INST] ", " [/INST]"),
            open="",
            close="</s>",
            reply=("[TOOL_RESULTS] ", " [/TOOL_RESULTS]"),
            before="[TOOL_CALLS] [",
            call="{% if c.id is undefined or c.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
            + OBJECT[: OBJECT.rindex("{{")] + text(', "id": "') + "{{ c.id }}" + text('"}'),
            between=", ",
            after="]",
        ),
        "</s>",
    ),
    "bare names": Family(
        chat(
            user=("[INST]", "[/INST]"),
            open="",
            close="</s>",
            reply=("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            call=text("[TOOL_CALLS]") + "{{ f.name }}" + text("[ARGS]") + "{{ f.arguments | tojson }}",
        ),
        "</s>",
    ),
    "list with other keys": Family(
        chat(
            user=("<|START|>user:", "<|END|>"),
            open="<|START|>bot:",
            close="<|END|>",
            reply=("<|START|>tool:", "<|END|>"),
            before="<|ACTION|>[",
            call=OBJECT.replace("name\\\"", "tool_name\\\"").replace("arguments\\\"", "parameters\\\""),
            between=",\n",
            after="]<|END_ACTION|>",
        ),
        "<|END|>",
    ),
    "python": Family(
        chat(
            **CHATML,
            before="<|tool_call_start|>[",
            call="{{ f.name }}" + text("(") + PYTHON_VALUES + text(")"),
            between=", ",
            after="]<|tool_call_end|>",
        ),
        "<|im_end|>",
    ),
    "invoke": Family(
        chat(
            user=("]~b]user\n", "[e~[\n"),
            open="]~b]ai\n",
            close="[e~[\n",
            reply=("]~b]tool\n<response>", "</response>[e~[\n"),
            before="<minimax:tool_call>\n",
            call=text('<invoke name="') + "{{ f.name }}" + text('">\n')
            + tagged('<parameter name="', '">', "</parameter>\n") + text("</invoke>\n"),
            after="</minimax:tool_call>",
        ),
        "[e~[",
    ),
}  # fmt: skip


def make_tokenizer(template, eos, **special):
    """Single characters, all of the template's among them, and `eos` and the `special` tokens as one token each."""
    characters = dict.fromkeys([*string.printable, *(template or "")])
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=eos,
        unk_token="<unk>",
        padding_side="left",
        chat_template=template,
        extra_special_tokens=special,
    )


def encode(tokenizer, words):
    return tokenizer(words, add_special_tokens=False)["input_ids"]


def weather(city: str, days: int = 1) -> str:
    """Tell the weather.

    Args:
        city: Where.
        days: How far ahead.
    """
    if city == "Atlantis":
        raise KeyError("no such city")
    return f"{city} has {days} sunny days"


def clock() -> str:
    """Tell the time."""
    return "noon"


async def weather_async(city: str) -> str:
    """Ask for the weather.

    Args:
        city: Where.
    """
    if city == "Atlantis":
        raise KeyError("no such city")
    return f"{city} is sunny"
