"""The command line: `grpo-fast demo`, `grpo-fast train CONFIG.yaml` and `grpo-fast lint-data CONFIG.yaml`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version

DESCRIPTION = "GRPO training: packed sequences, a fused LM head and a colocated vLLM engine."

DEMO_DESCRIPTION = """\
Train a small language model on verifiable arithmetic and show its held-out accuracy before and after.
Writes summary.json, report.md, curves.png and the trained model into the output folder."""

TRAIN_DESCRIPTION = """\
Train a model of your own on a data set of your own with reward functions of your own. CONFIG.yaml:

  model: Qwen/Qwen3-0.6B            # a hub id or a folder
  dataset: problems.jsonl           # a hub id, or a .jsonl, .json or .parquet file; needs a column `prompt`
  dataset_config: main              # hub data sets: the configuration and split (default: train)
  dataset_split: train
  eval_dataset: heldout.jsonl       # optional; eval_dataset_config, eval_dataset_split (default: test)
  rewards: [accuracy, my_rewards:exact]         # a reward of grpo-fast, or module:function, found beside the YAML or
                                    # in the working directory; with arguments: {accuracy: {timeout: 5}}
  peft: {r: 16, target_modules: all-linear}     # optional: the fields of peft.LoraConfig
  learning_rate: 1e-6               # ... and any field of GRPOConfig"""

LINT_DESCRIPTION = """\
Say which gold answers of a data set a training run could score against, before it is run: their kinds, and the rows
that can never score. Reads the same CONFIG.yaml as `grpo-fast train`, loads no model.
Exits with 0 if all rows can score, with 1 if some cannot, with 2 for a mistake in the settings."""

FLAGS_EPILOG = """\
Every field of GRPOConfig is a flag too: --learning_rate 2e-5 or --learning-rate=2e-5, --reward_weights 1 0.5,
--log_completions true (or the bare flag), --generation_kwargs '{"stop": ["\\n"]}'. Flags win over everything else."""

# read when torch's libraries are loaded
ENVIRONMENT = {
    # threads that spin while they wait starve each other on a busy machine
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # matrix products are compiled for each length of a pack, some 15 of them of 0.7 MB each; the default keeps 1,024
    "LRU_CACHE_CAPACITY": "24",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "24",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 on success, 2 for a mistake of the user's (one line on stderr), 130 on Ctrl-C.

    1 is `lint-data`'s, for data of which some cannot score.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    parser = _make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        flags = parse_flags(rest)
        if arguments.command == "demo":
            _demo(arguments, flags)
        elif arguments.command == "lint-data":
            from grpo_fast.recipes.lint_data import run_lint

            return run_lint(arguments.config, flags)
        else:
            from grpo_fast.recipes.train import run_training

            run_training(arguments.config, flags)
    except (ValueError, ImportError) as error:
        if arguments.traceback:
            raise
        print(f"grpo-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("grpo-fast: interrupted", file=sys.stderr)
        return 130
    return 0


def parse_flags(words: list[str]) -> dict[str, object]:
    """Settings from `--name value`, `--name=value`, `--name v1 v2` (a list) and `--name` (true), in snake case.

    Raises:
        ValueError: For a value that no flag precedes, or a flag that is given twice.
    """
    values: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            if name in values:
                raise ValueError(f"--{flag} is given twice")
            values[name] = [value] if "=" in word else []
        elif name is None:
            raise ValueError(f"unexpected argument {word!r}: settings are given as --name value")
        else:
            values[name].append(word)
    return {name: found if len(found) > 1 else found[0] if found else True for name, found in values.items()}


def _demo(arguments: argparse.Namespace, flags: dict[str, object]) -> None:
    from grpo_fast.recipes.demo import run_demo
    from grpo_fast.recipes.settings import check_keys, config_fields, convert_settings

    check_keys(flags, [*vars(arguments), *config_fields()], where="the flags of `grpo-fast demo`")
    run_demo(
        preset=arguments.preset,
        model=arguments.model,
        seed=arguments.seed,
        max_steps=arguments.max_steps,
        output_dir=arguments.output_dir,
        engine=arguments.engine,
        overrides=convert_settings(flags),
    )


def _make_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="grpo-fast", description=DESCRIPTION, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"grpo-fast {version('grpo-fast')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--traceback", action="store_true", help="show where an error was raised")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="train a small model on arithmetic, before and after",
        description=DEMO_DESCRIPTION,
        epilog=FLAGS_EPILOG,
        formatter_class=layout,
        allow_abbrev=False,
    )
    demo.add_argument(
        "--preset",
        choices=("smollm2", "smoke"),
        default="smollm2",
        help="smollm2: SmolLM2-135M-Instruct, some minutes (default); smoke: a 0.8 M model learns to think, a minute",
    )
    demo.add_argument("--model", metavar="PATH_OR_ID", help="another model for the preset's task")
    demo.add_argument("--seed", type=int, default=0, help="default: 0")
    demo.add_argument("--max-steps", "--max_steps", type=int, help="optimizer steps (default: the preset's)")
    demo.add_argument("--output-dir", "--output_dir", default="runs/demo", help="default: runs/demo")
    demo.add_argument(
        "--engine",
        choices=("vllm", "transformers"),
        help="what generates (default: vllm for smollm2, transformers for smoke)",
    )

    train = commands.add_parser(
        "train",
        parents=[common],
        help="train from a YAML file",
        description=TRAIN_DESCRIPTION,
        epilog=FLAGS_EPILOG,
        formatter_class=layout,
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG.yaml")

    lint = commands.add_parser(
        "lint-data",
        parents=[common],
        help="check the gold answers of a training run's data",
        description=LINT_DESCRIPTION,
        epilog=FLAGS_EPILOG,
        formatter_class=layout,
        allow_abbrev=False,
    )
    lint.add_argument("config", metavar="CONFIG.yaml")
    return parser


if __name__ == "__main__":
    sys.exit(main())
