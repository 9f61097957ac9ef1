"""Settings of the documentation: `sphinx-build -W --keep-going doc doc/_build/html`."""

from __future__ import annotations

import pgdbpool

project = "pgdbpool"
author = "the pgdbpool contributors"
project_copyright = author
version = release = pgdbpool.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
default_role = "code"  # a docstring writes `name` where it means code
highlight_language = "python"

autodoc_default_options = {"show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"pgdbpool {release}"
html_show_sphinx = False
