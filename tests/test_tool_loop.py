"""The tool loop with scripted generations, alone and against TRL's own loop."""

import copy
import itertools
import sys
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlavaProcessor

from grpo_fast.tools import make_toolbox
from grpo_fast.trainer.tool_loop import ToolTrainer
from tests.tiny_vlm import llava, picture
from tests.tool_chats import FAMILIES, HERMES, clock, encode, make_tokenizer, weather, weather_async

END = "<|im_end|>"


def call(name, arguments="{}"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


OSLO = call("weather", '{"city": "Oslo", "days": 2}')
ROME = call("weather", '{"city": "Rome"}')
BERN = call("weather_async", '{"city": "Bern"}')
KIEV = call("weather_async", '{"city": "Kiev"}')


class ScriptedTrainer(ToolTrainer):
    """The loop, with generation read from a script: a list of turns for each row."""

    def __init__(
        self,
        scripts,
        family=HERMES,
        tools=(weather, clock, weather_async),
        environments=None,
        processor=None,
        **settings,
    ):
        self.processing_class = processor or make_tokenizer(family.template, family.eos)
        self._tokenizer = getattr(processor, "tokenizer", self.processing_class)
        self.toolbox = make_toolbox(self.processing_class, list(tools), environments)
        self.tools = self.toolbox.tools
        self.environments = None
        self.chat_template, self.chat_template_kwargs = None, {}
        self.eos_token_ids = [self._tokenizer.eos_token_id]
        self.model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=settings.pop("context", 4096)))
        self.use_vllm, self.vllm_mode, self._is_vlm = False, "colocate", processor is not None
        self.max_completion_length, self.max_tool_calling_iterations = 2000, sys.maxsize
        self.__dict__.update(settings)
        self.scripts = scripts
        self.engine = SimpleNamespace(any_in_group=bool)
        self.generated = []
        self.shown = []

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        self.generated.append([self._tokenizer.decode(ids) for ids in prompt_ids])
        assert num_generations == 1
        self.shown.append((images, multimodal_fields, has_tool_images))
        rows = [int(text.partition("row ")[2][0]) for text in self.generated[-1]]
        turns = [self.turns(row)[self.turn_of(ids)] for row, ids in zip(rows, prompt_ids, strict=True)]
        return [ids for ids, _ in turns], [logps for _, logps in turns]

    def turn_of(self, ids):
        return self._tokenizer.decode(ids).count("<|im_start|>assistant") - 1

    def turns(self, row):
        """Ids and log-probs that tell the place of every token."""
        turns = [encode(self._tokenizer, turn) for turn in self.scripts[row]]
        places = itertools.count(1)
        return [(ids, [-next(places) / 1024 - row for _ in ids]) for ids in turns]

    def start(self):
        """The arguments of the loop after the first turn."""
        prompts = [[{"role": "user", "content": f"row {row}"}] for row in range(len(self.scripts))]
        chat = self.toolbox.chat
        prompt_ids = [encode(self._tokenizer, chat.render(prompt, generation_prompt=True)) for prompt in prompts]
        completion_ids, logprobs = map(list, zip(*(self.turns(row)[0] for row in range(len(prompts))), strict=True))
        completions = self._decode(prompts, prompt_ids, completion_ids)
        return [prompts, prompt_ids, completion_ids, completions, logprobs, None, {}]


def run(trainer):
    names = ("tool_mask", "completions", "ids", "logprobs", "num_calls", "num_failures", "images")
    result = SimpleNamespace(**dict(zip(names, trainer._tool_call_loop(*trainer.start()), strict=True)))
    result.texts = [trainer._tokenizer.decode(ids) for ids in result.ids]
    return result


# tokens of Oslo's call with its reply, and of the prompt before them
REPLIED, PROMPT = 183, 46

