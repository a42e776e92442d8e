# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a task model trains besides prompts: `find_heads`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .module_names import Modules, join, lies_in
from .sites import AttentionSite


ODD_HEADS: dict[str, str] = {
    # class of the model:   regular expression that the paths of its heads match as a whole
    "Perceiver": r"perceiver\.decoder\.(.+\.)?final_layer",  # inside the base model
    "VisionEncoderDecoderModel": "enc_to_dec_proj",  # no "For" in its name
}
"""Heads of models whose structure does not show them; a key is the beginning of a class name."""

CLASS_HEAD = re.compile(r"class|cls|score|logit")  # names of layers deep in a decoder that tell classes apart


def find_heads(model: nn.Module, sites: list[AttentionSite]) -> list[str]:
    """Paths of what a task model trains besides prompts, in the order of the model; empty for a bare backbone.

    These are heads:

    * in a task model of transformers, the parts outside the backbone that come after it: a classifier, a neck, a
      decoder of maps. Not embeddings, single norms, other towers or the output embeddings of a language model;
    * in a model of timm, its classifier, by timm's own account;
    * in other models (a backbone and `self.fc`), the parts beside the backbone, and the heads of the model inside;
    * layers of a decoder that tell classes apart, such as those a detector has for every layer of its decoder;
    * whatever `from_pretrained` has drawn anew outside the backbone, because the checkpoint lacks it or has it in
      another shape.

    Args:
        model: the model to adapt.
        sites: its self-attentions.
    """
    modules = Modules(model)
    vision = [site.name for site in sites if site.is_vision] or [site.name for site in sites]
    anatomy = _Anatomy(modules, vision, [site.name for site in sites])
    paths = [*anatomy.heads(""), *anatomy.class_heads(), *anatomy.drawn_anew()]
    return modules.with_tied(modules.unambiguous(modules.outermost(paths)))


def other_parts(model: nn.Module, sites: list[AttentionSite]) -> list[str]:
    """Paths of what could be a head of a task model in which none was found; empty where none is expected.

    A language model needs no other head than its output embeddings, which stay as they are.
    """
    modules = Modules(model)
    names = [site.name for site in sites]
    anatomy = _Anatomy(modules, names, names)
    if _is_timm(model) or _has_output_embeddings(model) or not (anatomy.is_own(model) or _has_task(model)):
        return []
    return [
        name
        for name in modules.children("")
        if not modules.holds(name, names) and modules.parameters(name) and not anatomy.is_norm_or_embedding(name)
    ]


def has_input_embeddings(model: nn.Module) -> bool:
    """Whether a model tells its input embeddings; some detectors of transformers cannot."""
    try:
        return isinstance(model, PreTrainedModel) and model.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def _has_task(model: nn.Module) -> bool:
    """Whether transformers' class of a model, or one it inherits from, is for a task: ViT*For*ImageClassification."""
    return any(re.search("For[A-Z]", cls.__name__) for cls in type(model).__mro__)


def _is_timm(model: Any) -> bool:
    return isinstance(getattr(model, "default_cfg", None), dict) and "classifier" in model.default_cfg


def _is_model(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) or _is_timm(module)


def _output_embeddings(model: nn.Module) -> list[nn.Module]:
    """The output embeddings of the language models in a model."""
    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            output = module.get_output_embeddings()
            found += [output] if isinstance(output, nn.Module) else []
    return found


def _has_output_embeddings(model: nn.Module) -> bool:
    return bool(_output_embeddings(model)) or any(hasattr(module, "lm_head") for module in model.modules())


