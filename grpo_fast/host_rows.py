"""The rows of a padded micro-batch on the host, where packs are made of them.

Letters: B rows, C padded completion length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.rollout import unpadded_rows

ROWS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
# what makes a row silent, where it is there; `SKIPPED` [B] bool marks rows that an earlier pass has left out
SKIPPED = "is_skipped"
OPTIONAL = ("tool_mask", "advantages", "importance_sampling_ratio", SKIPPED)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows without their padding.

    Attributes:
        prompt_ids: B lists of token ids.
        completion_ids: B lists of token ids, up to the last that is scored.
        is_scored: [B, C] bool, which completion tokens are.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    is_scored: Tensor


class HostRows:
    """Copies on the host of what packs are made of; made once a rollout, since the device must be waited for."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        """Copy from a padded micro-batch.

        Args:
            inputs: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`, and where given `tool_mask`,
                `advantages` [B] or [B, C], `importance_sampling_ratio` [B, 1] or [B, C], and `SKIPPED`.
        """
        names = [*ROWS, *(name for name in OPTIONAL if name in inputs)]
        self._sources = {name: (inputs[name], inputs[name]._version) for name in names}
        self._values = {name: inputs[name].cpu() for name in names}

    def is_of(self, inputs: dict[str, Any]) -> bool:
        """Whether these are copies of what `inputs` holds, which users' code may replace or write into."""
        names = {*ROWS, *(name for name in OPTIONAL if name in inputs)}
        return names == set(self._sources) and all(
            inputs[name] is tensor and tensor._version == version for name, (tensor, version) in self._sources.items()
        )

    def skip(self, inputs: dict[str, Any], is_skipped: Tensor) -> None:
        """Note in `inputs`, and here, the rows that are left out for good; `is_skipped` [B] bool is on the host."""
        device = inputs["completion_ids"].device
        inputs[SKIPPED] = is_skipped.to(device, non_blocking=True)
        self._sources[SKIPPED] = (inputs[SKIPPED], inputs[SKIPPED]._version)
        self._values[SKIPPED] = is_skipped

    @property
    def input_ids(self) -> Tensor:
        """[B, prompt and completion]."""
        return torch.cat([self._values["prompt_ids"], self._values["completion_ids"]], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """[B, prompt and completion]."""
        return torch.cat([self._values["prompt_mask"], self._values["completion_mask"]], dim=1)

    @property
    def loss_mask(self) -> Tensor:
        """[B, C] bool: what tools wrote is attended to, and not trained."""
        mask = self._values["completion_mask"].bool()
        return mask & self._values["tool_mask"].bool() if "tool_mask" in self._values else mask

    def is_silent(self, *, ratio_multiplies: bool) -> Tensor:
        """[B] bool: rows with tokens in the loss, each of which has the factor 0.

        Args:
            ratio_multiplies: Whether `importance_sampling_ratio` is a factor of the loss, beside the advantage.
        """
        mask = self.loss_mask
        factors = torch.where(mask, _columns(self._values["advantages"]), 0.0)
        if ratio_multiplies and "importance_sampling_ratio" in self._values:
            factors = factors * _columns(self._values["importance_sampling_ratio"])
        is_silent = (factors == 0).all(dim=1)
        if SKIPPED in self._values:
            is_silent |= self._values[SKIPPED]
        return is_silent & mask.any(dim=1)

    def rows(self, *, up_to_last_scored: bool = True) -> Rows:
        """The rows without their padding, and without what follows a completion's last token in the loss."""
        values, mask = self._values, self.loss_mask
        completions = unpadded_rows(values["completion_ids"], values["completion_mask"])
        if up_to_last_scored:
            places = torch.arange(1, mask.shape[1] + 1)
            ends = (mask * places).amax(dim=1).tolist() if mask.shape[1] else [0] * len(mask)
            completions = [row[:end] for row, end in zip(completions, ends, strict=True)]
        return Rows(
            prompt_ids=unpadded_rows(values["prompt_ids"], values["prompt_mask"]),
            completion_ids=completions,
            is_scored=mask,
        )


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of some micro-batches, one after the other."""
    return Rows(
        prompt_ids=[row for part in parts for row in part.prompt_ids],
        completion_ids=[row for part in parts for row in part.completion_ids],
        is_scored=torch.cat([part.is_scored for part in parts]),
    )


def _columns(values: Tensor) -> Tensor:
    return values[:, None] if values.dim() == 1 else values
