# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What the figures show: the numbers that are drawn are those that were measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessorPil

from peft_e2vpt import PruneRewindCallback, PruningReport
from peft_e2vpt.attention_maps import PromptAttention, attention_maps, prompt_attention
from peft_e2vpt.embeddings import class_token_embeddings
from peft_e2vpt.plotting import (
    DARK,
    plot_attention_maps,
    plot_embeddings,
    plot_methods,
    plot_prompt_attention,
    plot_pruning,
    plot_run,
    principal_components,
    rollout,
)
from tests.support.adapted import KV_ONLY, adapt, predict
from tests.support.models import BATCH, build
from tests.support.training import trainer_for


np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from matplotlib import rc_context  # noqa: E402
from matplotlib.colors import LogNorm, to_rgb  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from peft_e2vpt.plotting.attention import _diverging  # noqa: E402
from peft_e2vpt.plotting.canvas import colours, of_text  # noqa: E402


REPORT = PruningReport(
    step=12,
    rewound_to="init",
    num_scored_samples=8,
    layers=[4, 5],
    token_scores=[[1.0, 4.0, 2.0], [3.0, 0.0, 6.0]],
    segment_scores=[[[1.0, 2.0]] * 3] * 2,
    token_gates=[[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]],
    segment_gates=[[[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]],
    tuned_values_before=120,
    tuned_values_after=80,
    tuned_percentage_before=1.2,
    tuned_percentage_after=0.8,
)
HISTORY = [
    {"step": 6, "loss": 2.0, "learning_rate": 0.1},
    {"step": 12, "loss": 1.0, "learning_rate": 0.0},
    {"step": 12, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_balanced_accuracy": 0.4},
    {"step": 12, "pruning_step": 12},
    {"step": 18, "loss": 1.8, "learning_rate": 0.1},
    {"step": 24, "eval_loss": 1.2, "eval_accuracy": 0.75, "eval_balanced_accuracy": 0.6},
    {"step": 24, "train_loss": 1.6, "train_runtime": 3.0},
    {"step": 24, "test_loss": 1.3, "test_accuracy": 0.7},
]
ROWS = [
    {"method": "linear", "trained": 100, "percent": 0.01, "accuracy": 0.5, "balanced_accuracy": 0.4},
    {"method": "e2vpt", "trained": 10_000, "percent": 0.2, "accuracy": 0.75, "balanced_accuracy": 0.6},
    {"method": "e2vpt", "trained": 10_000, "percent": 0.2, "accuracy": 0.85, "balanced_accuracy": 0.8},
]


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def heights_of(container: Any) -> list[float]:
    return [bar.get_height() for bar in container]


# ------------------------------------------------------------------------------------------------- what was pruned
def test_a_square_is_as_dark_as_the_prompt_is_important_and_pruned_prompts_are_crossed() -> None:
    left, right, *_ = plot_pruning(REPORT).axes
    assert left.images[0].get_array().tolist() == [[0.25, 1.0, 0.5], [0.5, 0.0, 1.0]]
    assert lines_of(left)["pruned"] == [(0, 0), (1, 1)]
    assert right.images[0].get_array().tolist() == [[0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 1, 1]]
    assert [label.get_text() for label in left.get_yticklabels()] == ["4", "5"]


# ------------------------------------------------------------------------------------------- how much prompts get
def test_bars_are_the_shares_in_percent_and_lines_what_equal_attention_would_be() -> None:
    shares = torch.tensor([[[0.2, 0.1, 0.7], [0.4, 0.3, 0.3]], [[0.0, 0.5, 0.5], [0.0, 0.7, 0.3]]])
    counts = torch.tensor([[3, 2, 15], [0, 2, 6]])
    figure = plot_prompt_attention(PromptAttention([6, 7], shares, shares.flip(0), counts))
    for axes, order in zip(figure.axes, ([0, 1], [1, 0]), strict=True):
        visual, key_value = axes.containers
        assert heights_of(visual) == pytest.approx([[30, 0][i] for i in order])
        assert heights_of(key_value) == pytest.approx([[20, 60][i] for i in order])
        assert [bar.get_y() for bar in key_value] == heights_of(visual)  # one stands on the other
        assert [segment[0][1] for segment in axes.collections[0].get_segments()] == pytest.approx([25, 25])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["6", "7"]
    assert [axes.get_title() for axes in figure.axes] == ["Class token", "Patches"]


@pytest.mark.parametrize(("name", "panels"), [("dinov2", 2), ("clip_vision", 2), ("siglip", 1), ("swin", 1)])
def test_the_attention_of_a_model_is_drawn(name: str, panels: int) -> None:
    model, inputs = adapt(name)
    measured = prompt_attention(model, inputs)
    figure = plot_prompt_attention(measured)
    assert len(figure.axes) == panels
    visual, key_value = figure.axes[-1].containers
    for kind, bars in enumerate((visual, key_value)):
        assert heights_of(bars) == pytest.approx((100 * measured.patches.mean(1)[:, kind]).tolist())


def test_a_kind_of_prompt_that_an_adapter_lacks_is_not_drawn() -> None:
    model, inputs = adapt(**KV_ONLY)
    (bars,) = plot_prompt_attention(prompt_attention(model, inputs)).axes[0].containers
    assert bars.get_label() == "to key-value prompts"


# ------------------------------------------------------------------------------------------ where in an image
@torch.no_grad()
def test_rollout_is_the_product_of_the_layers_with_their_residual_connections() -> None:
    model, inputs = adapt(dtype=torch.float64)
    maps = attention_maps(model, inputs)
    for sample in range(BATCH):
        expected = torch.eye(17).double()
        for one in maps:
            tokens = one.weights[sample, :, :, 5:].double()  # 3 visual prompts and 2 key-value prompts are left out
            mean = (tokens / tokens.sum(-1, keepdim=True)).mean(0)
            expected = (0.5 * mean + 0.5 * torch.eye(17)) @ expected
        torch.testing.assert_close(rollout(maps)[sample], expected)
    torch.testing.assert_close(rollout(maps).sum(-1), torch.ones(BATCH, 17).double())


def maps_by_hand(weights: Tensor) -> Tensor:
    """Attention of the first token to 16 patches behind it, as a multiple of the mean: (B, 4, 4)."""
    of_class = weights[:, 0, 1:]
    return (of_class / of_class.mean(-1, keepdim=True)).reshape(-1, 4, 4)


def test_maps_without_prompts_are_those_of_the_plain_model() -> None:
    model, inputs = adapt("dinov2")
    base, _ = build("dinov2", attn_implementation="eager")
    with torch.no_grad():
        attentions = base(**inputs, output_attentions=True).attentions
    total = torch.eye(17)
    for attention in attentions:
        total = (attention.mean(1) + torch.eye(17)) / 2 @ total
    figure = plot_attention_maps(model, inputs)
    grid = np.array(figure.axes[: 5 * BATCH]).reshape(BATCH, 5)
    for sample in range(BATCH):
        last, rolled = (torch.tensor(grid[sample, column].images[1].get_array().data) for column in (1, 3))
        torch.testing.assert_close(last, maps_by_hand(attentions[-1].mean(1))[sample])
        torch.testing.assert_close(rolled, maps_by_hand(total)[sample])


def test_maps_with_prompts_leave_prompts_out_and_say_how_much_they_got() -> None:
    model, inputs = adapt("dinov2")
    last = attention_maps(model, inputs)[-1]
    share = prompt_attention(model, inputs).class_token
    assert share is not None
    figure = plot_attention_maps(model, inputs)
    grid = np.array(figure.axes[: 5 * BATCH]).reshape(BATCH, 5)
    for sample in range(BATCH):
        drawn = torch.tensor(grid[sample, 2].images[1].get_array().data)
        torch.testing.assert_close(drawn, maps_by_hand(last.between_tokens().mean(1))[sample])
        to_prompts = 100 * share[-1, sample, :2].sum()
        assert grid[sample, 2].get_xlabel() == f"{to_prompts:.0f} % to prompts"
    scales = {grid[sample, column].images[1].get_clim() for sample in range(BATCH) for column in (1, 2)}
    assert len(scales) == 1  # equal colours are equal numbers
    ((least, most),) = scales
    assert least == 1 / most  # as far below uniform attention as above


def test_uniform_attention_leaves_the_colours_of_an_image_as_they_are() -> None:
    colours = _diverging()(LogNorm(1 / 8, 8)([1 / 8, 1.0, 8]))
    assert colours[1, 3] < 0.01  # the alpha channel
    assert colours[0, 3] > 0.8 and colours[0, 2] > colours[0, 0]  # less: blue
    assert colours[2, 3] > 0.8 and colours[2, 0] > colours[2, 2]  # more: orange


def test_an_image_has_the_colours_that_it_had_before_the_image_processor() -> None:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.5, 0.9], image_std=[0.2] * 3)
    model, _ = adapt("dinov2")
    inputs = dict(processor(Image.new("RGB", (40, 30), (200, 100, 50)), return_tensors="pt"))
    drawn = plot_attention_maps(model, inputs, processing_class=processor).axes[0].images[0].get_array()
    assert np.allclose(drawn, [200 / 255, 100 / 255, 50 / 255], atol=0.01)


