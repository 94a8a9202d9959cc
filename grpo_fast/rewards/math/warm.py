"""Imported before workers are forked: what sympy and its parsers build at their first use is then built once."""

from grpo_fast.rewards.math.extraction import PLACES
from grpo_fast.rewards.math.grading import grade

_EXAMPLES = {
    r"2(x+1)": r"2x+2",
    r"x>1": r"(1,\infty)",
    r"x+y=1": r"y=1-x",
    r"\sqrt{2}": "1.414214",
    r"\begin{pmatrix}1\\2\end{pmatrix}": r"\begin{pmatrix}1\\3\end{pmatrix}",
    r"\int_0^1 x dx": r"\frac{\pi}{4}",
}

for _gold, _answer in _EXAMPLES.items():
    grade((_gold,), rf"\boxed{{{_answer}}}", PLACES, False, 1e-6)
