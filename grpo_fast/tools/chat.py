"""How a chat template writes tool conversations: what it renders, and the tokens between a call and the next turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Message = dict[str, Any]
Call = tuple[str, dict[str, Any]]

# words that no template writes of itself
USER, REPLY, MARK = "probeuser", "probereply", "probemark"
FIRST: Call = ("probe_first", {"probe_city": "probeparis", "probe_days": 74923})
SECOND: Call = ("probe_second", {"probe_city": "proberome", "probe_days": 58161})


@dataclass(frozen=True, kw_only=True)
class CallStyle:
    """What a template wants of a message's tool calls beside name and arguments.

    Attributes:
        json_arguments: The arguments as JSON text; DeepSeek-V3's template concatenates them to text.
        call_id: Pattern of the call's id, from `name` and `index`; Mistral's and Kimi's templates read one.
    """

    json_arguments: bool = False
    call_id: str | None = None

    def assistant(self, calls: Sequence[Call]) -> Message:
        """An assistant message with these calls and no text."""
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [self._call(i, *call) for i, call in enumerate(calls)],
        }

    def reply(self, message: Message, index: int) -> Message:
        """The tool's message, with the id of the call it answers where the template wants one."""
        call_id = self.id_of(message["name"], index)
        return message if call_id is None else message | {"tool_call_id": call_id}

    def id_of(self, name: str, index: int) -> str | None:
        """The id of a turn's call number `index`."""
        return None if self.call_id is None else self.call_id.format(name=name, index=index)

    def _call(self, index: int, name: str, arguments: dict[str, Any]) -> Message:
        function = {"name": name, "arguments": json.dumps(arguments) if self.json_arguments else arguments}
        call = {"type": "function", "function": function}
        call_id = self.id_of(name, index)
        return call if call_id is None else call | {"id": call_id}


# tried in this order; Mistral's ids have nine letters or digits
STYLES = tuple(
    CallStyle(json_arguments=json_arguments, call_id=call_id)
    for call_id in (None, "call{index:05d}", "functions.{name}:{index}")
    for json_arguments in (False, True)
)


@dataclass(frozen=True, kw_only=True)
class ToolChat:
    """A chat template that can render a tool conversation.

    Attributes:
        processing_class: The tokenizer, or the processor, whose template it is.
        style: What the template wants of a tool call.
        template_kwargs: `chat_template_kwargs` of the run.
    """

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    style: CallStyle = CallStyle()
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself, a processor's too."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def template(self) -> str:
        """The template that is used when tools are given; some tokenizers have one by name."""
        template: Any = self.processing_class.chat_template
        return str(template.get("tool_use", template.get("default")) if isinstance(template, dict) else template)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            TemplateError, TypeError: As the template raises them.
        """
        return self._apply(messages, generation_prompt, tokenize=False)

    def suffix_ids(self, replies: Sequence[Message], *, eos_token_ids: Sequence[int] = ()) -> list[int]:
        """The tokens from the end of an assistant turn that called tools to the start of the next.

        The end of the turn is where generation stops: after the turn's first end-of-sequence token, or where the
        template ends it. A template may write earlier text differently once a reply follows (Qwen3 drops an empty
        `<think>` block); only what stands between the call and the end of its turn must not change, so such templates
        need no patched copy.

        Args:
            replies: The `tool` messages.
            eos_token_ids: Tokens that end a completion, beside the tokenizer's own.

        Raises:
            ValueError: If the template closes the turn in another way once a tool's reply follows.
        """
        asked = [{"role": "user", "content": USER}, self.style.assistant([(replies[0]["name"], {"query": MARK})])]
        messages = [*asked, *(self.style.reply(reply, index) for index, reply in enumerate(replies))]
        end = self.render(asked).partition(MARK)[2]
        end = end[: _first_end(end, self.end_tokens(eos_token_ids))]
        head, _, tail = self.render(messages, generation_prompt=True).partition(MARK)
        ids: Any = self._apply(messages, True, tokenize=True, return_dict=True)["input_ids"]
        ids = ids[0] if isinstance(self.processing_class, ProcessorMixin) else ids
        head_ids = self.tokenizer(head + MARK + end, add_special_tokens=False)["input_ids"]
        if not tail.startswith(end) or ids[: len(head_ids)] != head_ids:
            raise ValueError(
                "the chat template ends a turn that calls tools in another way once a tool's reply follows "
                f"({end!r} became {tail[: len(end)]!r}): completions cannot be continued. Change "
                "processing_class.chat_template so that earlier turns are rendered the same whatever follows"
            )
        return list(ids[len(head_ids) :])

    def end_tokens(self, eos_token_ids: Sequence[int] = ()) -> list[str]:
        """The text of the tokens that end a completion."""
        tokens = [self.tokenizer.eos_token, *self.tokenizer.convert_ids_to_tokens(list(eos_token_ids))]
        return list(dict.fromkeys(token for token in tokens if token))

    def _apply(self, messages: Sequence[Message], generation_prompt: bool, **options: Any) -> Any:
        if isinstance(self.processing_class, ProcessorMixin):
            messages = [_in_blocks(message) for message in messages]
        return self.processing_class.apply_chat_template(
            list(messages),
            **{"add_generation_prompt": generation_prompt, "chat_template": self.template}
            | self.template_kwargs
            | options,
        )


def tool_chat(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, template_kwargs: dict[str, Any] | None = None
) -> ToolChat:
    """The chat template as one that renders tool conversations.

    Raises:
        ValueError: If it has none, or drops or refuses calls or replies.
    """
    template_kwargs = template_kwargs or {}
    if processing_class.chat_template is None:
        raise ValueError("tools need a chat template: processing_class.chat_template is None")
    reason = None
    for style in STYLES:
        chat = ToolChat(processing_class=processing_class, style=style, template_kwargs=template_kwargs)
        try:
            missing = _dropped(chat)
        except (TemplateError, TypeError) as error:
            # the first style's refusal: later ones ask for less common things
            reason = reason or f"it raised {type(error).__name__}: {error}"
            continue
        if not missing:
            return chat
        reason = reason or f"it leaves out the {missing}"
    raise ValueError(
        "processing_class.chat_template must render a conversation of user, assistant with tool calls, and tool, "
        f"but {reason}"
    )


def _dropped(chat: ToolChat) -> str | None:
    """What of a tool conversation the template does not write."""
    name, arguments = FIRST
    text = chat.render(
        [
            {"role": "user", "content": USER},
            chat.style.assistant([FIRST]),
            chat.style.reply({"role": "tool", "name": name, "content": REPLY}, 0),
        ]
    )
    parts = {"tool's name": name, "call's arguments": str(arguments["probe_city"]), "tool's reply": REPLY}
    # names of arguments, too: a template may print values alone
    parts |= {f"argument name {key}": key for key in arguments}
    return next((what for what, word in parts.items() if word not in text), None)


def _first_end(text: str, ends: Sequence[str]) -> int:
    """Where `text` has passed the first of `ends`; its length if it has none."""
    stops = [(text.index(end), len(end)) for end in ends if end in text]
    return sum(min(stops)) if stops else len(text)


def _in_blocks(message: Message) -> Message:
    """Processors take content as blocks."""
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
