"""Tools in a rollout: environments before it, and turns of calls, replies and further completions after it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_fast import multimodal
from grpo_fast.data import Prompt, is_conversational
from grpo_fast.generation import context_length
from grpo_fast.tools import Reply, Toolbox, observed, parse_response, run_calls
from grpo_fast.trainer.base import BaseTrainer

Message = dict[str, Any]


@dataclass
class Conversation:
    """A completion that grows by tools' replies and further turns.

    Attributes:
        row: Its row in the batch.
        prompt_ids: The prompt; replies count as completion.
        ids: All that follows the prompt.
        mask: 1 for each token the model wrote, 0 for a reply's.
        logps: The sampler's log-probs, 0.0 for a reply's tokens; None if it reports none.
        messages: The turns and the replies.
        images: What tools returned.
    """

    row: int
    prompt_ids: list[int]
    ids: list[int]
    mask: list[int]
    logps: list[float] | None
    messages: list[Message]
    images: list[Any] = field(default_factory=list)

    @property
    def context_ids(self) -> list[int]:
        """What the next turn is generated from."""
        return self.prompt_ids + self.ids

    @property
    def calls(self) -> list[Message]:
        """The tool calls that nothing has replied to."""
        return (self.messages[-1].get("tool_calls") or []) if self.messages else []

    def add_replies(self, replies: Sequence[Reply], ids: list[int]) -> None:
        """Append tools' replies, rendered as `ids`."""
        self.messages += [reply.message for reply in replies]
        self.images += [image for reply in replies for image in reply.images]
        self._add(ids, 0, [0.0] * len(ids))

    def add_turn(self, message: Message | None, ids: list[int], logps: list[float] | None) -> None:
        """Append a turn of the model; None for one that has no tokens."""
        self.messages += [] if message is None else [message]
        self._add(ids, 1, logps)

    def _add(self, ids: list[int], written: int, logps: list[float] | None) -> None:
        self.ids += ids
        self.mask += [written] * len(ids)
        if self.logps is not None:
            assert logps is not None
            self.logps += logps


class ToolTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that lets completions call tools."""

    engine: Any
    toolbox: Toolbox | None
    tools: list[Any]
    environments: list[Any] | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    max_completion_length: int
    max_tool_calling_iterations: int
    use_vllm: bool
    vllm_mode: str
    vllm_generation: Any
    _tokenizer: Any
    _is_vlm: bool
    _batch_environments: list[str | None]

    def _prepare_environments(self, inputs: list[dict[str, Any]]) -> list[Prompt]:
        """The rows' prompts, after each row's environment has been reset and said what it shows.

        A row needs no prompt where an environment gives one. The rows stay as they are.

        Raises:
            ValueError: If a row names an environment that there is not, or its prompt is plain text.
        """
        pool = self.toolbox.environments if self.toolbox else None
        if pool is None:
            self.environments = None
            return [row["prompt"] for row in inputs]
        self._batch_environments = pool.names(inputs)
        self.environments = pool.draw(self._batch_environments)
        prompts: list[Prompt] = []
        for row, environment in zip(inputs, self.environments, strict=True):
            prompt = row.get("prompt", [{"role": "user", "content": ""}])
            if isinstance(prompt, str):
                raise ValueError(
                    f"`prompt` must be a list of messages where environments are used, a row has {prompt!r:.80}"
                )
            prompts.append(observed(prompt, pool.reset(environment, row)))
        return prompts

    def _row_tools(self, row: int) -> list[Any] | None:
        """The tools that a row's prompt is rendered with, None rather than none."""
        if self.environments is None or self.toolbox is None:
            return self.tools or None
        return self.toolbox.tools_of(self._batch_environments[row]) or None

    def _decode(
        self, prompts: Sequence[Prompt], prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> list[Any]:
        """Completions as text, or for conversations as lists of one message each."""
        if not is_conversational({"prompt": prompts[0]}):
            texts: list[Any] = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            return texts
        return [
            [parse_response(self._tokenizer, ids, prefix=prompt_ids[i], tools=self._row_tools(i))]
            for i, ids in enumerate(completion_ids)
        ]

    def _get_tool_suffix_ids(self, tool_messages: list[Message]) -> list[int]:
        """TRL's seam: the tokens from the end of a turn with calls to the start of the next, with replies between."""
        assert self.toolbox is not None
        settings = self.chat_template_kwargs | (
            {} if self.chat_template is None else {"chat_template": self.chat_template}
        )
        chat = replace(self.toolbox.chat, template_kwargs=settings)
        return chat.suffix_ids(tool_messages, eos_token_ids=self.eos_token_ids)

    def _tool_call_loop(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        completions: list[Any],
        logprobs: list[list[float]] | None,
        images: list[Any] | None,
        multimodal_fields: dict[str, Any],
    ) -> tuple[Any, ...]:
        """TRL's seam: run the tools that completions call, show the replies, and let the model go on.

        Replies that overrun the completion's budget or the context are dropped, and the completion ends with its call.
        Unlike TRL's, the arguments are not changed, replies stand in the order of the calls, and a completion may be
        empty.

        Returns:
            tool_mask (0 for tokens of replies), completions, completion_ids, logprobs, the number of calls, how many of
            them failed, and each row's images from tools.
        """
        if isinstance(completions[0], str):
            raise ValueError(f"tools need conversational prompts, `prompt` is {prompts[0]!r:.80}")
        conversations = [
            Conversation(
                row=row,
                prompt_ids=prompt_ids[row],
                ids=list(ids),
                mask=[1] * len(ids),
                logps=None if logprobs is None else list(logprobs[row]),
                messages=list(completions[row]),
            )
            for row, ids in enumerate(completion_ids)
        ]
        num_calls = num_failures = num_turns = 0
        pending = [conversation for conversation in conversations if conversation.calls]
        # processes that generate together take the same number of turns, the last ones without conversations
        while num_turns < self.max_tool_calling_iterations and self.engine.any_in_group(bool(pending)):
            num_turns += 1
            replies = run_calls([c.calls for c in pending], [self._row_functions(c.row) for c in pending])
            num_calls += sum(map(len, replies))
            num_failures += sum(reply.failed for row in replies for reply in row)
            pending = [c for c, own in zip(pending, replies, strict=True) if self._show(c, own)]
            if self.engine.any_in_group(bool(pending)):
                self._continue(pending, conversations, images, multimodal_fields)
            pending = [conversation for conversation in pending if conversation.calls]
        return (
            [c.mask for c in conversations],
            [c.messages for c in conversations],
            [c.ids for c in conversations],
            None if logprobs is None else [c.logps for c in conversations],
            num_calls,
            num_failures,
            [c.images for c in conversations],
        )

    def _row_functions(self, row: int) -> dict[str, Any]:
        """What a row's completions may call, by name."""
        if self.environments is None or self.toolbox is None:
            return {tool.__name__: tool for tool in self.tools}
        return self.toolbox.functions(self.environments[row])

    def _show(self, conversation: Conversation, replies: list[Reply]) -> bool:
        """Append replies; False, and nothing appended, if they leave no room."""
        ids = self._get_tool_suffix_ids([reply.message for reply in replies])
        # a turn may have stopped at the token that opens the reply (GLM-4's <|observation|>), which TRL writes twice
        if ids and conversation.ids and ids[0] == conversation.ids[-1] and ids[0] in self.eos_token_ids:
            ids = ids[1:]
        num_tokens = len(conversation.ids) + len(ids)
        if num_tokens > self.max_completion_length or len(conversation.prompt_ids) + num_tokens >= self._context_length:
            return False
        conversation.add_replies(replies, ids)
        return True

    @property
    def _context_length(self) -> int:
        if self.use_vllm:
            length: int = (
                self.vllm_generation.llm.llm_engine.model_config.max_model_len
                if self.vllm_mode == "colocate"
                else self.vllm_generation.engine.max_model_len
            )
            return length
        return context_length(self.model.config) or sys.maxsize

    def _continue(
        self,
        pending: list[Conversation],
        conversations: list[Conversation],
        images: list[Any] | None,
        multimodal_fields: dict[str, Any],
    ) -> None:
        """Generate one more turn for each of the conversations in `pending`."""
        contexts = [conversation.context_ids for conversation in pending]
        tool_images = [conversation.images for conversation in conversations]
        turn_images: list[Any] | None = None
        fields: dict[str, Any] = {}
        if self._is_vlm and pending:
            turn_images, fields = multimodal.turn_fields(
                multimodal_fields,
                [conversation.prompt_ids for conversation in conversations],
                self.processing_class,
                images=images,
                tool_images=tool_images,
                rows=[conversation.row for conversation in pending],
                turn_ids=contexts,
            )
        turns, logps = self._generate_single_turn(
            contexts, turn_images, fields, num_generations=1, has_tool_images=any(tool_images)
        )
        for i, conversation in enumerate(pending):
            ids = turns[i][: self.max_completion_length - len(conversation.ids)]
            message = None
            if ids:
                tools = self._row_tools(conversation.row)
                message = parse_response(self._tokenizer, ids, prefix=contexts[i], tools=tools)
            conversation.add_turn(message, ids, None if logps is None else logps[i][: len(ids)])
