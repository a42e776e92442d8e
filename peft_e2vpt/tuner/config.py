# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a user chooses: `E2VPTConfig`."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import reprlib
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from torch import nn

from .._compat import METHOD, Origin, peft_type, ways_to_match
from .heads import classes_shown


FORMAT_VERSION = 1  # of adapter_config.json and adapter_model.safetensors; counts up when older readers would go wrong

VisualPromptMode = Literal["deep", "shallow"]
KVPromptPosition = Literal["before", "after"]
Initialisation = Literal["xavier_uniform", "kaiming_uniform", "trunc_normal"]
TokenGate = Literal["attention", "embedding"]
GateScope = Literal["layer", "model"]
SegmentLayout = Literal["contiguous", "strided"]
PrunedPrompts = Literal["remove", "zero"]
CHOICES: dict[str, tuple[str, ...]] = {
    "visual_prompt_mode": get_args(VisualPromptMode),
    "kv_prompt_position": get_args(KVPromptPosition),
    "visual_prompt_init": get_args(Initialisation),
    "kv_prompt_init": get_args(Initialisation),
    "token_gate": get_args(TokenGate),
    "gate_scope": get_args(GateScope),
    "segment_layout": get_args(SegmentLayout),
    "pruned_prompts": get_args(PrunedPrompts),
}
SWITCHES = ("share_kv_prompts", "share_kv_prompts_across_layers", "init_weights", "inference_mode")
MANY_PROMPTS, MOST_PROMPTS = 1_000, 100_000  # the paper has up to 100; every prompt costs every attention a row
MOST_WAYS = 2e8  # in which a regular expression may match a name: four wildcards, none inside another
LFS_POINTER = b"version https://git-lfs"
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 200
shown = _shown.repr  # of what a file holds, which may be long


def plain(value: Any) -> Any:
    """A number of NumPy, or a tensor without dimensions, as Python's own; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def damaged(path: str | Path) -> str:
    """What is wrong with a file that cannot be read."""
    with Path(path).open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull where it was cloned."
    return f"{path} is damaged or incomplete: copy it again, or download it with force_download=True."


def read_settings(path: str | Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`.

    Raises:
        ValueError: it is damaged, or not the configuration of an adapter.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON, or of its encoding
        raise ValueError(damaged(path)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not the configuration of an adapter: it holds {shown(content)}, no object.")
    method = content.get("peft_type")
    if method is not None and not (isinstance(method, str) and method in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(
            f"{path} has peft_type={shown(method)}, which PEFT does not know: pip install -U peft, or import the "
            "package that brings this method."
        )
    return content


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_finite(value: Any) -> bool:
    """Whether no number in what a JSON file can hold is infinite or NaN."""
    ahead = [value]
    for part in ahead:  # grows on the way: a file may be nested deeper than functions may call each other
        if isinstance(part, (dict, list, tuple)):
            ahead.extend(part.values() if isinstance(part, dict) else part)
        elif isinstance(part, float) and not math.isfinite(part):
            return False
    return True


class Companion(Protocol):
    """What accompanies an adapter on disk besides PEFT's own files, given by the package above the tuner."""

    def bind(self, config: E2VPTConfig, model: nn.Module) -> None:
        """Called when an adapter is put on a model: notes where that comes from, warns where the two do not fit."""

    def tensors(self, origin: Origin) -> Path:
        """The file with the tensors of an adapter, which can be read."""

    def settings(self, config: E2VPTConfig, model: nn.Module) -> dict[str, Any]:
        """Fields of `adapter_config.json` that the model decides when its adapter is saved."""

    def write(self, config: E2VPTConfig, model: nn.Module, adapter_name: str, folder: str) -> None:
        """Writes further files beside the adapter that is being saved in a folder."""


