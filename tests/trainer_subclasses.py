"""Subclasses of a GRPO trainer as people write them, one factory each: it takes the class to build on.

The same code is run on TRL's trainer and on ours.
"""

import torch
from torch.utils.data import SequentialSampler


def token_advantages(base):
    """Advantages of tokens: later ones count less."""

    class Discounted(base):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            steps = torch.arange(batch["completion_ids"].shape[1])
            batch["advantages"] = batch["advantages"][:, None] * 0.8**steps
            return batch

    return Discounted


def shorter_masks(base):
    """Masks of completions: some rows left out, others cut short."""

    class Masking(base):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batch["completion_mask"][1::4] = 0
            batch["completion_mask"][:, 6:] = 0
            return batch

    return Masking


def masks_with_holes(base):
    """Tokens inside completions that are neither trained nor attended to."""

    class Holes(base):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batch["completion_mask"][:, 2:4] = 0
            return batch

    return Holes


def length_penalty(base):
    class Penalised(base):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            assert rewards.shape == (len(inputs), 2)
            assert [row["prompt"] for row in inputs] == prompts
            rewards[:, 0] -= torch.tensor([0.1 * len(ids) for ids in completion_ids_list])
            return rewards

    return Penalised


def annealed_inputs(base):
    class Annealed(base):
        def _prepare_inputs(self, generation_batch):
            inputs = super()._prepare_inputs(generation_batch)
            assert self._buffered_inputs is None or len(self._buffered_inputs) == self.args.steps_per_generation
            return {**inputs, "advantages": inputs["advantages"] / (1 + self._step)}

    return Annealed


def cut_completions(base):
    class Cut(base):
        def _generate(self, prompts):
            prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = (
                super()._generate(prompts)
            )
            assert (tool_mask, extra_fields, images) == (None, {}, None)
            completion_ids = [ids[:5] for ids in completion_ids]
            completions = [text[:5] for text in completions]
            return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images

    return Cut


def forced_ends(base):
    class Ending(base):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
            assert prompt_ids[0] == prompt_ids[num_generations - 1]
            ids, logprobs = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, **kwargs
            )
            return [[*row[:4], self.eos_token_ids[0]] for row in ids], logprobs

    return Ending


def longer_prompts(base):
    class Thinking(base):
        def _tokenize_prompts(self, prompts):
            prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
            return [[*ids, 5] for ids in prompt_ids], images, multimodal_fields

    return Thinking


def two_losses(base):
    """The loss of all tokens and the loss of each row's first tokens, one graph for both."""

    class Twice(base):
        def _compute_loss(self, model, inputs):
            whole = super()._compute_loss(model, inputs)
            mask = inputs["completion_mask"].clone()
            mask[:, 3:] = 0
            return whole + 0.5 * super()._compute_loss(model, {**inputs, "completion_mask": mask})

    return Twice


def reward_in_the_loss(base):
    class Scaled(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            reward = self._metrics["train"]["reward"][-1]
            entropy = self._metrics["train"]["entropy"][-1]
            return loss * (1 + reward) * entropy

    return Scaled


def flattened_policy(base):
    class Flat(base):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return 0.7 * logps, entropies, aux_loss

    return Flat


def own_scores(base):
    """A full loss over what the scoring seam gives: REINFORCE with an entropy term."""

    class Reinforce(base):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, attention, inputs["completion_ids"].size(1), batch_size=3, compute_entropy=True
            )
            mask = inputs["completion_mask"]
            terms = -inputs["advantages"][:, None] * logps - 0.5 * entropies
            return (terms * mask).sum() / mask.sum() / self.current_gradient_accumulation_steps

    return Reinforce


def geometric_mean(base):
    """GMPO (arXiv:2507.20673): the geometric mean of each row's one-sidedly clipped ratios, with a KL term."""

    class Geometric(base):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            mask, width = inputs["completion_mask"], inputs["completion_ids"].size(1)
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, attention, width, compute_entropy=True, pixel_values=inputs.get("pixel_values")
            )
            tokens = mask * self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
            old = inputs.get("old_per_token_logps", logps.detach())
            sign = inputs["advantages"].sign()[:, None]
            # pessimistic: a gain counts up to the bound, a loss counts in full
            bounds = torch.where(sign > 0, self.epsilon_high, self.epsilon_low)
            clipped = sign * torch.minimum(sign * (logps - old), bounds)
            clipped = torch.where(sign == 0, logps - old, clipped)
            ratios = ((clipped * tokens).sum(1) / tokens.sum(1).clamp(min=1)).exp()
            delta = inputs["ref_per_token_logps"] - logps
            kl = ((delta.exp() - delta - 1) * mask).sum(1) / mask.sum(1).clamp(min=1)
            loss = (self.beta * kl - ratios * inputs["advantages"]).mean()
            self._metrics["train"]["geometric_ratio"].append(ratios.mean().item())
            return loss / self.current_gradient_accumulation_steps

    return Geometric


def extra_log(base):
    class Logging(base):
        def log(self, logs, start_time=None):
            logs["num_prompts"] = len(set(self._logs["prompt"]))
            logs["best"] = max(self._logs["rewards"]["digits"])
            logs["advantages"] = sum(map(abs, self._logs["advantages"]))
            super().log(logs, start_time)

    return Logging


