"""Every chat template that TRL ships: continued and read as TRL does, by what it renders rather than by its text."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

trl = pytest.importorskip("trl")

from trl import chat_template_utils as theirs  # noqa: E402 - the module is skipped without TRL
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

from grpo_fast.tools import make_toolbox, parse_response  # noqa: E402
from grpo_fast.tools.chat import tool_chat  # noqa: E402
from tests.tool_chats import clock, encode, make_tokenizer, token, weather  # noqa: E402

pytestmark = pytest.mark.trl

USER = {"role": "user", "content": "weather?"}
REPLY = {"role": "tool", "name": "weather", "content": "12 degrees, <b>wind</b> & 'rain'"}
EOS = {
    "qwen": "<|im_end|>", "nemotron": "<|im_end|>", "lfm": "<|im_end|>", "llama": "<|eot_id|>",
    "deepseek": token("end of sentence"), "gptoss": "<|return|>", "muse": "<|eot|>",
}  # fmt: skip
# TRL refuses or cannot parse tools with these; ours cannot read Muse's, which writes several messages in a turn
NOT_TRLS = {"deepseekv3", "diffusion_gemma", "muse_glimmer"}
ALL_CALLS = [
    [("weather", {"city": "Paris", "days": 3})],
    [("weather", {"city": "75001"}), ("weather", {"city": "Rome"})],
]


def trl_templates():
    """TRL's own copies of the models' templates, by name, that can render tools."""
    folder = Path(trl.__file__).parent / "chat_templates"
    for path in sorted(folder.glob("*.jinja")):
        if not path.stem.endswith("_training"):
            template = path.read_text(encoding="utf-8")
            eos = next((eos for family, eos in EOS.items() if path.stem.startswith(family)), "<eos>")
            yield path.stem, make_tokenizer(template, eos)


def test_we_take_the_templates_trl_takes_and_continue_turns_as_it_does():
    replies = [[REPLY], [REPLY, REPLY | {"content": "{'error': 'no'}"}]]
    num_compared = 0
    for name, tokenizer in trl_templates():
        if not theirs.supports_tool_calling(tokenizer):
            with pytest.raises(ValueError, match="must render a conversation"):
                tool_chat(tokenizer)
            continue
        chat = tool_chat(tokenizer)
        if name == "deepseekv3":
            # TRL's own call has arguments that this template does not take
            continue
        kept = theirs.is_chat_template_prefix_preserving(tokenizer)
        trainer = SimpleNamespace(
            processing_class=tokenizer,
            _tokenizer=tokenizer,
            _is_vlm=False,
            chat_template=None if kept else theirs.get_training_chat_template(tokenizer),
            chat_template_kwargs={},
        )
        for messages in replies:
            assert chat.suffix_ids(messages) == GRPOTrainer._get_tool_suffix_ids(trainer, messages), name
            num_compared += 1
    assert num_compared >= 50


def test_completions_are_read_as_trl_reads_them():
    num_compared = 0
    for name, tokenizer in trl_templates():
        if name in NOT_TRLS or not theirs.supports_tool_calling(tokenizer):
            continue
        their_tokenizer = copy.deepcopy(tokenizer)
        theirs.add_response_schema(their_tokenizer)
        toolbox = make_toolbox(tokenizer, [weather, clock], None)
        prompt = toolbox.chat.render([USER], generation_prompt=True)
        messages = [
            toolbox.chat.style.assistant(calls)
            for calls in ALL_CALLS[: 1 if "llama" in name or "gptoss" in name else 2]
        ]
        messages += [{"role": "assistant", "content": "no need of tools"}]
        turns = [toolbox.chat.render([USER, message]).removeprefix(prompt) for message in messages]
        # what templates with a reasoning prompt render of a finished turn
        turns = [
            turn[turn.index("assistant\n") + len("assistant\n<think>") :] if USER["content"] in turn else turn
            for turn in turns
        ]
        turns += [turn[:-4] for turn in turns] + [turn.replace('"', "") for turn in turns]
        for turn in turns:
            ids, prefix = encode(tokenizer, turn), encode(tokenizer, prompt)
            read = parse_response(tokenizer, ids, prefix=prefix, tools=toolbox.tools)
            expected = theirs.parse_response(their_tokenizer, ids, prefix=prefix, tools=toolbox.tools)
            assert read == expected, f"{name}: {turn!r}"
            num_compared += 1
    assert num_compared >= 150