CASES = {
    "no call": ([["sunny" + END], ["rainy" + END]], {}),
    "one call": ([[OSLO + END, "two days" + END], ["rainy" + END]], {}),
    "two parallel calls": ([["see\n" + OSLO + "\n" + ROME + END, "sunny" + END]], {}),
    "a failing tool": ([[call("weather", '{"city": "Atlantis"}') + END, "nothing" + END]], {}),
    "wrong arguments": ([[call("weather", '{"town": "Oslo"}') + END, "oh" + END]], {}),
    "arguments that are no object": ([[call("weather", "[1]") + END, "oh" + END]], {}),
    "an unknown tool": ([[call("wether") + END, "oh" + END], [OSLO + END, "fine" + END]], {}),
    "a reply over the budget": ([[OSLO + END, "two days" + END], ["rainy" + END]], {"max_completion_length": 120}),
    "a reply that fills the budget": ([[OSLO + END, "two days" + END]], {"max_completion_length": REPLIED}),
    "a turn that is cut": ([[OSLO + END, "a long answer" + END]], {"max_completion_length": REPLIED + 7}),
    "a reply over the context": (
        [[OSLO + END, "two days" + END], [call("clock") + END, "noon" + END]], {"context": PROMPT + REPLIED}
    ),
    "a reply within the context": ([[OSLO + END, "two days" + END]], {"context": PROMPT + REPLIED + 1}),
    "an end of calls": ([[OSLO + END, ROME + END, OSLO + END, "done" + END]], {"max_tool_calling_iterations": 2}),
    "no calls allowed": ([[OSLO + END, "done" + END]], {"max_tool_calling_iterations": 0}),
    "async tools": ([[BERN + KIEV + END, "sunny" + END], [BERN + END, "yes" + END]], {}),
    "a failing async tool": ([[call("weather_async", '{"city": "Atlantis"}') + BERN + END, "no" + END]], {}),
    "wrong async arguments": ([[call("weather_async", '{"town": 1}') + END, "no" + END]], {}),
    "two turns": ([[OSLO + END, ROME + END, "both" + END], ["sunny" + END], [BERN + END, "sunny" + END]], {}),
}  # fmt: skip


@pytest.mark.trl
@pytest.mark.parametrize(("scripts", "settings"), CASES.values(), ids=CASES)
def test_same_as_trls_loop(scripts, settings):
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import start_event_loop_in_daemon

    ours, generator = ScriptedTrainer(scripts, **settings), ScriptedTrainer(scripts, **settings)
    functions = generator.toolbox.functions()
    thread, loop, ready = start_event_loop_in_daemon(name="trl")
    ready.wait()
    theirs = SimpleNamespace(
        **{name: value for name, value in vars(generator).items() if name != "toolbox"},
        environment_factories=None,
        async_loop=loop,
        _sync_tool_dicts=[{name: functions[name] for name in ("weather", "clock")}] * len(scripts),
        _async_tool_dicts=[{"weather_async": weather_async}] * len(scripts),
        _generate_single_turn=generator._generate_single_turn,
    )
    theirs._get_tool_suffix_ids = lambda messages: GRPOTrainer._get_tool_suffix_ids(theirs, messages)

    expected = GRPOTrainer._tool_call_loop(theirs, *copy.deepcopy(generator.start()))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()

    assert ours._tool_call_loop(*ours.start()) == expected
    assert ours.generated == generator.generated
    assert ours.shown == generator.shown


def test_a_call_its_reply_and_the_next_turn():
    trainer = ScriptedTrainer([["let me look\n" + OSLO + END, "two days" + END], ["no idea" + END]])
    result = run(trainer)

    reply = "\n<|im_start|>user\n<tool_response>\nOslo has 2 sunny days\n</tool_response>" + END
    reply += "\n<|im_start|>assistant\n"
    first, last = "let me look\n" + OSLO, "two days"
    assert result.texts == [first + END + reply + last + END, "no idea" + END]
    # the end of a turn is one token
    num_first, num_reply, num_last = len(first) + 1, len(encode(trainer._tokenizer, reply)), len(last) + 1
    mask = [1] * num_first + [0] * num_reply + [1] * num_last
    assert result.tool_mask == [mask, [1] * (len("no idea") + 1)]
    (_, first_logps), (_, last_logps) = trainer.turns(0)
    assert result.logprobs[0] == first_logps + [0.0] * num_reply + last_logps
    assert [message["role"] for message in result.completions[0]] == ["assistant", "tool", "assistant"]
    assert result.completions[0][0]["content"] == "let me look"
    assert result.completions[0][1:] == [
        {"role": "tool", "name": "weather", "content": "Oslo has 2 sunny days"},
        {"role": "assistant", "content": "two days"},
    ]
    assert (result.num_calls, result.num_failures) == (1, 0)


@pytest.mark.parametrize(
    ("settings", "roles", "num_tokens"),
    [
        ({"max_completion_length": REPLIED - 1}, ["assistant"], 87),
        ({"max_completion_length": REPLIED}, ["assistant", "tool"], REPLIED),
        ({"max_completion_length": REPLIED + 1}, ["assistant", "tool", "assistant"], REPLIED + 1),
        ({"context": PROMPT + REPLIED}, ["assistant"], 87),
        ({"context": PROMPT + REPLIED + 1}, ["assistant", "tool", "assistant"], REPLIED + 9),
    ],
)
def test_a_reply_needs_room_in_budget_and_context(settings, roles, num_tokens):
    result = run(ScriptedTrainer([[OSLO + END, "two days" + END]], **settings))
    assert [message["role"] for message in result.completions[0]] == roles
    assert len(result.ids[0]) == len(result.tool_mask[0]) == len(result.logprobs[0]) == num_tokens
    assert result.num_calls == 1


