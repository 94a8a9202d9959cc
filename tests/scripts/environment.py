"""The shape of an agent's script: an environment whose methods are tools, another tool beside them."""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model_id, output_dir = sys.argv[1:]


class GuessingGame:
    """The player guesses a number, and hears whether it was too low or too high."""

    def __init__(self):
        self.secret, self.guesses = None, []

    def reset(self, secret: int, **kwargs) -> str:
        self.secret, self.guesses = secret, []
        return " Guess a digit."

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess.

        Returns:
            Whether it is too low or too high.
        """
        self.guesses.append(int(number))
        if number == self.secret:
            raise ValueError("the game is over")
        return "too low" if number < self.secret else "too high"

    def get_reward(self) -> float:
        return -min((abs(guess - self.secret) for guess in self.guesses), default=10) / 10


def hint(first: int, second: int) -> int:
    """
    Tell the middle of two numbers.

    Args:
        first: One number.
        second: The other.

    Returns:
        Their mean, rounded down.
    """
    return (first + second) // 2


def few_calls(completions, environments, **kwargs):
    calls = [sum(len(message.get("tool_calls") or []) for message in messages) for messages in completions]
    assert all(len(game.guesses) <= count for game, count in zip(environments, calls, strict=True))
    return [-float(count) for count in calls]


dataset = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": "Play."}], "secret": secret} for secret in (2, 7, 4, 9)]
)
trainer = GRPOTrainer(
    model=model_id,
    reward_funcs=few_calls,
    train_dataset=dataset,
    args=GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=400,
        max_tool_calling_iterations=2,
        learning_rate=1e-4,
        max_steps=2,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=1,
        chat_template_kwargs={"enable_thinking": False},
        report_to="none",
    ),
    tools=[hint],
    environment_factory=GuessingGame,
)
trainer.train()
trainer.save_state()
