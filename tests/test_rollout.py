"""The padded dict: layout, shuffle, slices, length metrics."""

import torch

from grpo_fast.rollout import length_metrics, pad, padded_batch, shuffle_sequence_dict, split_tensor_dict, unpadded_rows

PROMPTS = [[1, 2, 3], [4]]
COMPLETIONS = [[5], []]


def batch(**kwargs):
    settings = {"pad_token_id": 0, "multiple_of": None, "device": torch.device("cpu")} | kwargs
    return padded_batch(PROMPTS, COMPLETIONS, [[-0.5], []], **settings)


def test_layout():
    padded = batch()
    assert padded["prompt_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert padded["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded["completion_ids"].tolist() == [[5], [0]]
    assert padded["completion_mask"].tolist() == [[1], [0]]
    assert padded["sampling_per_token_logps"].tolist() == [[-0.5], [0.0]]
    assert unpadded_rows(padded["prompt_ids"], padded["prompt_mask"]) == PROMPTS
    assert unpadded_rows(padded["completion_ids"], padded["completion_mask"]) == COMPLETIONS


def test_pads_to_a_multiple():
    padded = batch(multiple_of=4)
    assert padded["prompt_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert padded["completion_ids"].shape == (2, 4)


def test_all_completions_empty():
    assert pad([torch.tensor([]), torch.tensor([])]).shape == (2, 0)


def test_shuffle_keeps_rows_together_and_follows_the_seed():
    rows = torch.arange(8)
    torch.manual_seed(3)
    permutation = torch.randperm(8)
    torch.manual_seed(3)
    shuffled = shuffle_sequence_dict(
        {"completion_ids": rows[:, None], "advantages": rows * 2, "num_items_in_batch": torch.tensor(9), "tag": None}
    )
    assert shuffled["completion_ids"].flatten().tolist() == permutation.tolist()
    assert shuffled["advantages"].tolist() == (2 * permutation).tolist()
    assert shuffled["num_items_in_batch"] == 9
    assert [s["completion_ids"].shape[0] for s in split_tensor_dict(shuffled, 4)] == [2, 2, 2, 2]


def test_length_metrics_when_nothing_terminates():
    metrics = length_metrics(torch.tensor([3, 5]), torch.tensor([True, True]))
    assert metrics["completions/mean_length"] == 4
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_terminated_length"] == 0