def in_order(base):
    class InOrder(base):
        def _get_train_sampler(self, dataset=None):
            repeats = self.num_generations * self.num_iterations * self.args.steps_per_generation
            # groups must stay together
            return [i for i in SequentialSampler(self.train_dataset) for _ in range(repeats)]

    return InOrder


def last_rows_only(base):
    class Curriculum(base):
        def get_train_dataloader(self):
            self.train_dataset = self.train_dataset.select(range(6, 14))
            return super().get_train_dataloader()

    return Curriculum


# -- several seams -----------------------------------------------------------------------------------------------------


def keys_of_its_own(base):
    """Entries of the padded dict that must reach the loss beside the rows they belong to."""

    class Keyed(base):
        def __init__(self, *args, **kwargs):
            self.seen = []
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batch["texts"] = [row["prompt"] for row in inputs]
            batch["row"] = torch.arange(len(inputs))
            batch["first_token"] = batch["completion_ids"][:, :1].clone()
            batch["nothing"] = None
            batch["scale"] = torch.tensor(0.5)
            return batch

        def _compute_loss(self, model, inputs):
            assert len(inputs["texts"]) == len(inputs["row"]) == self.args.per_device_train_batch_size
            prompts = self.processing_class.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
            assert [text.replace(" ", "") for text in prompts] == [text.replace(" ", "") for text in inputs["texts"]]
            assert torch.equal(inputs["first_token"], inputs["completion_ids"][:, :1])
            assert inputs["nothing"] is None
            self.seen.append(inputs["row"].tolist())
            weights = (1 + inputs["row"]) * inputs["scale"]
            return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * weights})

    return Keyed


def replay_buffer(base):
    """Groups whose rewards are all equal teach nothing: past groups take their place."""

    class Replaying(base):
        def __init__(self, *args, **kwargs):
            self.past = []
            self.num_replayed = 0
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            groups = range(0, len(inputs), self.num_generations)
            is_flat = [bool((self.group(batch, start)["advantages"] == 0).all()) for start in groups]
            fresh = [self.group(batch, start) for start, flat in zip(groups, is_flat, strict=True) if not flat]
            for start, flat in zip(groups, is_flat, strict=True):
                if flat and self.past:
                    batch = self.replaced(batch, start, self.past[self.num_replayed % len(self.past)])
                    self.num_replayed += 1
            self.past += fresh
            batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
            self._metrics["train"]["replayed"].append(float(self.num_replayed))
            return batch

        def group(self, batch, start):
            rows = slice(start, start + self.num_generations)
            return {name: value[rows].clone() for name, value in batch.items() if value.dim()}

        def replaced(self, batch, start, group):
            widths = {
                part: max(batch[f"{part}_ids"].shape[1], group[f"{part}_ids"].shape[1])
                for part in ("prompt", "completion")
            }
            batch, group = self.widened(batch, widths), self.widened(group, widths)
            for name, value in group.items():
                batch[name][start : start + self.num_generations] = value
            return batch

        def widened(self, batch, widths):
            batch = dict(batch)
            for part, width in widths.items():
                for name, fill in ((f"{part}_ids", self.processing_class.pad_token_id), (f"{part}_mask", 0)):
                    missing = width - batch[name].shape[1]
                    sides = (missing, 0) if part == "prompt" else (0, missing)
                    batch[name] = torch.nn.functional.pad(batch[name], sides, value=fill)
            return batch

    return Replaying


def evaluating(base):
    class Evaluating(base):
        def __init__(self, *args, **kwargs):
            self.rewards = []
            super().__init__(*args, **kwargs)

        def _get_eval_sampler(self, eval_dataset):
            return [i for i in range(len(eval_dataset)) for _ in range(self.num_generations_eval)]

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            self.rewards.append([line["eval_reward"] for line in self.state.log_history if "eval_reward" in line])
            return metrics

    return Evaluating


def scripted_tools(base):
    """Rows of even number call a tool, and the loop's own tokens are left out of the loss."""

    class Scripted(base):
        def __init__(self, *args, script, **kwargs):
            self.script = script
            self.loops = []
            super().__init__(*args, **kwargs)

        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
            is_first = num_generations > 1
            turns = []
            for i in range(len(prompt_ids)):
                words = torch.randint(3, 90, (4,)).tolist()
                turns.append([*words, *(self.script if is_first and i % 2 == 0 else self.script[-1:])])
            return turns, None

        def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, *args):
            starts = [len(ids) for ids in completion_ids]
            result = super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, *args)
            tool_mask, completions, completion_ids, logprobs, num_calls, num_failures, tool_images = result
            self.loops.append((num_calls, num_failures, [len(messages) for messages in completions]))
            assert logprobs is None
            assert [len(mask) for mask in tool_mask] == [len(ids) for ids in completion_ids]
            tool_mask = [
                [*mask[:start], *[0] * (len(mask) - start)] for mask, start in zip(tool_mask, starts, strict=True)
            ]
            return tool_mask, completions, completion_ids, logprobs, num_calls, num_failures, tool_images

    return Scripted