class _Anatomy:
    """What the parts of a model are.

    Args:
        modules: the modules of the model.
        adapted: paths of the self-attentions whose backbone prompts are for.
        attentions: paths of all self-attentions.
    """

    def __init__(self, modules: Modules, adapted: list[str], attentions: list[str]) -> None:
        self.modules, self.adapted, self.attentions = modules, adapted, attentions
        self.root = modules[""]
        self.of_language = {id(module) for module in _output_embeddings(self.root)}
        self.backbones = sorted({self._backbone_of(name) for name in adapted})

    # ----------------------------------------------------------------------------------------------- three ways to see
    def heads(self, path: str) -> Iterator[str]:
        """Heads that the structure of the model at `path` shows."""
        model = self.modules[path]
        if _is_timm(model):
            yield from self._timm_heads(path)
            return
        for begin, pattern in ODD_HEADS.items():
            if type(model).__name__.startswith(begin):
                inner = self.modules.below(path)
                yield from (p for p in inner if re.fullmatch(pattern, p.removeprefix(path).removeprefix(".")))
                return
        own = self.is_own(model)
        if not own and not _has_task(model):
            return
        children = [join(path, name) for name in self.modules.children(path)]
        holders = [child for child in children if self.modules.holds(child, self.adapted)]
        inner = [child for child in holders if self._holds_model(child)]
        first = children.index(holders[0])
        for index, child in enumerate(children):
            if child in inner:
                yield from self.heads(child)
            elif child not in holders and (inner or not own or index > first) and self._is_head(child, own):
                yield child

    def class_heads(self) -> Iterator[str]:
        """Layers deep in a decoder whose outputs are as many as the classes, or one more."""
        num_labels = getattr(getattr(self.root, "config", None), "num_labels", None)
        if num_labels is None or not _has_task(self.root):
            return
        classes = {num_labels, num_labels + 1}
        for path, module in self.modules.items():
            parent, _, name = path.rpartition(".")
            name = parent.rpartition(".")[2] if name.isdigit() else name
            if isinstance(module, nn.Linear) and module.out_features in classes and CLASS_HEAD.search(name):
                if not self._lies_in_a_backbone(path) and id(module) not in self.of_language:
                    yield path

    def drawn_anew(self) -> Iterator[str]:
        """The largest modules without any value from the checkpoint that the rest of their model came from."""
        loaded: set[str] = set()  # modules with values from a checkpoint
        for path, module in self.modules.items():
            if any(getattr(value, "_is_hf_initialized", False) for value in module._parameters.values()):
                while path and path not in loaded:
                    loaded.add(path)
                    path = _parent(path)
                loaded.add("")
        for path in self.modules:
            around = self._model_around(path)
            if path not in loaded and around in loaded and not self.is_own(self.modules[around]):
                if self._is_new(path):
                    yield path

    # ------------------------------------------------------------------------------------------------------ what it is
    def is_own(self, model: nn.Module) -> bool:
        """Whether a model's class is a user's, not one of transformers."""
        return not type(model).__module__.startswith("transformers.")

    def is_norm_or_embedding(self, path: str) -> bool:
        """Whether all that holds values in a module are norms or embeddings, or the module is called an embedding."""
        holders = [self.modules[p] for p in self.modules.below(path) if self.modules[p]._parameters]
        name = type(self.modules[path]).__name__
        return bool(re.search("Embeddings?$", name)) or all(
            isinstance(module, nn.Embedding) or "Norm" in type(module).__name__ for module in holders
        )

    def _is_head(self, path: str, own: bool) -> bool:
        inner = [self.modules[p] for p in self.modules.below(path)]
        name = path.rpartition(".")[2]
        return (
            bool(self.modules.parameters(path))
            and not self.is_norm_or_embedding(path)
            and not any(_is_model(module) or id(module) in self.of_language for module in inner)
            and not self.modules.holds(path, self.attentions)
            and not re.match("text_|lm_head$", name)
            and not type(self.modules[path]).__name__.endswith("Loss")
            and not (own and self._is_tower(inner))
        )

    def _is_tower(self, inner: list[nn.Module]) -> bool:
        """Whether a part of a user's model is one more encoder: with several attentions, or a network of its own."""
        attentions = sum(bool(re.search("Attention$|Attn$", type(module).__name__)) for module in inner)
        return attentions > 1 or type(inner[0]).__module__.startswith("torchvision.models")

    def _timm_heads(self, path: str) -> Iterator[str]:
        model: Any = self.modules[path]
        classifiers = model.default_cfg["classifier"]
        for name in [classifiers] if isinstance(classifiers, str) else classifiers:
            if join(path, name) in self.modules and self.modules.parameters(join(path, name)):
                yield join(path, name)

    def _holds_model(self, path: str) -> bool:
        return any(_is_model(self.modules[p]) for p in self.modules.below(path))

    # --------------------------------------------------------------------------------------------------- where it lies
    def _backbone_of(self, attention: str) -> str:
        """Path of the innermost model around an attention; in a task model of one piece, of the list of its blocks."""
        path = self._model_around(attention)
        if path == "" and (_has_task(self.root) or not _is_model(self.root)):
            return attention.partition(".")[0]
        return path

    def _model_around(self, path: str) -> str:
        """Path of the innermost model that a module is a part of; of the whole where there is none."""
        path = _parent(path)
        while path and not _is_model(self.modules[path]):
            path = _parent(path)
        return path

    def _lies_in_a_backbone(self, path: str) -> bool:
        return any(lies_in(path, backbone) for backbone in self.backbones)

    def _is_new(self, path: str) -> bool:
        values = self.modules.parameters(path)
        return (
            bool(values)
            and all(value.is_floating_point() for value in values)
            and not self._lies_in_a_backbone(path)
            and not self.modules.holds(path, self.attentions)
            and not self.is_norm_or_embedding(path)
            and not any(
                _is_model(self.modules[p]) or id(self.modules[p]) in self.of_language for p in self.modules.below(path)
            )
        )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
