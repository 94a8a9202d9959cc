"""What several kernel tests watch."""

import sys

import pytest

from grpo_kernels.tiles import make_plan


@pytest.fixture
def plans(monkeypatch):
    """The plans of the calls made since."""
    made = []

    def record(*args, **kwargs):
        made.append(make_plan(*args, **kwargs))
        return made[-1]

    for name, module in list(sys.modules.items()):
        if name.startswith("grpo_kernels.") and getattr(module, "make_plan", None) is make_plan:
            monkeypatch.setattr(module, "make_plan", record)
    return made
