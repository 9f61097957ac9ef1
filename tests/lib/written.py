"""The test functions that are written in files."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path


def functions_in(*paths: Path) -> Counter[str]:
    """Return how often a test function of each name is in the files."""
    return Counter(
        node.name
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )
