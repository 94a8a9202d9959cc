"""Reward models that read a part of the completion: R1's helpfulness looks at the summary, its harmlessness at all.

Source: DeepSeek-R1 (arXiv:2501.12948, Nature version), section on the second stage of reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from grpo_fast.rewards.format import ThinkInPrompt, check_think_in_prompt, thoughts_begun
from grpo_fast.rewards.models import MAX_TOKENS, longest_text, mirror_pad_token, reward_texts, score_texts
from grpo_fast.rewards.texts import LogMetric, log_share, summary_of


class ModelReward:
    """The first logit of a sequence classifier for the prompt with the completion, or with its summary only.

    A function like any other, in TRL's trainer, too: every process has the whole model, and it is not prepared by
    accelerate, which models given to the trainer themselves are. It is not called beside generation
    (`overlap_rewards`), whose device it would take.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: Any = None,
        *,
        part: Literal["all", "summary"] = "all",
        think_in_prompt: ThinkInPrompt = "auto",
        no_summary: float | None = None,
        device: str | torch.device | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        """Nothing is loaded before the first call.

        Args:
            model: A folder or an id of the hub, or the classifier, which then stays where it is.
            processing_class: Its tokenizer; None takes that of the same path.
            part: "summary" leaves out of the completion what stands before the last `</think>`, and reasoning that a
                parser has put beside the content.
            think_in_prompt: As in `Format`.
            no_summary: With part="summary", the reward of a completion whose thought is not ended. The share of them is
                logged as `rewards/<name>/no_summary`.
            device: Where a model goes that is loaded here; None is the process's accelerator, or else the CPU.
            model_init_kwargs: For `from_pretrained`, such as dtype and revision.
            chat_template_kwargs: For the model's chat template, where prompts are messages.
            name: In the metrics; None is the last part of the model's path, with `_summary` for that part.

        Raises:
            ValueError: If `part` or `think_in_prompt` is not one of these, or a model's path is not known.
        """
        path = model if isinstance(model, str) else str(getattr(getattr(model, "config", None), "_name_or_path", ""))
        suffix = "_summary" if part == "summary" else ""
        self.__name__ = name or (path.rstrip("/").split("/")[-1] or type(model).__name__) + suffix
        if part not in ("all", "summary"):
            raise ValueError(f"{self.__name__}: part must be 'all' or 'summary', it is {part!r}")
        check_think_in_prompt(think_in_prompt, self.__name__)
        if processing_class is None and not path:
            raise ValueError(f"{self.__name__}: processing_class is needed, the model does not say where its own is")
        self._path, self._part, self._think_in_prompt, self._no_summary = path, part, think_in_prompt, no_summary
        self._device, self._model_init_kwargs = device, dict(model_init_kwargs or {})
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self._given_model = None if isinstance(model, str) else model
        self._loaded_model: nn.Module | None = None
        self._processing_class = processing_class

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_metric: LogMetric | None = None, **columns: Any
    ) -> list[float | None]:
        parts: list[Any] = list(completions)
        if self._part == "summary":
            begun = thoughts_begun(self._think_in_prompt, prompts, len(completions))
            parts = [_with_summary(*pair) for pair in zip(completions, begun, strict=True)]
            log_share(log_metric, f"rewards/{self.__name__}/no_summary", [part is None for part in parts])
        rows = [row for row, part in enumerate(parts) if part is not None]
        rewards: list[float | None] = [self._no_summary] * len(parts)
        scores = self._scores([prompts[row] for row in rows], [parts[row] for row in rows]) if rows else []
        for row, score in zip(rows, scores, strict=True):
            rewards[row] = score
        return rewards

    def __getstate__(self) -> dict[str, Any]:
        """A model that was loaded here is loaded again where it is needed."""
        return self.__dict__ | {"_loaded_model": None}

    def _scores(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        model, processing_class = self._model()
        texts = reward_texts(
            prompts,
            completions,
            processing_class,
            is_conversational=not isinstance(prompts[0], str),
            chat_template_kwargs=self._chat_template_kwargs,
        )
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        rows_per_batch = max(1, MAX_TOKENS // max(1, longest_text(texts, processing_class)))
        scores = score_texts(model, processing_class, texts, rows_per_batch=rows_per_batch, device=device)
        return scores.tolist()

    def _model(self) -> tuple[nn.Module, Any]:
        kwargs = self._model_init_kwargs
        if self._processing_class is None:
            kept = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
            self._processing_class = AutoTokenizer.from_pretrained(self._path, **kept)
        model = self._given_model or self._loaded_model
        if model is None:
            model = AutoModelForSequenceClassification.from_pretrained(self._path, num_labels=1, **kwargs)
            model = self._loaded_model = model.to(self._device or _own_device())
        if hasattr(model, "config"):
            mirror_pad_token(model, self._processing_class)
        return model.eval(), self._processing_class


def _own_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _with_summary(completion: Any, is_begun: bool) -> Any:
    """The completion with its summary only; None where there is none."""
    summary = summary_of(completion, is_begun=is_begun)
    if summary is None or isinstance(completion, str):
        return summary
    last = max((i for i, message in enumerate(completion) if message.get("role") in (None, "assistant")), default=None)
    if last is None:
        return completion
    kept = {key: value for key, value in completion[last].items() if key not in ("reasoning_content", "thinking")}
    return [*completion[:last], {**kept, "content": summary}, *completion[last + 1 :]]
