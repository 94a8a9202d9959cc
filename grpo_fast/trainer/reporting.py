"""What a run leaves behind: logs, the completions table, the model card, checkpoints that resume exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grpo_fast.completions import CompletionLog, commit_completions
from grpo_fast.metrics import mean_without_nan
from grpo_fast.model_card import hub_id, make_model_card, run_urls
from grpo_fast.trainer.base import BaseTrainer

logger = logging.getLogger(__name__)

ENTROPY_FILE = "entropy_ctrl_state.json"
REFERENCE_FILE = "ref_model.pth"


class ReportingTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that logs, writes checkpoints and reads them back."""

    _tag_names = ("grpo-fast", "trl", "grpo")
    _name = "GRPO"
    _paper = {  # noqa: RUF012 - TRL's attribute, which subclasses replace
        "title": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "id": "2402.03300",
        "citation": """@article{shao2024deepseekmath,
  title  = {{DeepSeekMath}: Pushing the Limits of Mathematical Reasoning in Open Language Models},
  author = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Xiao Bi and Haowei Zhang and
            Mingchuan Zhang and Y. K. Li and Y. Wu and Daya Guo},
  year   = {2024},
  eprint = {arXiv:2402.03300},
}""",
    }

    log_completions: bool
    log_unique_prompts: bool
    num_completions_to_print: int | None
    num_iterations: int
    use_adaptive_entropy: bool
    entropy_coef: float
    ref_model: nn.Module | None
    commit_scheduler: Any
    _metrics: dict[str, dict[str, list[float]]]
    _logs: CompletionLog
    _last_world_entropy: float
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _flush_stats: Callable[[], None]

    def _prepare_reporting(self) -> None:
        """Make the folder of the completions table and, if the run asks for it, its repository on the hub.

        Raises:
            ConnectionError: If the repository cannot be made.
        """
        self.commit_scheduler = None
        if self.log_completions and self.accelerator.is_main_process:
            self._completions_folder.mkdir(parents=True, exist_ok=True)
            if self.args.log_completions_hub_repo is not None:
                self.commit_scheduler = commit_completions(self.args, self._completions_folder)

    @property
    def _completions_folder(self) -> Path:
        return Path(self.args.output_dir) / "completions"

    def log(self, logs: dict[str, float | None], start_time: float | None = None) -> None:
        """Add the means of the metrics since the last log, then log as `Trainer` does, and show the completions.

        A metric whose values are all NaN is logged as None, which JSON can hold. In evaluation names begin with
        `eval_`.
        """
        self._flush_stats()
        mode = self._mode
        for name, values in self._metrics[mode].items():
            logs[name if mode == "train" else f"eval_{name}"] = mean_without_nan(values)
        super().log(logs, start_time)
        self._metrics[mode].clear()
        if self.log_completions and self.accelerator.is_main_process and self._logs["prompt"]:
            step = self.state.global_step
            self._logs.print_table(step, self.num_completions_to_print)
            self._logs.write(step, self._completions_folder)
            self._logs.send(step, self.args.report_to, self.log_unique_prompts)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into `output_dir`, from the main process.

        Args:
            model_name: The card's title; None means the last part of `hub_model_id` or `output_dir`.
            dataset_name: Hub id of the training data.
            tags: More tags for the hub.
        """
        if not self.is_world_process_zero():
            return
        card = make_model_card(
            model_name=model_name or self._run_name,
            base_model=hub_id(self.accelerator.unwrap_model(self.model)),
            hub_model_id=self.hub_model_id or self.args.hub_model_id,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            method=self._name,
            paper=self._paper,
            run_urls=run_urls(self.args.report_to or []),
        )
        card.save(Path(self.args.output_dir) / "README.md")

    @property
    def _run_name(self) -> str:
        return (self.args.hub_model_id or self.args.output_dir).rstrip("/").split("/")[-1]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that a run resumes from as if it had not stopped.

        Beside what `Trainer` writes: the model card, the entropy controller, and, which TRL loses, the reference model
        where `sync_ref_model` moves it and the rest of the generation batch that training is in the midst of.
        """
        self.create_model_card(model_name=self._run_name)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        # before the rest, which ends with the folder's upload to the hub
        if self.use_adaptive_entropy and self.args.should_save:
            entropy = {"entropy_coef": self.entropy_coef, "last_world_entropy": self._last_world_entropy}
            (folder / ENTROPY_FILE).write_text(json.dumps(entropy))
        if not self.args.save_only_model:
            self._save_reference(folder)
            self._save_rollout(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read back what `_save_checkpoint` wrote; files that are missing, as in a checkpoint of TRL, are left out."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.use_adaptive_entropy and (folder / ENTROPY_FILE).is_file():
            entropy = json.loads((folder / ENTROPY_FILE).read_text())
            self.entropy_coef, self._last_world_entropy = entropy["entropy_coef"], entropy["last_world_entropy"]
        self._load_reference(folder)
        self._load_rollout(folder)

    def _save_reference(self, folder: Path) -> None:
        if self.ref_model is None or not self.args.sync_ref_model:
            return
        model = self.accelerator.unwrap_model(self.ref_model)
        # on the host the main process alone gets the weights
        options = StateDictOptions(full_state_dict=True, cpu_offload=not self.args.save_on_each_node)
        with self._gathered(model):
            weights = get_model_state_dict(model, options=options)
        if self.args.should_save:
            torch.save(weights, folder / REFERENCE_FILE)

    def _load_reference(self, folder: Path) -> None:
        if self.ref_model is None or not self.args.sync_ref_model:
            return
        if not (folder / REFERENCE_FILE).is_file():
            logger.warning("%s has no %s: the reference model starts from the initial policy", folder, REFERENCE_FILE)
            return
        weights = torch.load(folder / REFERENCE_FILE, map_location="cpu", weights_only=True, mmap=True)
        model = self.accelerator.unwrap_model(self.ref_model)
        with self._gathered(model):
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))

    @contextmanager
    def _gathered(self, model: nn.Module) -> Iterator[None]:
        """The whole weights of a model that DeepSpeed ZeRO-3 spreads over processes; what is written to them stays."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            yield

    def _rollout_file(self, folder: Path) -> Path:
        return folder / f"rollout_{self.accelerator.process_index}.pth"

    @property
    def _window(self) -> dict[str, int | None]:
        """What the slices of a generation batch depend on."""
        return {
            "num_processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
        }

    def _save_rollout(self, folder: Path) -> None:
        """Write this process's slices if micro-batches of the generation batch are still to come."""
        assert self.args.steps_per_generation is not None
        inputs = self._buffered_inputs
        if inputs is None or self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            return
        foreign = sorted({name for batch in inputs for name, value in batch.items() if not _is_plain(value)})
        if foreign:
            logger.warning("the rollout is not saved, a resumed run generates anew: %s cannot be stored", foreign)
            return
        torch.save({"step": self._step, "window": self._window, "inputs": inputs}, self._rollout_file(folder))

    def _load_rollout(self, folder: Path) -> None:
        """Go on with the slices of the checkpoint; a checkpoint at the end of a generation batch has none."""
        self._step, self._buffered_inputs = 0, None
        path = self._rollout_file(folder)
        rollout: dict[str, Any] = {}
        if path.is_file():
            rollout = torch.load(path, map_location="cpu", weights_only=True)
            if rollout["window"] != self._window:
                logger.warning("%s is not used: it was of %s, the run has %s", path, rollout["window"], self._window)
                rollout = {}
        # processes generate together or not at all
        if all(gather_object([bool(rollout)])):
            self._step = rollout["step"]
            self._buffered_inputs = send_to_device(rollout["inputs"], self.accelerator.device)


def _is_plain(value: Any) -> bool:
    """Whether `torch.load` gives a value back without running code of its own."""
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)
