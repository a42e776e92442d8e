# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The protocol of the paper's experiments, which `vtab1k.py` and `fgvc.py` share.

For every backbone, method and task:

1. `grid`: every learning rate with every weight decay, trained on the training images. The point with the best
   accuracy on the validation images is chosen, after the last epoch; of equal ones that with the smaller rate.
2. `prune` (E2VPT): training on the training images at the chosen point; prompts and segments are scored there, and
   what to prune is searched on the validation images.
3. `final`, for every seed: training and validation images together, from the initial values, with what was pruned
   left out (rewinding). The accuracy on the test images after the last epoch is the result; no epoch is chosen.

Every training is one line of `OUTPUT_DIR/results.jsonl`. A run that is started again does only what is missing.
"""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml
from finetune import ModelArguments, accuracy, collate, load_base_model, load_processor, prepare_model
from json_lines import append_line, read_lines
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.utils import logging


# datasets, peft and peft_e2vpt are imported where they are used: `--help` should not wait for them.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor

    from peft_e2vpt import Gates


CACHE = Path("~/.cache/peft_e2vpt").expanduser()
Transform = Callable[[dict[str, list]], dict[str, list]]


class Splits(NamedTuple):
    """The images of a task: datasets with the columns `image` and `label`, which knows the names of the classes."""

    train: Dataset
    validation: Dataset
    test: Dataset


class Benchmark(NamedTuple):
    """
    What `vtab1k.py` and `fgvc.py` differ in.

    Attributes:
        name (`str`): Of the benchmark; its settings are in `presets/NAME.yaml`.
        read_splits: Reads a task, given the settings of the data, the settings of the task with its name, and the
            arguments.
        transforms: Makes of an image processor what reads images for training, and what reads them otherwise.
        make_data: Writes random images for tasks to a folder, in the layout of the Hub.
        smoke_tasks (`list[str]`): The tasks that a smoke run has.
    """

    name: str
    read_splits: Callable[[dict[str, Any], dict[str, Any], ProtocolArguments], Splits]
    transforms: Callable[[BaseImageProcessor], tuple[Transform, Transform]]
    make_data: Callable[[Path, dict[str, Any]], None]
    smoke_tasks: list[str]


@dataclass
class ProtocolArguments:
    """What is run. The settings themselves are in a YAML file."""

    backbone: list[str] | None = field(
        default=None, metadata={"help": "Backbones of the presets, or `all`. Default: vit (in a smoke run: all)."}
    )
    method: list[str] = field(
        default_factory=lambda: ["e2vpt"], metadata={"help": "Methods of the presets, or `all`."}
    )
    task: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "Tasks. Default: all."})
    seeds: list[int] | None = field(default=None, metadata={"help": "Of the final trainings. Default: the presets'."})
    data_root: str | None = field(
        default=None,
        metadata={"help": "Folder with the files of the Hub's dataset, packed or unpacked. Default: downloads them."},
    )
    presets: str | None = field(default=None, metadata={"help": "Settings. Default: examples/presets/NAME.yaml."})
    normalization: str = field(
        default="imagenet",
        metadata={
            "help": "Mean and deviation of pixels: `imagenet` (as VPT) or those of the backbone's `processor`.",
            "choices": ["imagenet", "processor"],
        },
    )
    smoke: bool = field(
        default=False,
        metadata={"help": "Tiny random backbones and images, four trainings a task: tries the program."},
    )


@dataclass
class PaperTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose learning rate, weight decay, epochs, batch size and seed the protocol sets."""

    output_dir: str | None = field(default=None, metadata={"help": "The results. Default: runs/NAME."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clips gradients. Default: as VPT, not at all."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Batch size per device in evaluation."})
    logging_strategy: str = field(default="no", metadata={"help": "When the loss is logged."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints; a training is not resumed half-way."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays off: images are read late."})


# --------------------------------------------------------------------------------------------------------- the results


