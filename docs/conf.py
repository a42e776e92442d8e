# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Settings of the site: `sphinx-build -W docs build/docs`."""

import re
import sys
from pathlib import Path
from typing import Any

import peft_e2vpt


sys.path.append(str(Path(__file__).parent.parent))  # for docs.site

project = "peft_e2vpt"
author = "The peft_e2vpt authors"
copyright = f"2026, {author}"
release = peft_e2vpt.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "docs.site",
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"peft_e2vpt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "_static" / "scorer.js")
html_math_renderer = "mathml"
html_theme_options = {"sidebar_hide_name": False}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

default_role = "code"  # docstrings have single backquotes around names
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def fences_to_blocks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes code blocks of the Markdown fences in a docstring."""
    inside, blocks = False, []
    for line in lines:
        fence = re.fullmatch(r"```(\w*)", line.strip())
        if fence is None:
            blocks.append("    " + line if inside and line else line)
        else:
            inside = not inside
            blocks += [f".. code-block:: {fence[1]}", ""] if inside else [""]
    lines[:] = blocks


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", fences_to_blocks, priority=400)