def test_answer_and_truth_stand_below_an_image() -> None:
    model, inputs = adapt("vit")
    logits = predict(model, inputs)
    best = logits.argmax(-1)
    truth = best.clone()
    truth[0] = (best[0] + 1) % 5
    figure = plot_attention_maps(model, {**inputs, "labels": truth})
    names, shares = model.get_base_model().config.id2label, logits.softmax(-1).max(-1).values
    for sample in range(BATCH):
        mark = "\N{CHECK MARK}" if sample else "\N{BALLOT X}"
        below = figure.axes[5 * sample].get_xlabel()
        said, true = names[best[sample].item()], names[truth[sample].item()]
        assert below.replace("\N{ZERO WIDTH SPACE}", "") == f"says {said} ({shares[sample]:.0%}) {mark}\nis {true}"


def test_drawing_maps_leaves_the_model_as_it_was() -> None:
    model, inputs = adapt()
    expected = predict(model, inputs)
    plot_attention_maps(model, inputs)
    assert torch.equal(predict(model, inputs), expected)


def test_windows_have_no_map_over_the_whole_image() -> None:
    model, inputs = adapt("swin")
    with pytest.raises(ValueError, match="no map over the whole image"):
        plot_attention_maps(model, inputs)


# ------------------------------------------------------------------------------------------------------- a run
def test_losses_metrics_and_rates_are_drawn_over_the_steps() -> None:
    loss, accuracy, rate = plot_run(HISTORY).axes
    assert lines_of(loss) == {
        "training": [(6, 2.0), (12, 1.0), (18, 1.8)],
        "eval": [(12, 1.5), (24, 1.2)],
        "test": [(24, 1.3)],
    }
    assert lines_of(accuracy) == {"eval": [(12, 0.5), (24, 0.75)], "test": [(24, 0.7)]}
    assert lines_of(rate) == {"learning rate": [(6, 0.1), (12, 0.0), (18, 0.1)]}
    assert lines_of(plot_run(HISTORY, metric="balanced_accuracy").axes[1]) == {"eval": [(12, 0.4), (24, 0.6)]}


@pytest.mark.parametrize(("rewound_to", "text"), [("init", "rewound to the start"), ("none", "not rewound")])
def test_the_phases_of_a_pruned_run_are_marked(rewound_to: str, text: str) -> None:
    for axes in plot_run(HISTORY, replace(REPORT, rewound_to=rewound_to)).axes:
        first, second = axes.patches
        assert (first.get_x(), first.get_width(), second.get_x(), second.get_width()) == (0, 12, 12, 12)
        assert axes.lines[-1].get_xdata() == [12, 12]
    top = plot_run(HISTORY, replace(REPORT, rewound_to=rewound_to)).axes[0]
    assert [note.get_text() for note in top.texts[:2]] == ["all prompts", f"4 of 6 prompts, {text}"]


def test_no_line_joins_the_two_parts_of_a_pruned_run() -> None:
    points = lines_of(plot_run(HISTORY, REPORT).axes[0])["training"]
    assert points[:2] == [(6, 2.0), (12, 1.0)] and points[3] == (18, 1.8)
    assert points[2][0] == 12 and np.isnan(points[2][1])


def test_a_single_point_is_visible() -> None:
    loss, rate = plot_run([{"step": 6, "loss": 2.0, "learning_rate": 0.1}, {"step": 6, "eval_loss": 1.5}]).axes
    assert all(line.get_marker() == "o" for axes in (loss, rate) for line in axes.lines)


