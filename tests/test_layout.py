"""What linters cannot say about the tree."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_source_root():
    """A package named `kernels` would shadow the PyPI package transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
