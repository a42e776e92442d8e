# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a replica of `examples/serve.py` does, without a server: adapters that follow a store, and batches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest


pytest.importorskip("serve", reason="needs the extra `serve`")
import adapter_server.classifier  # noqa: E402
from adapter_server.classifier import Classifier, read_image  # noqa: E402
from adapter_server.options import Options, Refusal, log  # noqa: E402
from adapter_server.store import open_store  # noqa: E402

from tests.support.hub_server import HubServer, Repository  # noqa: E402
from tests.support.paths import EXAMPLES, ROOT  # noqa: E402
from tests.support.served import export, picture, put, variant, version_of  # noqa: E402


# --------------------------------------------------------------------------------------------------- what replicas are


@pytest.fixture(scope="module", autouse=True)
def graphs_are_opened_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_server.classifier, "open_graph", cache(adapter_server.classifier.open_graph))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("files"), "torch")


@pytest.fixture
def store(tmp_path, files) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    put(files / "exported" / "a.safetensors", folder, "a")
    return folder


@pytest.fixture
def classifier(files, store, tmp_path):
    return classifier_of(files, store, tmp_path)


def classifier_of(files, store, tmp_path, **settings):
    own = tmp_path / "own"
    own.mkdir(exist_ok=True)
    options = Options(backbone=str(files / "backbone"), adapters=str(store), backend="torch", **settings)
    return Classifier(options, own)


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What is logged."""
    found: list[str] = []
    for level in ("warning", "error"):
        monkeypatch.setattr(log, level, lambda text, *values: found.append(text % values))
    return found


def ask(classifier, *names: str) -> list[Any]:
    pixels = classifier.pixels_of(read_image(picture(0), 10**6))
    return classifier.classify(names, [pixels] * len(names))


pieces = pytest.mark.compile


@pieces
def test_an_unknown_adapter_in_a_batch_is_refused_and_the_others_are_answered(classifier):
    known, unknown, base = ask(classifier, "a", "nope", "__base__")
    assert known.version and base.version == ""
    assert unknown.status == 404 and "GET /adapters" in unknown.detail


@pieces
def test_a_batch_that_fails_runs_again_one_by_one(classifier, store, files):
    put(files / "exported" / "b.safetensors", store, "b")
    run, whole = classifier.run, ask(classifier, "a", "b")

    def breaks_with_b(images, adapters):
        if len(images) > 1 or adapters["row_bias"].shape[2] == whole_rows:
            raise RuntimeError("no memory")
        return run(images, adapters)

    whole_rows = classifier.bank.adapters.inputs(["b"])["row_bias"].shape[2]
    classifier.run = breaks_with_b
    good, bad = ask(classifier, "a", "b")
    np.testing.assert_allclose(good.logits, whole[0].logits, rtol=1e-4, atol=1e-5)
    assert bad.status == 500 and "b does not run: no memory" in bad.detail


@pieces
def test_scores_that_are_not_finite_are_an_error_of_their_adapter_alone(classifier):
    run = classifier.run

    def overflows(images, adapters):
        logits = run(images, adapters).copy()
        logits[0] = np.nan
        return logits

    classifier.run = overflows
    bad, good = ask(classifier, "a", "a")
    assert bad.status == 500 and "not finite" in bad.detail and np.isfinite(good.logits).all()


@pieces
def test_a_replaced_adapter_of_other_classes_is_answered_with_its_own(classifier, store, files):
    def relabelled(count):
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        source = files / "exported" / "a.safetensors"
        with safe_open(source, framework="np") as file:
            metadata = {**file.metadata(), "labels": json.dumps([f"class {n}" for n in range(count)])}
        tensors = load_file(source)
        for name in tensors:
            if name.startswith("head."):
                tensors[name] = np.resize(tensors[name], (count, *tensors[name].shape[1:]))
        path = store.parent / f"{count}.safetensors"
        save_file(tensors, path, metadata)
        return path

    for count in (2, 9, 3):
        put(relabelled(count), store, "a")
        classified, other = ask(classifier, "a", "__base__")
        assert len(classified.labels) == len(classified.logits) == count and len(other.logits) == 5


@pieces
@pytest.mark.parametrize("damage", ["cut", "words", "empty", "folder", "large"])
def test_a_damaged_file_is_refused_once_and_the_former_adapter_stays(files, store, tmp_path, damage, messages):
    classifier = classifier_of(files, store, tmp_path, max_adapter_mb=0.01)
    (former,) = ask(classifier, "a")
    path = store / "a.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"cut": whole[:-7], "words": b"words", "empty": b"", "large": bytes(20_000)}[damage])
    for _ in range(3):
        classifier.bank.follow()
        (still,) = ask(classifier, "a")
        assert still.version == former.version
        np.testing.assert_array_equal(still.logits, former.logits)
    assert sum("the former one stays" in message for message in messages) == 1
    assert list(classifier.adapters()["refused"]) == ["a"]
    shutil.rmtree(path) if damage == "folder" else path.unlink()
    assert ask(classifier, "a")[0].status == 404


@pieces
def test_a_file_of_another_backbone_or_with_no_name_for_an_adapter_is_refused(classifier, store, files):
    from safetensors.numpy import load_file, save_file

    save_file(load_file(files / "exported" / "a.safetensors"), store / "foreign.safetensors", {"kind": "other"})
    put(files / "exported" / "a.safetensors", store, "with space")
    refused = classifier.adapters()["refused"]
    assert "not an exported adapter" in refused["foreign"] and "no name" in refused["with space"]
    (foreign,) = ask(classifier, "foreign")
    assert foreign.status == 404 and "refused" in foreign.detail and "export_adapter" in foreign.detail


@pieces
def test_adapters_stay_while_their_folder_is_gone(classifier, store, messages):
    store.rename(store.with_name("elsewhere"))
    for _ in range(3):
        classifier.bank.follow()
        assert ask(classifier, "a")[0].version
    assert sum("is gone" in message for message in messages) == 1
    with pytest.raises(Refusal, match="cannot be written to: No such file"):
        classifier.put("b", b"anything")
    store.with_name("elsewhere").rename(store)
    classifier.bank.follow()
    assert ask(classifier, "a")[0].version


@pieces
def test_more_adapters_than_memory_are_answered_from_the_versions_that_were_taken(files, store, tmp_path):
    sources = [variant(files / "exported" / "a.safetensors", seed, tmp_path) for seed in range(6)]
    for seed, source in enumerate(sources):
        put(source, store, f"v{seed}")
    whole = ask(classifier_of(files, store, tmp_path), *[f"v{seed}" for seed in range(6)])
    classifier = classifier_of(files, store, tmp_path, adapter_memory_mb=0.01)
    for seed, expected in enumerate(whole):
        (answer,) = ask(classifier, f"v{seed}")
        assert answer.version == expected.version == version_of(sources[seed])
        np.testing.assert_allclose(answer.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert classifier.bank.adapters.nbytes <= 0.01 * 2**20


@pieces
def test_a_replica_keeps_no_copies_of_former_versions(classifier, store, files, tmp_path):
    for seed in range(4):
        put(variant(files / "exported" / "a.safetensors", seed, tmp_path), store, "a")
        ask(classifier, "a")
    assert len(list((tmp_path / "own").iterdir())) == 1
    (store / "a.safetensors").unlink()
    ask(classifier, "a")
    assert not list((tmp_path / "own").iterdir())


@pieces
def test_an_upload_that_is_refused_leaves_nothing_in_the_store(classifier, store, files):
    for data in (b"words", (files / "exported" / "b.safetensors").read_bytes()[:-3]):
        with pytest.raises(Refusal, match="The file cannot be read") as error:
            classifier.put("b", data)
        assert error.value.status == 422
    assert [path.name for path in store.iterdir()] == ["a.safetensors"]


@pieces
def test_a_read_only_server_changes_nothing(files, store, tmp_path):
    classifier = classifier_of(files, store, tmp_path, read_only=True)
    for change in (lambda: classifier.put("b", b""), lambda: classifier.delete("a")):
        with pytest.raises(Refusal, match="no changes"):
            change()


@pieces
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: (folder / "backbone.pt2").unlink(), "has no backbone.pt2: write it with export_backbone"),
        (lambda folder: (folder / "backbone.json").unlink(), "has no backbone.json"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "AutoImageProcessor.from_pretrained"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text(
                (folder / "preprocessor_config.json").read_text().replace("32", "48")
            ),
            r"makes images of \(3, 48, 48\), but the graph takes \(3, 32, 32\)",
        ),
    ],
)
def test_a_folder_that_lacks_something_is_refused_with_what_to_do(files, store, tmp_path, change, said):
    shutil.copytree(files / "backbone", tmp_path / "copy" / "backbone")
    change(tmp_path / "copy" / "backbone")
    with pytest.raises(ValueError, match=said):
        classifier_of(tmp_path / "copy", store, tmp_path)


def test_a_folder_of_a_process_that_was_killed_is_removed_and_others_are_not(tmp_path):
    code = "from adapter_server.scratch import own_folder as new; print(new(), flush=True); input()"
    env = {"PATH": "", "TMPDIR": str(tmp_path), "PYTHONPATH": f"{EXAMPLES}:{ROOT}"}

    def start() -> tuple[subprocess.Popen[str], Path]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)
        return process, Path(process.stdout.readline().strip())

    first, of_first = start()
    second, of_second = start()
    assert of_first.is_dir() and of_second.is_dir()
    first.kill()
    first.wait()
    third, of_third = start()
    assert not of_first.exists() and of_second.is_dir() and of_third.is_dir()
    for process in (second, third):
        process.kill()
        process.wait()


def test_a_store_that_is_neither_folder_nor_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match="make it, or name a repository"):
        open_store(str(tmp_path / "none"), 1)


# ------------------------------------------------------------------------------------------------------------- the Hub

FOLLOW = """
import sys
from adapter_server.store import open_store
store = open_store("hf://tester/adapters", 0.0)
for _ in range(3):
    print(*sorted(path.name for path in store.folder.glob("*.safetensors")), flush=True)
    input()
    store.pull(asked=True)
"""


@pytest.mark.processes
def test_adapters_come_from_a_repository_of_the_hub_and_stay_while_it_cannot_be_reached(tmp_path):
    with HubServer() as hub:
        repository = hub.repositories["tester/adapters"] = Repository("tester/adapters")
        repository.commit("main", {"a.safetensors": b"1", "README.md": b""})
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PATH": ""}
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOW],
            env={**env, "PYTHONPATH": f"{EXAMPLES}:{ROOT}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline().split() == ["a.safetensors"]
        repository.commit("main", {"b.safetensors": b"2", "c.safetensors": b"3"})
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == ["b.safetensors", "c.safetensors"]
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline().split() == ["b.safetensors", "c.safetensors"]
    process.communicate("\n")
    assert process.returncode == 0
