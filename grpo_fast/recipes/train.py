"""`grpo-fast train CONFIG.yaml`: a model, a data set and reward functions of the user's own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from grpo_fast import loading
from grpo_fast.config import GRPOConfig
from grpo_fast.data import check_dataset
from grpo_fast.recipes.settings import check_keys, config_fields, convert_settings
from grpo_fast.rewards.registry import make_reward
from grpo_fast.trainer import GRPOTrainer

# what a run needs besides the fields of GRPOConfig
RUN_KEYS = (
    "model",
    "dataset",
    "dataset_config",
    "dataset_split",
    "eval_dataset",
    "eval_dataset_config",
    "eval_dataset_split",
    "rewards",
    "peft",
)
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def run_training(path: str | Path, flags: Mapping[str, object]) -> None:
    """Train as the YAML file says, `flags` winning over it, and save the model into `output_dir`."""
    trainer = make_trainer(path, flags)
    resume: Any = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    print(f"saved the model to {trainer.args.output_dir}")


def make_trainer(path: str | Path, flags: Mapping[str, object]) -> GRPOTrainer:
    """The trainer that the YAML file describes; `output_dir` is `runs/<name of the file>` unless it is set.

    Args:
        path: The YAML file. Files and reward modules it names are looked for in its folder, then in the working
            directory.
        flags: Settings that win over the file's.

    Raises:
        ValueError: For an unknown setting, a value of the wrong kind, a file, column or reward function that is not
            there; before any weights are read.
    """
    path = Path(path)
    run, settings = read_run(path, flags, needed=("model", "dataset", "rewards"))
    args = GRPOConfig(**convert_settings(settings))
    reward_funcs = resolve_rewards(run["rewards"], [path.parent, Path.cwd()])
    peft_config = None if run["peft"] is None else make_peft_config(run["peft"])
    model = str(run["model"])
    loading.load_config(model, args)
    train_dataset = read_dataset(run, "dataset", path.parent, default_split="train")
    eval_dataset = read_dataset(run, "eval_dataset", path.parent, default_split="test")
    return GRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )


def read_run(
    path: Path, flags: Mapping[str, object], *, needed: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file says besides the fields of GRPOConfig, and those fields; `flags` win over the file.

    Raises:
        ValueError: If the file cannot be read, a setting is unknown or one of `needed` is not there.
    """
    settings = read_settings(path)
    known = [*RUN_KEYS, *config_fields()]
    check_keys(settings, known, where=str(path))
    check_keys(flags, known, where="the flags of `grpo-fast train`")
    settings = {"output_dir": f"runs/{path.stem}", **settings, **flags}
    run: dict[str, Any] = {key: settings.pop(key, None) for key in RUN_KEYS}
    for key in needed:
        if not run[key]:
            raise ValueError(f"{path} needs a setting `{key}`")
    return run, settings


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError if there is no such file or it holds anything else."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"{path} must hold settings as `name: value` lines, it holds {type(settings).__name__}")
    return {key.replace("-", "_"): value for key, value in settings.items()}


def resolve_rewards(names: object, folders: list[Path]) -> list[Callable[..., Any]]:
    """The functions that the setting `rewards` stands for.

    Args:
        names: One reward or a list of them, each as `grpo_fast.rewards.registry.make_reward` takes it.
        folders: Put in front of `sys.path`, where the modules stay importable.

    Raises:
        ValueError: As `make_reward`.
    """
    listed = names if isinstance(names, list) else [names]
    sys.path[:0] = [str(folder.resolve()) for folder in folders if str(folder.resolve()) not in sys.path]
    return [make_reward(name) for name in listed]


def make_peft_config(settings: object) -> Any:
    """A `peft.LoraConfig` from a mapping of its fields; ValueError if a field is unknown or peft is not installed."""
    if not isinstance(settings, dict):
        raise ValueError(f"peft must be a mapping of LoraConfig's fields, it is {settings!r}")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("the setting `peft` needs peft: pip install peft")
    from peft import LoraConfig

    check_keys(settings, [field.name for field in fields(LoraConfig)], where="`peft`")
    return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})


def read_dataset(run: dict[str, Any], key: str, folder: Path, *, default_split: str) -> Dataset | None:
    """The data set that the setting `key` names, None if there is none; a file is looked for in `folder` first.

    Raises:
        ValueError: If it is not there or has no prompts.
    """
    name, config, split = run[key], run[f"{key}_config"], run[f"{key}_split"]
    if name is None:
        return None
    suffix = Path(str(name)).suffix.lower()
    if suffix in READERS:
        places = [place for place in (folder / name, Path(name)) if place.is_file()]
        if not places:
            raise ValueError(f"{key}: there is no file {name!r}, neither in {folder.resolve()} nor in {Path.cwd()}")
        dataset = load_dataset(READERS[suffix], data_files=str(places[0]), split="train")
    else:
        try:
            dataset = load_dataset(str(name), config, split=split or default_split)
        except (DatasetNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"{key}={name!r} is neither a {', '.join(READERS)} file nor a data set the hub can give: {error}"
            ) from error
    check_dataset(dataset, key)
    return dataset
