"""Requests through a vLLM engine in this process, step by step, so that what is finished early is known early.

Works as `LLM.generate` does, with `LLM.enqueue` and the engine's own `step`: the same requests in the same order draw
the same completions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from grpo_fast.batch import Completions
from grpo_fast.generation.base import GroupCallback
from grpo_fast.generation.progress import GenerationBar
from grpo_fast.generation.vllm_faults import EngineError, check_logps, check_request


def run_requests(
    llm: Any,
    prompts: list[dict[str, Any]],
    params: list[Any],
    *,
    on_finished: Callable[[int, Any], None] | None = None,
    shows_progress: bool = False,
) -> list[Any]:
    """Run one request a prompt to its end.

    Args:
        llm: A `vllm.LLM` in this process that nobody else uses meanwhile.
        prompts: As vLLM takes them.
        params: The `SamplingParams` of each; changed as `LLM.generate` changes them.
        on_finished: Called between two steps of the engine with the place of a request and its `RequestOutput`, as
            soon as all its completions are there. If it raises, generation ends.
        shows_progress: Whether a bar shows the completions that are done and the tokens a second.

    Returns:
        The `RequestOutput`s in the order of `prompts`.

    Raises:
        EngineError: A step failed: the engine cannot be used again.
        Exception: What vLLM raises for a request that it refuses, or `on_finished`, after the requests that were still
            running have been aborted: the engine can be used again.
    """
    engine = llm.llm_engine
    outputs: list[Any] = [None] * len(prompts)
    try:
        # vLLM appends random characters to the name that an output bears
        names = (name.partition("-")[0] for name in llm.enqueue(prompts, params, use_tqdm=False))
        places = {name: place for place, name in enumerate(names)}
        # the engine forgets a completion's state when it is done
        states = list(engine.output_processor.request_states.values()) if shows_progress else []
        with GenerationBar(len(states), is_shown=shows_progress) as bar:
            while engine.has_unfinished_requests():
                for output in _step(engine):
                    place = places[output.request_id]
                    outputs[place] = output
                    if on_finished is not None:
                        on_finished(place, output)
                if bar.is_due:
                    num_tokens = sum(state.detokenizer.num_output_tokens() for state in states)
                    bar.show(len(states) - engine.get_num_unfinished_requests(), num_tokens)
    except EngineError:
        # it is not asked for anything again
        raise
    except Exception:
        # what is left in the engine would run with the next call
        _abort_all(engine)
        raise
    return outputs


def _step(engine: Any) -> list[Any]:
    try:
        outputs: list[Any] = engine.step()
    except Exception as error:
        raise EngineError(f"{type(error).__name__} while vLLM generated: {error}") from error
    return outputs


def drawn(output: Any, size: int) -> list[Any]:
    """The `size` completions of a request, in order; greedy completions of a prompt are one."""
    completions = sorted(output.outputs, key=lambda completion: completion.index)
    return completions if len(completions) == size else completions * size


def _abort_all(engine: Any) -> None:
    processor = engine.output_processor
    # requests for several completions go with their children, so they are not named together
    engine.abort_request(list(processor.parent_requests), internal=True)
    engine.abort_request(list(processor.request_states), internal=True)


def vllm_prompt(prompt: list[int], images: list[Any] | None) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    request: dict[str, Any] = {"prompt_token_ids": prompt}
    if images:
        request["multi_modal_data"] = {"image": images if len(images) > 1 else images[0]}
    return request


def group_listener(sizes: list[int], on_group: GroupCallback) -> Callable[[int, Any], None]:
    """What a finished request calls: `on_group` with its first row and its completions' tokens."""
    first_rows = [0, *itertools.accumulate(sizes)]

    def on_finished(place: int, output: Any) -> None:
        ids = [list(completion.token_ids) for completion in drawn(output, sizes[place])]
        on_group(first_rows[place], ids)

    return on_finished


def completions_of(outputs: list[Any], sizes: list[int]) -> Completions:
    """The completions of requests for `sizes` completions each, in their order.

    Raises:
        EngineError: one has failed, or a log-prob is NaN or missing.
    """
    ids: list[list[int]] = []
    logps: list[list[float]] = []
    is_scored = True
    for output, size in zip(outputs, sizes, strict=True):
        prompt = len(ids)
        check_request(output, {1, size}, prompt=prompt)
        for completion in drawn(output, size):
            ids.append(list(completion.token_ids))
            flat = completion.logprobs
            if flat is None:
                is_scored = False
                continue
            logps.append([flat.logprobs[start] for start in flat.start_indices])
            check_logps(logps[-1], prompt=prompt)
    return Completions(ids=ids, logps=logps if is_scored else None)