@dataclass
class E2VPTConfig(PeftConfig):
    """Configuration of E2VPT, "E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning" (Han et al.,
    ICCV 2023, arXiv 2307.13770).

    Notation: an attention works on tokens of width D with H key/value heads of size d; M and n are the numbers of
    visual and of key-value prompts.

    Args:
        num_visual_prompts (`int`, *optional*, defaults to 10):
            M, the visual prompts of every adapted layer, a tensor (M, D) each (paper section 3.2). 0 for none.
        num_kv_prompts (`int`, *optional*, defaults to 5):
            n, the key-value prompts of every adapted self-attention, a tensor (1 or 2, H, n, d) each (section 3.2,
            equation 5). 0 for none. At least one of the two counts is positive.
        visual_prompt_mode (`str`, *optional*, defaults to `"deep"`):
            `"deep"`: every layer has visual prompts of its own. `"shallow"`: one set enters the token sequence after
            the class and register tokens of the first layer and leaves it after the last (VPT-Shallow, the
            baseline); for plain backbones of one width only.
        share_kv_prompts (`bool`, *optional*, defaults to `True`):
            Whether the prompts of keys and values are one tensor (section 3.2, "shared").
        share_kv_prompts_across_layers (`bool`, *optional*, defaults to `False`):
            Whether all layers use the key-value prompts of the first. Needs equal heads in all layers.
        kv_prompt_position (`str`, *optional*, defaults to `"before"`):
            Whether key-value prompts come `"before"` or `"after"` the keys and values. The same function; the
            columns of `output_attentions` differ.
        visual_prompt_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on the visual prompts while training, drawn anew for every sample.
        visual_prompt_init (`str`, *optional*, defaults to `"xavier_uniform"`):
            `"xavier_uniform"`: U(-v, v) with v = sqrt(6 / (3 p^2 + D)), p the patch size (as VPT).
            `"kaiming_uniform"`: U(-v, v) with v = sqrt(6 / D). `"trunc_normal"`: standard deviation 0.02, cut at 2
            standard deviations.
        kv_prompt_init (`str`, *optional*, defaults to `"kaiming_uniform"`):
            The same three names; `"kaiming_uniform"` has v = sqrt(6 / (n d)), `"xavier_uniform"` the v of the
            visual prompts.
        seed (`int`, *optional*):
            Seed of the initial prompts. `None` draws from torch's global generator.
        num_segments (`int`, *optional*, defaults to 8):
            R, the parts of a visual prompt that segment-wise pruning keeps or removes (section 3.3, equation 8).
            Every adapted width D must be divisible by R.
        segment_layout (`str`, *optional*, defaults to `"contiguous"`):
            `"contiguous"`: segment r is dimensions r D/R to (r + 1) D/R (paper). `"strided"`: dimension j belongs to
            segment j mod R (released code).
        token_gate (`str`, *optional*):
            What the gate of a visual prompt multiplies when importance is measured. `"attention"`: the prompt's
            attention weight, so that 0 is exactly removal. `"embedding"`: the prompt before the layer's norm,
            which follows the paper literally (equation 6). Defaults to `"attention"`, in shallow mode to
            `"embedding"`, the only one possible there.
        gate_scope (`str`, *optional*, defaults to `"layer"`):
            Whether prompts are ranked in each `"layer"` (paper) or one set of gates serves the whole `"model"`
            (released code).
        pruned_prompts (`str`, *optional*, defaults to `"remove"`):
            `"remove"`: a pruned prompt takes no part in the attention. `"zero"`: it stays as a zero vector that
            goes through the norm (released code).
        target_modules (`list[str]` or `str`, *optional*):
            Names of the self-attention modules to adapt: names or ends of names, or one regular expression that has
            to match the whole name. `None` finds them.
        exclude_modules (`list[str]` or `str`, *optional*):
            Self-attentions to leave out, given in the same way.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Which of the found self-attentions to adapt, counted from 0 in the order of the layers.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained in full and saved with the adapter, by their paths, or endings of paths that
            belong to one module. `None` finds the head of the model; `[]` trains none. The config of the adapted
            model says what was found, by full paths; the one that you pass stays as it is.
        init_weights (`bool`, *optional*, defaults to `True`):
            Other methods of PEFT start as a no-op, and `False` asks them for random values instead. Prompts are never
            a no-op: they start from the initialisations above with either.
        labels (`list[str]`, *optional*):
            Names of the classes in the order of the logits. Written when the adapter is saved, from the `id2label` of
            its model; `peft_e2vpt.load` builds the head from it.
        base_model_settings (`dict`, *optional*):
            What sets the base model apart from its checkpoint, as in its config: `problem_type`, `image_size`, `dtype`
            and the like. Written when the adapter is saved; `peft_e2vpt.load` builds the base model with it.
        format_version (`int`, *optional*, defaults to 1):
            Version of the files of a saved adapter. Files of a newer version than this package knows are refused.

    Raises:
        ValueError: a choice is impossible; the message names the field, the value found and what to pass.

    Example:

        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForImageClassification
        >>> from peft_e2vpt import E2VPTConfig

        >>> model = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)
        >>> model = get_peft_model(model, E2VPTConfig(num_visual_prompts=10, num_kv_prompts=5))
        >>> model.print_prompt_summary()
    """

    companion: ClassVar[Companion | None] = None  # set where the whole package is imported

    num_visual_prompts: int = field(default=10, metadata={"help": "Visual prompts of every adapted layer (M)."})
    num_kv_prompts: int = field(default=5, metadata={"help": "Key-value prompts of every self-attention (n)."})
    visual_prompt_mode: VisualPromptMode = field(
        default="deep", metadata={"help": "'deep' or 'shallow' (VPT-Shallow)."}
    )
    share_kv_prompts: bool = field(default=True, metadata={"help": "One tensor for keys and values."})
    share_kv_prompts_across_layers: bool = field(
        default=False, metadata={"help": "All layers use the key-value prompts of the first."}
    )
    kv_prompt_position: KVPromptPosition = field(
        default="before", metadata={"help": "'before' or 'after' keys and values."}
    )
    visual_prompt_dropout: float = field(default=0.1, metadata={"help": "Per-sample dropout of visual prompts."})
    visual_prompt_init: Initialisation = field(
        default="xavier_uniform", metadata={"help": f"Initial visual prompts: one of {get_args(Initialisation)}."}
    )
    kv_prompt_init: Initialisation = field(
        default="kaiming_uniform", metadata={"help": f"Initial key-value prompts: one of {get_args(Initialisation)}."}
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of the initial prompts."})
    num_segments: int = field(default=8, metadata={"help": "Segments of every visual prompt (R)."})
    segment_layout: SegmentLayout = field(
        default="contiguous", metadata={"help": "'contiguous' (paper) or 'strided'."}
    )
    token_gate: TokenGate | None = field(
        default=None, metadata={"help": "What a prompt's gate multiplies: 'attention' weight or 'embedding'."}
    )
    gate_scope: GateScope = field(default="layer", metadata={"help": "Gates per 'layer' or one set for the 'model'."})
    pruned_prompts: PrunedPrompts = field(
        default="remove", metadata={"help": "'remove' pruned prompts or set them to 'zero'."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Self-attentions to adapt; None finds them."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Self-attentions to leave as they are."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the self-attentions to adapt."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved; None finds the head."}
    )
    init_weights: bool = field(default=True, metadata={"help": "No effect: prompts are drawn with either."})
    labels: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes; written when the adapter is saved."}
    )
    base_model_settings: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the base model differs from its checkpoint; written when saved."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved files."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self._adapter: tuple[weakref.ref[nn.Module], str] | None = None  # no field, so not in adapter_config.json
        self.base_model_given = self.base_model_name_or_path  # PEFT writes the name of the model over it
        self.waits_for_values = False  # it was read from a file, and the adapter's values were not yet
        self.check()
        most = max(self.num_visual_prompts, self.num_kv_prompts)
        if most >= MANY_PROMPTS:
            warnings.warn(
                f"num_visual_prompts={self.num_visual_prompts} and num_kv_prompts={self.num_kv_prompts}: every prompt "
                "is one more key in every attention, and the paper has 10 to 100. Is it meant to be so many?",
                stacklevel=3,
            )

    def check(self) -> None:
        """Checks every field, and turns numbers of NumPy and torch into Python's own.

        Raises:
            ValueError: a field is impossible; the message names it, the value found and what is allowed.
        """
        for known in fields(self):
            setattr(self, known.name, plain(getattr(self, known.name)))
        self._check_format()
        self._check_counts()
        if self.token_gate is None:
            self.token_gate = "embedding" if self.visual_prompt_mode == "shallow" else "attention"
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not (isinstance(value, str) and value in choices):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}.")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {shown(getattr(self, name))}.")
        dropout: Any = self.visual_prompt_dropout
        if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise ValueError(f"visual_prompt_dropout must be a number in [0, 1), got {shown(dropout)}.")
        self._check_names()
        if self.visual_prompt_mode == "shallow":
            self._check_shallow()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> E2VPTConfig:
        """Reads `adapter_config.json`; the arguments are PEFT's.

        Raises:
            ValueError: there is none, it is damaged, or one of its fields is impossible.
            TypeError: it is not the configuration of an adapter.
        """
        try:
            config: E2VPTConfig = super().from_pretrained(*args, **kwargs)
        except (ValueError, TypeError) as error:
            if CONFIG_NAME in str(error):
                raise
            where = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise type(error)(f"{where}/{CONFIG_NAME}: {error}") from error
        config.waits_for_values = True
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads the file that `from_pretrained` has found.

        Raises:
            ValueError: it is damaged, or the configuration of something else.
            TypeError: it is not the configuration of an adapter.
        """
        if "peft_type" not in read_settings(path_json_file):
            raise TypeError(
                f"{path_json_file} is not the configuration of an adapter: it is missing required keys: peft_type."
            )
        content: dict[str, Any] = super().from_json_file(path_json_file, **kwargs)
        return content

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Drops, with a warning, what `adapter_config.json` says and this version does not know.

        PEFT calls it also for files of other methods, or of none, and then has the last word.

        Raises:
            ValueError: the file is of a newer format, so that leaving something out would go wrong.
        """
        if kwargs.get("peft_type") != METHOD:
            return kwargs
        unknown = kwargs.keys() - {known.name for known in fields(cls)}
        if kwargs.get("format_version", FORMAT_VERSION) == FORMAT_VERSION and unknown:
            warnings.warn(
                f"adapter_config.json has settings that this version of peft_e2vpt does not know and leaves out: "
                f"{', '.join(sorted(unknown))}. If they matter to you: pip install -U peft_e2vpt.",
                stacklevel=2,
            )
        return {name: value for name, value in kwargs.items() if name not in unknown}

    def belongs_to(self, model: nn.Module, adapter_name: str) -> None:
        """Notes, without keeping it alive, whose adapter is about to be saved."""
        self._adapter = weakref.ref(model), adapter_name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_adapter": None}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json` with what the adapted model decides, such as the names of its classes.

        Where a PeftModel saves the config with its adapter, the model card is written too.

        Args:
            save_directory: a folder, made where there is none.
            kwargs: what PEFT adds.
        """
        reference, adapter_name = self._adapter or (None, "")
        model = None if reference is None else reference()
        if model is None or self.companion is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        complete = copy.copy(self)
        with classes_shown(model, adapter_name):
            for name, value in self.companion.settings(self, model).items():
                setattr(complete, name, value)
            if "auto_mapping_dict" in kwargs:  # PEFT's own, which is None where there is a task type
                kwargs["auto_mapping_dict"] = complete.auto_mapping
            super(E2VPTConfig, complete).save_pretrained(save_directory, **kwargs)
            if "auto_mapping_dict" in kwargs:  # PeftModel has just saved the adapter here
                self.companion.write(complete, model, adapter_name, save_directory)

    def _check_format(self) -> None:
        if not _is_whole(self.format_version, 1):
            raise ValueError(f"format_version must be a whole number of at least 1, got {shown(self.format_version)}.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format_version={self.format_version}, and this version of peft_e2vpt reads up to "
                f"{FORMAT_VERSION}: pip install -U peft_e2vpt."
            )
        labels: Any = self.labels
        if isinstance(labels, tuple):
            self.labels = labels = list(labels)
        if labels is not None and not _is_names(labels):
            raise ValueError(f"labels must be None or a list of names, got {shown(labels)}.")
        settings: Any = self.base_model_settings
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"base_model_settings must be None or a dictionary, got {shown(settings)}.")
        if not _is_finite(settings):
            raise ValueError(f"base_model_settings must hold finite numbers only, got {shown(settings)}.")
        mapping: Any = self.auto_mapping
        if mapping is not None and not (
            isinstance(mapping, dict) and all(isinstance(value, str) for value in mapping.values())
        ):
            raise ValueError(f"auto_mapping must be None or a dictionary of names, got {shown(mapping)}.")
        base: Any = self.base_model_name_or_path
        if base is not None and not isinstance(base, (str, os.PathLike)):
            raise ValueError(f"base_model_name_or_path must be None or a string, got {shown(base)}.")
        version: Any = self.peft_version
        if not isinstance(version, str):
            raise ValueError(f"peft_version must be None or a string, got {shown(version)}.")
        revision: Any = self.revision
        if revision is not None and not (isinstance(revision, str) and _is_git_name(revision)):
            raise ValueError(f"revision must be None or a branch, tag or commit, got {shown(revision)}.")

    def _check_counts(self) -> None:
        for name, least in (("num_visual_prompts", 0), ("num_kv_prompts", 0), ("num_segments", 1)):
            value = getattr(self, name)
            if not _is_whole(value, least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}.")
            if value > MOST_PROMPTS:
                raise ValueError(f"{name} must be at most {MOST_PROMPTS}, got {shown(value)}.")
        if self.num_visual_prompts == 0 and self.num_kv_prompts == 0:
            raise ValueError(
                "num_visual_prompts and num_kv_prompts are both 0, so there is nothing to tune; set one of them."
            )
        if self.seed is not None and not (_is_whole(self.seed, 0) and self.seed < 2**63):
            raise ValueError(
                f"seed must be None or a whole number of at least 0, below 2**63, got {shown(self.seed)}."
            )

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                value = sorted(value, key=str)
                setattr(self, name, value)
            if name == "modules_to_save" and isinstance(value, str):
                raise ValueError(
                    f"modules_to_save must be a list of names, got the string {shown(value)}: pass [{shown(value)}]."
                )
            if isinstance(value, str):
                _check_expression(name, value)
            elif value is not None and not _is_names(value):
                raise ValueError(f"{name} must be None or a list of names, got {shown(value)}.")
        if self.target_modules == "all-linear":
            raise ValueError(
                "target_modules='all-linear' names linear layers, but E2VPT adapts whole self-attentions: leave "
                "target_modules at None to find them, or name the attention modules."
            )
        layers: Any = self.layers_to_transform
        if layers is not None:
            if not isinstance(layers, Iterable) or isinstance(layers, dict):
                layers = [layers]
            layers = [plain(layer) for layer in layers]
            if not layers or not all(_is_whole(layer, 0) for layer in layers):
                raise ValueError(
                    f"layers_to_transform must hold layer numbers from 0 on, got {shown(layers)}; None adapts all "
                    "layers."
                )
            self.layers_to_transform = layers

    def _check_shallow(self) -> None:
        if self.num_visual_prompts == 0:
            raise ValueError("visual_prompt_mode='shallow' needs num_visual_prompts of at least 1, got 0.")
        if self.token_gate == "attention":
            raise ValueError(
                "token_gate='attention' is not possible with visual_prompt_mode='shallow', where prompts are tokens "
                "of the sequence in every layer: pass token_gate='embedding' or leave it at None."
            )
        if self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} is not possible with visual_prompt_mode='shallow', "
                "whose prompts enter before the first layer and leave after the last: leave it at None."
            )


def _is_git_name(name: str) -> bool:
    """Whether Git allows a name for a branch or tag, as far as it matters where the name becomes part of a path."""
    return bool(name) and ".." not in name and not name.startswith(("/", "~")) and not re.search(r"[\\\s\0:]", name)


def _check_expression(name: str, value: str) -> None:
    """Checks a regular expression, which may come from a file.

    Raises:
        ValueError: it is none, or trying it may take forever.
    """
    try:
        re.compile(value)
        ways = ways_to_match(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}={shown(value)} is not a regular expression: {error}.") from error
    if ways > MOST_WAYS:
        raise ValueError(
            f"{name}={shown(value)} can match a name in so many ways that trying them may never end: use at most four "
            "of * and +, none around another, or pass a list of names."
        )