class Results:
    """
    Finished trainings, in memory in every process, and as JSON lines that the first process writes.

    Args:
        path (`Path`): The file; read if it exists.
        writes (`bool`): Whether this is the first process.
    """

    KEYS = ("backbone", "method", "task", "phase", "learning_rate", "weight_decay", "seed")

    def __init__(self, path: Path, writes: bool) -> None:
        from accelerate.utils import broadcast_object_list

        self.path, self.writes = path, writes
        (self.records,) = broadcast_object_list([read_lines(path) if writes else None])

    def find(self, key: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
        """
        Returns the finished training with this key, or `None`.

        Raises:
            ValueError: It was made with other settings.
        """
        for record in self.records:
            if all(record[name] == key[name] for name in self.KEYS):
                if record["settings"] != settings:
                    raise ValueError(
                        f"{self.path} has {key} with the settings {record['settings']}, now they are {settings}: "
                        "choose another --output_dir."
                    )
                return record
        return None

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.writes:
            append_line(self.path, record)


# ------------------------------------------------------------------------------------------------------- the trainings


class Experiment:
    """
    One method on one task with one backbone: the three phases.

    Args:
        benchmark (`Benchmark`): Of the task.
        presets (`dict`): Its settings.
        names (`tuple[str, str, str]`): Backbone, method and task.
        model (`str`): The backbone on the Hub or in a folder.
        splits (`Splits`): The images.
        args (`ProtocolArguments`), training_args (`PaperTrainingArguments`): The arguments of the program.
        results (`Results`): Finished trainings; new ones are added.

    Raises:
        ValueError: The images of one step cannot be shared equally among the processes.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        presets: dict[str, Any],
        names: tuple[str, str, str],
        model: str,
        splits: Splits,
        args: ProtocolArguments,
        training_args: PaperTrainingArguments,
        results: Results,
    ) -> None:
        from datasets import concatenate_datasets
        from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        logging.set_verbosity_warning()
        self.names, self.model, self.results, self.training_args = names, model, results, training_args
        backbone, method, task = names
        self.training, self.grid = presets["training"], presets["methods"][method]
        self.batch_size = presets["backbones"][backbone]["batch_size"]
        self.seeds = args.seeds or self.training["seeds"]
        num_visual_prompts, num_kv_prompts = presets["tasks"][task][backbone]
        self.prompts = ModelArguments(
            num_visual_prompts=num_visual_prompts,
            num_kv_prompts=num_kv_prompts,
            visual_prompt_dropout=self.training["visual_prompt_dropout"],
        )
        self.settings = {
            "epochs": self.training["epochs"],
            "batch_size": self.batch_size,
            "image_size": self.training["image_size"],
            "normalization": args.normalization,
        }
        if method in ("e2vpt", "vpt-deep"):
            self.settings["num_visual_prompts"] = num_visual_prompts
        if method == "e2vpt":
            self.settings["num_kv_prompts"] = num_kv_prompts
        shares = training_args.world_size * training_args.gradient_accumulation_steps
        if self.batch_size % shares:
            raise ValueError(
                f"{backbone} has {self.batch_size} images a step, which {shares} processes times accumulated "
                "batches cannot share equally: change one of them."
            )
        self.device_batch_size = self.batch_size // shares

        self.processor = load_processor(model, self.training["image_size"])
        if args.normalization == "imagenet":
            self.processor.image_mean, self.processor.image_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        for_training, for_evaluation = benchmark.transforms(self.processor)
        self.labels = splits.train.features["label"].names
        both = concatenate_datasets([splits.train, splits.validation])
        self.train, self.train_and_validation = (data.with_transform(for_training) for data in (splits.train, both))
        self.scored, self.validation, self.test = (data.with_transform(for_evaluation) for data in splits)

    def run(self) -> None:
        """Runs what is missing of all three phases."""
        points = [(rate, decay) for rate in self.grid["learning_rates"] for decay in self.grid["weight_decays"]]
        tried = [self.training_of("grid", *point, self.seeds[0]) for point in points]
        best = max(tried, key=lambda record: (record["accuracy"], -record["learning_rate"], -record["weight_decay"]))
        chosen = best["learning_rate"], best["weight_decay"]
        pruning = self.training_of("prune", *chosen, self.seeds[0]) if self.names[1] == "e2vpt" else None
        for seed in self.seeds:
            self.training_of("final", *chosen, seed, pruning)

    def training_of(
        self, phase: str, learning_rate: float, weight_decay: float, seed: int, pruning: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the result of a training: a finished one, or one that runs now."""
        values = (*self.names, phase, learning_rate, weight_decay, seed)
        key = dict(zip(Results.KEYS, values, strict=True))
        finished = self.results.find(key, self.settings)
        if finished is not None:
            return finished
        started = time.perf_counter()
        found = self.train_and_evaluate(phase, learning_rate, weight_decay, seed, pruning)
        record = {**key, **found, "seconds": round(time.perf_counter() - started, 2), "settings": self.settings}
        self.results.add(record)
        if self.results.writes:
            print(f"{' '.join(map(str, values))}: {100 * record['accuracy']:.2f}", flush=True)
        return record

    def train_and_evaluate(
        self, phase: str, learning_rate: float, weight_decay: float, seed: int, pruning: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Trains from the initial values of a seed, and evaluates once, after the last epoch."""
        from transformers import set_seed

        from peft_e2vpt import Gates, apply_gates
        from peft_e2vpt.tuner.summary import count_parameters

        set_seed(seed)  # the same head and the same prompts in every phase
        base_model = load_base_model(self.model, self.labels)
        logging.set_verbosity_error()  # transformers' report on what was loaded is seen once
        model = prepare_model(self.names[1], base_model, self.prompts)
        if pruning is not None:
            apply_gates(model, Gates(*(torch.tensor(pruning[name]) for name in ("token_gates", "segment_gates"))))
        trainer = Trainer(
            model,
            self.trainer_args(learning_rate, weight_decay, seed),
            train_dataset=self.train_and_validation if phase == "final" else self.train,
            eval_dataset=self.test if phase == "final" else self.validation,
            data_collator=collate,
            compute_metrics=accuracy,
        )
        trainer.train()
        record: dict[str, Any] = {"accuracy": trainer.evaluate()["eval_accuracy"]}
        if phase == "prune":
            record |= self.prune(trainer, seed)
        trained, num_all = count_parameters(model)
        percent = round(100 * trained / num_all, 4)
        return record | {"trained": trained, "percent": percent, "processes": trainer.args.world_size}

    def trainer_args(self, learning_rate: float, weight_decay: float, seed: int) -> PaperTrainingArguments:
        args = copy.copy(self.training_args)
        args.learning_rate = learning_rate * self.batch_size / 256
        args.weight_decay = weight_decay
        args.per_device_train_batch_size = self.device_batch_size
        args.num_train_epochs = self.training["epochs"]
        args.warmup_steps = self.training["warmup"]
        args.seed = seed
        args.optim = {"sgd": "sgd", "adamw": "adamw_torch"}[self.grid["optimizer"]]
        args.optim_args = "momentum=0.9" if self.grid["optimizer"] == "sgd" else None
        return args

    def prune(self, trainer: Trainer, seed: int) -> dict[str, Any]:
        """Scores prompts on the training images, and searches on the validation images what to prune."""
        from peft_e2vpt import apply_gates, score_prompts, search_pruning

        scores = score_prompts(trainer.model, self.share(self.scored, self.device_batch_size), seed=seed)
        evaluated = self.share(self.validation, self.training_args.per_device_eval_batch_size)
        search = search_pruning(
            trainer.model, scores, evaluated, max_rows=self.training_args.per_device_eval_batch_size
        )
        apply_gates(trainer.model, search.gates)  # so that what is left is counted
        chosen = search.candidates[search.chosen]
        gates: Gates = search.gates
        return {
            "token_ratio": chosen.token_ratio,
            "segment_ratio": chosen.segment_ratio,
            "accuracy_pruned": chosen.quality,
            "token_gates": gates.token.int().tolist(),
            "segment_gates": gates.segment.int().tolist(),
        }

    def share(self, dataset: Dataset, batch_size: int) -> torch.utils.data.DataLoader:
        """Batches of this process's share, in which every image counts once."""
        args = self.training_args
        indices = range(args.process_index, len(dataset), args.world_size)
        return torch.utils.data.DataLoader(
            torch.utils.data.Subset(dataset, indices),
            batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
        )


# -------------------------------------------------------------------------------------------------- backbones and data


def backbone_folder(name: str, preset: dict[str, Any], cache: Path) -> str:
    """Returns what `from_pretrained` loads: the model of the preset, or a folder it is converted to, once."""
    from checkpoints import CONVERTERS

    if "converter" not in preset:
        return preset["model"]
    folder = cache / name
    if not (folder / "config.json").is_file():
        source = preset["model"]
        if source.startswith("https://"):
            source = str(cache / source.rsplit("/", 1)[1])
            if not Path(source).exists():
                cache.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(preset["model"], source)
        settings = {"num_heads": preset["num_heads"]} if "num_heads" in preset else {}
        written_whole(folder, lambda unfinished: CONVERTERS[preset["converter"]](source, unfinished, **settings))
    return str(folder)


def written_whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a folder beside `folder` and renames it: a half-written one never carries the final name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        inside = Path(unfinished) / "whole"
        inside.mkdir()
        write(inside)
        inside.rename(folder)


def unpacked(repo: str, archive: str, folder: str, args: ProtocolArguments) -> Path:
    """
    Finds a folder of an archive: unpacked already, or packed in `--data_root`, or packed on the Hub.

    Args:
        repo (`str`): The dataset on the Hub.
        archive (`str`): The name of the file in it.
        folder (`str`): What the archive holds, the path that is looked for.
        args (`ProtocolArguments`): `data_root`.

    Returns:
        `Path`: The folder that contains `folder`.

    Raises:
        FileNotFoundError: Neither is there, or the archive holds something else.
    """
    place = CACHE / repo.rsplit("/", 1)[1] if args.data_root is None else Path(args.data_root)
    if folder != "." and (place / folder).is_dir():
        return place
    target = place / f"unpacked-{archive.split('.')[0]}"
    if not target.is_dir():
        if args.data_root is None:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(repo, archive, repo_type="dataset"))
        else:
            file = place / archive
        if not file.is_file():
            raise FileNotFoundError(f"--data_root {place} has neither the folder {folder} nor the archive {archive}.")
        safely = {} if archive.endswith(".zip") else {"filter": "data"}
        written_whole(target, lambda unfinished: shutil.unpack_archive(file, unfinished, **safely))
    if not (target / folder).is_dir():
        raise FileNotFoundError(f"{archive} has no folder {folder}, only {sorted(p.name for p in target.iterdir())}.")
    return target


def make_splits(lists: dict[str, dict[str, Any]]) -> Splits:
    """
    Makes datasets of lists of images.

    Args:
        lists (`dict[str, dict[str, Any]]`): For `train`, `validation` and `test`: the path of every image, and its
            class, a number or a name.

    Raises:
        FileNotFoundError: The first image of a list is not there.
        ValueError: A list is empty.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    classes = sorted({label for entries in lists.values() for label in entries.values()})
    numbers = {label: number for number, label in enumerate(classes)}
    features = Features(image=Image(), label=ClassLabel(names=[str(label) for label in classes]))
    splits = {}
    for name, entries in lists.items():
        if not entries:
            raise ValueError(f"The list of images for {name} is empty.")
        if not Path(next(iter(entries))).is_file():
            raise FileNotFoundError(f"The list of images for {name} begins with {next(iter(entries))}: not there.")
        columns = {"image": list(entries), "label": [numbers[label] for label in entries.values()]}
        splits[name] = Dataset.from_dict(columns, features=features)
    return Splits(**splits)


# ---------------------------------------------------------------------------------------------------------- the tables


def groups_of(presets: dict[str, Any]) -> dict[str, list[str]]:
    """The tasks of every group; FGVC has one."""
    groups: dict[str, list[str]] = {}
    for task, preset in presets["tasks"].items():
        groups.setdefault(preset.get("group", "FGVC"), []).append(task)
    return groups


def summary(groups: dict[str, list[str]], means: dict[str, float | None]) -> list[float | None]:
    """Means of the groups; of several groups also the mean of these, and the mean of all tasks. `None` if unknown."""
    values = [means.get(group) for group in groups]
    if len(groups) == 1:
        return values
    if None in values:
        return [*values, None, None]
    sizes = [len(tasks) for tasks in groups.values()]
    of_tasks = sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)
    return [*values, mean(values), of_tasks]


def format_tables(records: list[dict[str, Any]], presets: dict[str, Any]) -> str:
    """
    Lays the results out as two tables in Markdown: means beside the published ones, and every task.

    A mean is of all its tasks or is left open; accuracies are in percent, over seeds as mean and standard deviation.
    """
    groups = groups_of(presets)
    final: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        if record["phase"] == "final":
            tasks = final.setdefault((record["backbone"], record["method"]), {})
            tasks.setdefault(record["task"], []).append(record)

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    heads = [f"{group} ({len(tasks)})" for group, tasks in groups.items()]
    if len(groups) > 1:
        heads += ["mean of groups", f"mean of {len(presets['tasks'])}"]
    lines = [
        f"| backbone | method | | {' | '.join(heads)} | tuned % |",
        "|---|---|---|" + "---:|" * (len(heads) + 1),
    ]
    details = ["| backbone | method | task | runs | accuracy | tuned % |", "|---|---|---|---:|---:|---:|"]
    for (backbone, method), tasks in final.items():
        of_task = {task: 100 * mean(run["accuracy"] for run in runs) for task, runs in tasks.items()}
        means = {
            group: mean(of_task[task] for task in members) if of_task.keys() >= set(members) else None
            for group, members in groups.items()
        }
        tuned = mean(run["percent"] for runs in tasks.values() for run in runs)
        row = " | ".join(cell(value) for value in summary(groups, means))
        lines.append(f"| {backbone} | {method} | here | {row} | {tuned:.3f} |")
        published = presets["published"].get(backbone, {}).get(method)
        if published is not None:
            row = " | ".join(cell(value) for value in summary(groups, published))
            lines.append(f"| {backbone} | {method} | published | {row} | |")
        for task in presets["tasks"]:
            runs = tasks.get(task, [])
            if runs:
                values = [100 * run["accuracy"] for run in runs]
                spread = f" ({stdev(values):.2f})" if len(values) > 1 else ""
                percent = mean(run["percent"] for run in runs)
                details.append(
                    f"| {backbone} | {method} | {task} | {len(runs)} | {mean(values):.2f}{spread} | {percent:.3f} |"
                )
    return "\n".join([*lines, "", *details])


# --------------------------------------------------------------------------------------------------------- the program


def chosen_of(kind: str, asked: list[str], known: dict[str, Any]) -> list[str]:
    """Returns what the user asked for, `all` spelt out; a `ValueError` names what is unknown."""
    unknown = set(asked) - {*known, "all"}
    if unknown:
        raise ValueError(f"No {kind} {', '.join(sorted(unknown))}: choose from {', '.join(known)}, or all.")
    return list(known) if "all" in asked else list(dict.fromkeys(asked))


def run(
    benchmark: Benchmark,
    presets: dict[str, Any],
    args: ProtocolArguments,
    training_args: PaperTrainingArguments,
    cache: Path,
) -> str:
    """Runs what is missing and returns the tables. They are also written to `OUTPUT_DIR/tables.md`."""
    if training_args.n_gpu > 1:
        raise ValueError(
            "One process sees several GPUs: start it with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
        )
    output_dir = Path(training_args.output_dir)
    results = Results(output_dir / "results.jsonl", writes=training_args.process_index == 0)
    backbones = chosen_of("backbone", args.backbone or ["vit"], presets["backbones"])
    methods = chosen_of("method", args.method, presets["methods"])
    for task in chosen_of("task", args.task, presets["tasks"]):
        with training_args.main_process_first(desc="downloading and unpacking"):
            splits = benchmark.read_splits(presets["data"], {"name": task, **presets["tasks"][task]}, args)
        for backbone in backbones:
            with training_args.main_process_first(desc="converting"):
                model = backbone_folder(backbone, presets["backbones"][backbone], cache)
            for method in methods:
                names = (backbone, method, task)
                Experiment(benchmark, presets, names, model, splits, args, training_args, results).run()
    tables = format_tables(results.records, presets)
    if results.writes:
        (output_dir / "tables.md").write_text(tables + "\n")
        print(f"\n{tables}", flush=True)
    return tables


def run_smoke(
    benchmark: Benchmark, presets: dict[str, Any], args: ProtocolArguments, training_args: PaperTrainingArguments
) -> None:
    """The same program on stand-ins in a temporary folder: all backbones, a grid of two, two epochs, one seed."""
    from accelerate.utils import broadcast_object_list
    from stand_ins import make_backbones

    import peft_e2vpt  # noqa: F401

    first = training_args.process_index == 0
    (place,) = broadcast_object_list([tempfile.mkdtemp(prefix=f"{benchmark.name}-") if first else None])
    folder = Path(place)
    presets["training"] |= {"image_size": 32, "epochs": 2, "seeds": presets["training"]["seeds"][:1]}
    for method in presets["methods"].values():
        method |= {"learning_rates": method["learning_rates"][-2:], "weight_decays": method["weight_decays"][:1]}
    if first:
        make_backbones(folder / "backbones", presets["backbones"])
        benchmark.make_data(folder / "data", {task: presets["tasks"][task] for task in benchmark.smoke_tasks})
    presets["backbones"] = {
        name: {**preset, "model": str(folder / "backbones" / name), "batch_size": 8, "num_heads": 4}
        for name, preset in presets["backbones"].items()
    }
    args.data_root = str(folder / "data")
    args.backbone = args.backbone or ["all"]
    args.task = benchmark.smoke_tasks
    gc.freeze()  # every training begins with a search for garbage: most of its time, if it looks at all libraries
    try:
        run(benchmark, presets, args, training_args, folder / "converted")
    finally:
        if first:
            shutil.rmtree(folder)


def main(benchmark: Benchmark, description: str) -> None:
    """Reads the command line and runs the benchmark."""
    parser = HfArgumentParser((ProtocolArguments, PaperTrainingArguments), description=description.split("\n")[0])
    args, training_args = parser.parse_args_into_dataclasses()
    if training_args.output_dir is None:
        training_args.output_dir = f"runs/{benchmark.name}" + ("-smoke" if args.smoke else "")
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False
    presets_file = args.presets or Path(__file__).parent / "presets" / f"{benchmark.name}.yaml"
    presets = yaml.safe_load(Path(presets_file).read_text())
    if args.smoke:
        run_smoke(benchmark, presets, args, training_args)
    else:
        run(benchmark, presets, args, training_args, CACHE / "backbones")
    if torch.distributed.is_initialized():
        gc.collect()  # a DDP model that is alive when its process group ends may abort the process
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
