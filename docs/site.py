# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What the site adds to Sphinx, so that pages stay plain Markdown that reads as well where it lies.

* Formulas become MathML when the site is built: no script and no fonts from elsewhere.
* A name of the API in backquotes, `E2VPTConfig`, links to its description.
* An image that has a variant for dark pages beside it, `run.png` and `run-dark.png`, is shown in the one that fits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import desc_signature
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode


# ---------------------------------------------------------------------------------------------------------- formulas
def write_formula(writer: Any, node: nodes.math) -> None:
    """A formula in the text."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def write_display(writer: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own, which scrolls where the window is narrower."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


# ----------------------------------------------------------------------------------------------- names of the API
CALL = re.compile(r"([\w.]*[a-zA-Z_]\w*)(\(.*\))?", re.DOTALL)


class LinkNames(SphinxPostTransform):
    """Makes links of names of the API that stand in backquotes."""

    default_priority = 200

    def run(self, **kwargs: Any) -> None:
        python = self.env.get_domain("py")
        full_names: dict[str, set[str]] = {}
        for full_name, described in python.objects.items():  # type: ignore[attr-defined]
            if described.aliased:  # where the name is defined, which readers need not know
                continue
            full_names.setdefault(full_name.rpartition(".")[2], set()).add(full_name)
        for literal in list(self.document.findall(nodes.literal)):
            if any(isinstance(above, (nodes.reference, nodes.title, desc_signature)) for above in ancestors(literal)):
                continue
            name = CALL.fullmatch(literal.astext())
            found = full_names.get(name[1].rpartition(".")[2], set()) if name else set()
            # `model.merge_adapter` is a method, `peft_e2vpt.load` a function, `PeftModel.load_adapter` somebody else's
            fitting = {one for one in found if one.endswith(name[1]) or name[1].startswith(("model.", "callback."))}
            if len(fitting) != 1:
                continue
            (target,) = fitting
            entry = python.objects[target]  # type: ignore[attr-defined]
            if entry.docname == self.env.docname and entry.node_id in ids_above(literal):
                continue
            builder = self.app.builder
            link = make_refnode(builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy(), target)
            literal.replace_self(link)


def ancestors(node: nodes.Node) -> list[nodes.Node]:
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def ids_above(node: nodes.Node) -> set[str]:
    """Names of the description that a node stands in: it needs no link to itself."""
    descriptions = [above for above in ancestors(node) if above.tagname == "desc"]
    return {name for above in descriptions for name in above[0]["ids"]}


# ------------------------------------------------------------------------------------------------------- dark variants
class DarkVariants(SphinxTransform):
    """Shows `figure-dark.png` on dark pages in place of `figure.png`, where both lie side by side."""

    default_priority = 100  # before images are collected

    def apply(self, **kwargs: Any) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for image in list(self.document.findall(nodes.image)):
            path = Path(image["uri"])
            dark = path.with_name(f"{path.stem}-dark{path.suffix}")
            if path.stem.endswith("-dark") or not (folder / dark).is_file():
                continue
            variant = image.deepcopy()
            variant["uri"] = dark.as_posix()
            variant["classes"] = [*image["classes"], "only-dark"]
            image["classes"] = [*image["classes"], "only-light"]
            image.parent.insert(image.parent.index(image) + 1, variant)


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_display, None))
    app.add_transform(DarkVariants)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