def test_lines_are_named_at_their_ends_and_the_names_keep_apart() -> None:
    history = [*HISTORY[:2], {"step": 24, "eval_loss": 1.001}, {"step": 24, "test_loss": 1.002}]
    figure = plot_run(history)
    figure.draw_without_rendering()
    names = figure.axes[0].texts
    assert [name.get_text() for name in names] == ["training", "eval", "test"]
    boxes = [name.get_window_extent() for name in names]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_values_that_are_not_finite_make_no_empty_panel() -> None:
    history = [{"step": 6, "loss": 2.0}, {"step": 6, "eval_loss": float("nan"), "eval_accuracy": float("nan")}]
    (loss,) = plot_run(history).axes
    assert list(lines_of(loss)) == ["training"]


def test_a_history_without_evaluations_has_no_panel_for_them() -> None:
    history = [entry for entry in HISTORY if "loss" in entry]
    assert [axes.get_ylabel() for axes in plot_run(history).axes] == ["loss", "learning rate"]
    with pytest.raises(ValueError, match="holds no loss"):
        plot_run([{"step": 3, "train_runtime": 1.0}])


def test_a_run_of_the_trainer_is_drawn_from_what_it_saves(tmp_path: Path) -> None:
    callback = PruneRewindCallback(prune_tokens=0.5, prune_segments=0.25)
    trainer = trainer_for(tmp_path, callback, num_train_epochs=2, eval_strategy="epoch")
    trainer.train()
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    report = PruningReport.load(tmp_path)
    loss, _ = plot_run(history, report).axes
    assert report.step == 6
    assert lines_of(loss)["eval"][0] == (6, loss_at(6, history))
    assert sum(not np.isnan(value) for _, value in lines_of(loss)["training"]) == 12


def loss_at(step: int, history: list[dict[str, float]]) -> float:
    return next(entry["eval_loss"] for entry in history if entry["step"] == step and "eval_loss" in entry)


# --------------------------------------------------------------------------------------------------------- methods
@pytest.mark.parametrize(("metric", "spread"), [("accuracy", (80, 75, 85)), ("balanced_accuracy", (70, 60, 80))])
def test_a_method_stands_at_its_parameters_and_its_accuracy_over_seeds(metric: str, spread: tuple[float, ...]) -> None:
    (axes,) = plot_methods(ROWS, metric=metric).axes
    assert axes.get_xscale() == "log"
    linear, e2vpt = axes.containers
    assert linear.lines[0].get_xydata().tolist() == [[100, pytest.approx(100 * ROWS[0][metric])]]
    assert e2vpt.lines[0].get_xydata().tolist() == [[10_000, pytest.approx(spread[0])]]
    (bar,) = e2vpt.lines[2][0].get_segments()
    assert bar[:, 1].tolist() == pytest.approx(spread[1:])
    assert [text.get_text() for text in axes.texts] == ["linear\n100 (0.01 %)", "e2vpt\n10,000 (0.20 %)"]


def test_a_grey_bar_is_the_standard_error_of_an_accuracy_on_the_test_set() -> None:
    (axes,) = plot_methods(ROWS, num_images=100).axes
    (grey,) = axes.containers[0].lines[2]
    assert grey.get_segments()[0][:, 1].tolist() == pytest.approx([50 - 5, 50 + 5])  # sqrt(.5 * .5 / 100) = .05
    assert axes.get_title(loc="left") == "grey: the standard error on 100 images"