@pytest.mark.parametrize(("limit", "num_calls"), [(0, 0), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_calls_end_at_the_limit(limit, num_calls):
    scripts = [[OSLO + END, ROME + END, OSLO + END, "done" + END]]
    result = run(ScriptedTrainer(scripts, max_tool_calling_iterations=limit))
    assert result.num_calls == num_calls
    assert len(result.completions[0]) == 1 + 2 * num_calls


@pytest.mark.parametrize("limit", [sys.maxsize, 2])
def test_processes_that_generate_together_take_the_same_number_of_turns(limit):
    trainer = ScriptedTrainer([[OSLO + END, "two days" + END], ["rainy" + END]], max_tool_calling_iterations=limit)
    # the other process has three turns more, and is asked before and after its tools ran
    asked = []
    trainer.engine.any_in_group = lambda flag: asked.append(flag) or len(asked) <= 6
    result = run(trainer)
    assert [len(rows) for rows in trainer.generated] == [1, 0, 0][:limit]
    assert asked == [True, True, False, False, False, False, False][: 2 * limit + (limit > 3)]
    assert result.num_calls == 1
    assert [len(messages) for messages in result.completions] == [3, 1]


def test_arguments_are_not_changed():
    trainer = ScriptedTrainer([[OSLO + END, "two days" + END]])
    arguments = trainer.start()
    before = copy.deepcopy(arguments)
    trainer._tool_call_loop(*arguments)
    assert arguments == before


def test_an_empty_completion_and_no_log_probs():
    trainer = ScriptedTrainer([[""], [OSLO + END, ""]])
    arguments = trainer.start()
    mask, completions, ids, logprobs, calls, *_ = trainer._tool_call_loop(*arguments[:4], None, None, {})
    assert (mask[0], ids[0], completions[0]) == ([], [], [{"role": "assistant", "content": ""}])
    assert [message["role"] for message in completions[1]] == ["assistant", "tool"]
    assert len(mask[1]) == len(ids[1])
    assert (logprobs, calls) == (None, 1)


def test_replies_keep_the_order_of_sync_and_async_calls():
    result = run(ScriptedTrainer([[BERN + call("clock") + END, "ok" + END]]))
    assert [message["name"] for message in result.completions[0][1:3]] == ["weather_async", "clock"]


def test_arguments_as_json_text_are_parsed():
    trainer = ScriptedTrainer([[call("weather", '"{\\"city\\": \\"Oslo\\"}"') + END, "ok" + END]])
    result = run(trainer)
    assert result.completions[0][1]["content"] == "Oslo has 1 sunny days"
    assert result.num_failures == 0


def test_a_token_that_stops_a_turn_and_opens_the_reply_stands_once():
    family = FAMILIES["arg_key"]
    stop = "<|observation|>"
    trainer = ScriptedTrainer([["\n<tool_call>clock\n</tool_call>" + stop, "noon<|endoftext|>"]], family)
    trainer._tokenizer.add_special_tokens({"additional_special_tokens": [stop]})
    trainer.eos_token_ids.append(trainer._tokenizer.convert_tokens_to_ids(stop))
    trainer.turn_of = lambda ids: trainer._tokenizer.decode(ids).count("<|assistant|>") - 1
    result = run(trainer)
    assert result.texts[0].count(stop) == 1
    # the model wrote it
    assert result.tool_mask[0][result.ids[0].index(trainer.eos_token_ids[-1])] == 1
    assert result.texts[0].endswith("noon<|endoftext|>")


def test_images_of_tools_are_shown_to_the_model():
    part = "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    template = HERMES.template.replace("{{ m.content }}", "{% for part in m.content %}" + part + "{% endfor %}")
    _, processor = llava()
    processor = LlavaProcessor(
        processor.image_processor,
        make_tokenizer(template, HERMES.eos, image_token="<image>"),
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=template,
    )
    pictures = {"cat": picture(8, 8), "dog": picture(8, 8, seed=1)}

    def look(at: str) -> list:
        """Look at something.

        Args:
            at: What.
        """
        return [{"type": "image", "image": pictures[at]}, {"type": "text", "text": at}]

    scripts = [["none" + END], [call("look", '{"at": "cat"}') + END, call("look", '{"at": "dog"}') + END, "seen" + END]]
    trainer = ScriptedTrainer(scripts, tools=[look], processor=processor)
    result = run(trainer)

    assert result.images == [[], [pictures["cat"], pictures["dog"]]]
    assert [images for images, _, _ in trainer.shown] == [[[pictures["cat"]]], [[pictures["cat"], pictures["dog"]]]]
    assert [has_tool_images for _, _, has_tool_images in trainer.shown] == [True, True]
    assert [len(fields["pixel_values"]) for _, fields, _ in trainer.shown] == [1, 2]
    # two by two patches an image, none of them written by the model
    places = [place for place, token in enumerate(result.ids[1]) if token == processor.image_token_id]
    assert len(places) == 8
    assert not any(result.tool_mask[1][place] for place in places)


def test_plain_prompts_are_refused():
    trainer = ScriptedTrainer([["x"]])
    with pytest.raises(ValueError, match="tools need conversational prompts, `prompt` is 'row 0'"):
        trainer._tool_call_loop(["row 0"], [[3]], [[4]], ["x"], None, None, {})


def test_template_kwargs_are_read_when_used():
    quiet = HERMES._replace(template=HERMES.template + "{% if add_generation_prompt and quiet %}!{% endif %}")
    trainer = ScriptedTrainer([["x"]], quiet)
    reply = {"role": "tool", "name": "clock", "content": "noon"}
    loud = trainer._get_tool_suffix_ids([reply])
    trainer.chat_template_kwargs = {"quiet": True}
    assert trainer._get_tool_suffix_ids([reply]) == loud + encode(trainer._tokenizer, "!")
    trainer.chat_template = HERMES.template
    assert trainer._get_tool_suffix_ids([reply]) == loud


class Lamp:
    def reset(self, color, **row):
        self.color, self.is_on = color, False
        return f" The lamp is {color}."

    def switch(self) -> str:
        """Switch the lamp."""
        self.is_on = not self.is_on
        return f"{self.color} is {'on' if self.is_on else 'off'}"


class Radio(Lamp):
    def tune(self, station: str) -> str:
        """Tune the radio.

        Args:
            station: The station.
        """
        return f"playing {station}"


@pytest.fixture
def _quietly(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.usefixtures("_quietly")
def test_each_rollout_calls_its_own_environment():
    scripts = [[call("switch") + END, "ok" + END], [call("tune", '{"station": "5"}') + END, "ok" + END]]
    scripts += [[call("tune", '{"station": "5"}') + END, "oh" + END]]
    trainer = ScriptedTrainer(scripts, tools=[], environments={"lamp": Lamp, "radio": Radio})
    rows = [
        {"prompt": [{"role": "user", "content": "Play."}], "environment": "lamp", "color": "red"},
        {"environment": "radio", "color": "blue"},
        {"prompt": [{"role": "user", "content": "Play."}], "environment": "lamp", "color": "green"},
    ]
    before = copy.deepcopy(rows)

    prompts = trainer._prepare_environments(rows)

    assert [prompt[-1]["content"] for prompt in prompts] == [
        "Play. The lamp is red.",
        " The lamp is blue.",
        "Play. The lamp is green.",
    ]
    assert rows == before
    assert [type(environment) for environment in trainer.environments] == [Lamp, Radio, Lamp]
    assert [tool.__name__ for tool in trainer._row_tools(1)] == ["switch", "tune"]
    assert [tool.__name__ for tool in trainer._row_tools(2)] == ["switch"]
    result = run(trainer)
    replies = [completion[1]["content"] for completion in result.completions]
    assert replies == ["red is on", "playing 5", "{'error': 'Tool tune not found.'}"]
    assert [environment.is_on for environment in trainer.environments] == [True, False, False]
    assert (result.num_calls, result.num_failures) == (3, 1)


@pytest.mark.usefixtures("_quietly")
def test_environments_need_conversations():
    trainer = ScriptedTrainer([["x"]], tools=[], environments=Lamp)
    with pytest.raises(ValueError, match="`prompt` must be a list of messages where environments are used"):
        trainer._prepare_environments([{"prompt": "Play.", "color": "red"}])


def test_without_environments_prompts_are_the_rows_own():
    trainer = ScriptedTrainer([["x"]])
    assert trainer._prepare_environments([{"prompt": "a"}, {"prompt": "b"}]) == ["a", "b"]
    assert trainer.environments is None
    assert trainer._row_tools(0) == trainer.tools
    trainer.tools = []
    assert trainer._row_tools(0) is None


def test_tools_are_read_when_used():
    trainer = ScriptedTrainer([[OSLO + END, "oh" + END]])
    trainer.tools = [clock]
    assert trainer._row_tools(0) == [clock]
    assert run(trainer).completions[0][1]["content"] == "{'error': 'Tool weather not found.'}"


def test_plain_prompts_have_plain_completions():
    trainer = ScriptedTrainer([["x"]])
    assert trainer._decode(["a"], [[3]], [encode(trainer._tokenizer, "sun" + END)]) == ["sun"]
