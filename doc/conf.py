"""Settings of the documentation: `sphinx-build -W --keep-going doc doc/_build/html`."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pgdbpool

project = "pgdbpool"
author = "the pgdbpool contributors"
project_copyright = author
version = release = pgdbpool.__version__

extensions = ["sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "code"  # a docstring writes `name` where it means code
highlight_language = "python"

autodoc_default_options = {"show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Pages of an extra that is not installed have the signatures all the same.
autodoc_mock_imports = [
    name
    for name in ("django", "flask", "gunicorn", "opentelemetry", "prometheus_client", "sqlalchemy")
    if find_spec(name) is None
]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"pgdbpool {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]

# A console session is copied without its prompts and without what it prints.
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
copybutton_copy_empty_lines = False

PUBLIC = {
    "PooledConnection": "psycopg.Connection",
    "KeptConnection": "psycopg.Connection",
    "CommandTag": "str",
}


def named_publicly(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any
) -> Any:
    """Name the classes of a signature that are internal by what they are for a caller."""
    if returns:
        returns = re.sub(r"\b(?:[\w.]+\.)?(" + "|".join(PUBLIC) + r")\b", lambda m: PUBLIC[m[1]], returns)
    return signature, returns


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", named_publicly)