def test_names_of_methods_cover_neither_each_other_nor_a_point() -> None:
    rows = [
        {"method": f"method {i}", "trained": 30_000 + 3_000 * i, "percent": 0.1, "accuracy": 0.8 + 0.004 * i}
        for i in range(5)
    ]
    figure = plot_methods(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without lines to points
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    points = [axes.transData.transform((row["trained"], 100 * row["accuracy"])) for row in rows]
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_without_rows_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no rows"):
        plot_methods([])


# ------------------------------------------------------------------------------------------------------ embeddings
def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    vectors = torch.randn(30, 6).double() @ torch.randn(6, 6).double() + 5
    left, values, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    found, shares = principal_components(vectors)
    torch.testing.assert_close(found.abs(), (left * values)[:, :2].abs())
    torch.testing.assert_close(shares, values[:2].square() / values.square().sum())


def test_the_order_of_embeddings_does_not_turn_a_figure_over() -> None:
    vectors = torch.randn(30, 6).double()
    torch.testing.assert_close(principal_components(vectors.flip(0))[0].flip(0), principal_components(vectors)[0])


def test_embeddings_of_each_class_are_drawn_at_their_principal_components() -> None:
    vectors = torch.randn(12, 6).double()
    labels = [0, 1, 2] * 4
    figure = plot_embeddings({"linear": vectors, "e2vpt": 2 * vectors}, labels, ["cat", "dog", "owl"])
    plane, shares = principal_components(vectors)
    for axes, expected in zip(figure.axes, (plane, 2 * plane), strict=True):
        assert [points.get_label() for points in axes.collections] == ["cat", "dog", "owl"]
        for label, points in enumerate(axes.collections):
            assert points.get_offsets().tolist() == [pytest.approx(point) for point in expected[label::3].tolist()]
        shapes = [points.get_paths()[0].vertices.shape for points in axes.collections]
        assert len(set(shapes)) > 1  # classes have markers, not colours alone
        assert axes.get_xlabel() == f"component 1 ({shares[0].item():.0%} of variance)"
    assert [axes.get_title() for axes in figure.axes] == ["linear", "e2vpt"]


def test_without_scikit_learn_principal_components_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'peft_e2vpt\[plot\]'"):
        principal_components(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_embeddings({}, [0], ["cat"]), "nothing to draw"),
        (lambda: plot_embeddings({"e2vpt": torch.randn(3, 4)}, [0, 1], ["cat", "dog"]), "3 embeddings for 2 labels"),
        (lambda: principal_components(torch.randn(1, 4)), r"two or more vectors \(n, D\), got shape \(1, 4\)"),
        (lambda: principal_components(torch.ones(3, 4)), "All embeddings are equal"),
    ],
)
def test_embeddings_that_cannot_be_drawn_are_refused(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "swin"])
def test_class_token_embeddings_are_the_first_tokens_of_the_last_hidden_state(name: str) -> None:
    model, inputs = adapt(name)
    model.train()
    before = [module.training for module in model.modules()]
    found = class_token_embeddings(model, inputs, has_class_token=name != "swin")
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        states = model.eval()(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, states.mean(1) if name == "swin" else states[:, 0])
    with model.disable_adapter():
        assert not torch.allclose(class_token_embeddings(model, inputs), found)


# ------------------------------------------------------------------------------------------------------------- all
def embeddings_of(model: Any, inputs: dict[str, Tensor]) -> Any:
    return plot_embeddings({"e2vpt": class_token_embeddings(model, inputs)}, [0, 1], ["cat", "dog"])


DRAWINGS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "pruning": lambda model, inputs: plot_pruning(REPORT),
    "prompt_attention": lambda model, inputs: plot_prompt_attention(prompt_attention(model, inputs)),
    "attention_maps": plot_attention_maps,
    "run": lambda model, inputs: plot_run(HISTORY, REPORT),
    "methods": lambda model, inputs: plot_methods(ROWS),
    "embeddings": embeddings_of,
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_can_be_written_and_none_needs_pyplot(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    model, inputs = adapt("dinov2")
    DRAWINGS[name](model, inputs).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_has_a_dark_variant(name: str) -> None:
    with rc_context(DARK):
        model, inputs = adapt("dinov2")
        figure = DRAWINGS[name](model, inputs)
        assert lightness(figure.get_facecolor()) < 0.1
        words = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, *axes.texts)]
        assert all(lightness(text.get_color()) > 0.3 for text in words if text.get_text())


def lightness(colour: Any) -> float:
    """Relative luminance, as the contrast of the Web Content Accessibility Guidelines counts it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("style", [{}, DARK], ids=["light", "dark"])
def test_names_are_readable_on_their_ground(style: dict[str, str]) -> None:
    with rc_context(style):
        ground = 1.0 if not style else lightness(DARK["figure.facecolor"])
        for colour in colours():
            darker, lighter = sorted((ground, lightness(of_text(colour))))
            assert (lighter + 0.05) / (darker + 0.05) >= 3, colour


@pytest.mark.parametrize("name", DRAWINGS)
def test_without_matplotlib_every_figure_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapt("dinov2")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'peft_e2vpt\[plot\]'"):
        DRAWINGS[name](model, inputs)
