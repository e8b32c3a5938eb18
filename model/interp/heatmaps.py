"""Draw the pictures of model/lens.py into a matplotlib figure. They need the extra `plots`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_LABELS = 64  # labels along an axis; with more there is no room for any
INCHES_PER_CELL = 0.35


def attention(figure: Any, weights: Mapping[tuple[int, int], Tensor], texts: Sequence[str]) -> None:
    """Draw a map for each head and a row of maps for each layer; queries run downwards and keys to the right."""
    layers, heads = sorted({layer for layer, _ in weights}), sorted({head for _, head in weights})
    side = max(2.0, min(len(texts), MAX_LABELS) * INCHES_PER_CELL * 0.6) if len(weights) == 1 else 2.0
    figure.set_size_inches(side * len(heads) + 2, side * len(layers) + 2)
    all_axes = figure.subplots(len(layers), len(heads), squeeze=False)
    for (layer, head), weights_TT in weights.items():
        axes = all_axes[layers.index(layer)][heads.index(head)]
        image = axes.imshow(weights_TT.numpy(), vmin=0, vmax=1, cmap="Blues")
        axes.set_title(f"layer {layer}, head {head}")
        if len(weights) == 1:
            label(axes.xaxis, texts)
            label(axes.yaxis, texts)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
    figure.colorbar(image, ax=all_axes, label="attention weight", shrink=0.7)


def logit_lens(figure: Any, record: Mapping[str, Any]) -> None:
    """Draw the likeliest next token after each token by each layer; the colour is its probability."""
    layers, texts = record["layers"], record["texts"]
    probabilities_LT = torch.tensor([[row[0] for row in layer["top_probabilities"]] for layer in layers])
    figure.set_size_inches(min(len(texts), MAX_LABELS) * 2 * INCHES_PER_CELL + 3, len(layers) * INCHES_PER_CELL + 2.5)
    axes = figure.subplots()
    image = axes.imshow(probabilities_LT.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    label(axes.xaxis, texts)
    label(axes.yaxis, [layer["after"] for layer in layers])
    if len(texts) <= MAX_LABELS:
        for row, layer in enumerate(layers):
            for position, top_texts in enumerate(layer["top_texts"]):
                put(axes, position, row, top_texts[0], is_dark=layer["top_probabilities"][position][0] > 0.5)
    axes.set_xlabel("after this token")
    figure.colorbar(image, label="probability of the likeliest")


def ablation(figure: Any, parts: Sequence[Mapping[str, Any]]) -> None:
    """Draw by how much the loss rises without each head and each MLP."""
    num_columns = sum(part["layer"] == 0 for part in parts)
    names = [*(f"head {head}" for head in range(num_columns - 1)), "MLP"]
    change_LN = torch.tensor([part["change"] for part in parts]).view(-1, num_columns)
    layers = [f"layer {layer}" for layer in range(len(change_LN))]
    largest = change_LN.abs().max().item() or 1.0
    grid(figure, change_LN, layers, names, limits=(-largest, largest), text="{:+.3f}", meaning="change of loss (nats)")


def patching(figure: Any, restored_LN: Tensor, layers: Sequence[str], columns: Sequence[str]) -> None:
    """Draw how much of the clean prompt's answer each patch restores."""
    meaning = "restored (1: as the clean prompt)"
    grid(figure, restored_LN, layers, columns, limits=(-1, 1), text="{:.2f}", meaning=meaning)


def induction(figure: Any, result: Mapping[str, Any]) -> None:
    """Draw each head's induction score."""
    scores_LH = torch.tensor(result["induction"])
    layers = [f"layer {layer}" for layer in range(scores_LH.shape[0])]
    heads = [f"head {head}" for head in range(scores_LH.shape[1])]
    grid(figure, scores_LH, layers, heads, limits=(-1, 1), text="{:.2f}", meaning="induction score")


def induction_over_steps(figure: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw the scores of every head and the losses of both halves, by step."""
    figure.set_size_inches(8, 9)
    steps = [result["step"] for result in results]
    titles = {"induction": "induction score", "previous": "weight on the token before"}
    *all_axes, loss_axes = figure.subplots(3, 1, sharex=True)
    for axes, (kind, title) in zip(all_axes, titles.items(), strict=True):
        scores_NLH = torch.tensor([result[kind] for result in results])
        for layer in range(scores_NLH.shape[1]):
            for head in range(scores_NLH.shape[2]):
                style = ("-", "--", ":", "-.")[layer % 4]
                name = f"{layer}.{head}"
                axes.plot(steps, scores_NLH[:, layer, head].numpy(), style, color=f"C{head % 10}", label=name)
        axes.set_ylabel(title)
        if scores_NLH[0].numel() <= 24:
            axes.legend(title="layer.head", ncols=2, fontsize="small")
    for half, name in (("first", "first time"), ("second", "second time")):
        loss_axes.plot(steps, [result[f"loss_{half}"] for result in results], label=name)
    loss_axes.set_ylabel("loss of random tokens (nats)")
    loss_axes.set_xlabel("step")
    loss_axes.legend()
    for axes in (*all_axes, loss_axes):
        axes.grid(alpha=0.3)


def grid(
    figure: Any,
    values_RC: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limits: tuple[float, float],
    text: str,
    meaning: str,
) -> None:
    """Draw a matrix with named rows and columns, coloured from blue over white to red, with its numbers."""
    figure.set_size_inches(min(len(columns), MAX_LABELS) * 2 * INCHES_PER_CELL + 3, len(rows) * INCHES_PER_CELL + 3)
    axes = figure.subplots()
    image = axes.imshow(values_RC.numpy(), vmin=limits[0], vmax=limits[1], cmap="RdBu_r", aspect="auto")
    label(axes.xaxis, columns)
    label(axes.yaxis, rows)
    if values_RC.numel() <= MAX_LABELS * 16:
        for row, cells in enumerate(values_RC.tolist()):
            for column, value in enumerate(cells):
                is_dark = abs(value) > 0.6 * max(map(abs, limits)) and math.isfinite(value)
                put(axes, column, row, text.format(value), is_dark=is_dark)
    figure.colorbar(image, label=meaning)


def put(axes: Any, x: int, y: int, text: str, *, is_dark: bool) -> None:
    color = "white" if is_dark else "black"
    axes.text(x, y, printable(text), ha="center", va="center", fontsize=7, color=color, parse_math=False)


def label(axis: Any, names: Sequence[str]) -> None:
    if len(names) > MAX_LABELS:
        return
    axis.set_ticks(range(len(names)), [printable(name) for name in names], fontsize=7)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)
        if axis.axis_name == "x":
            text.set_rotation(90)


def printable(text: str) -> str:
    """Return `text` in ASCII, which every font has."""
    return text.encode("ascii", errors="backslashreplace").decode()
