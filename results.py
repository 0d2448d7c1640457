"""What eval_ppl.py and passkey.py print and draw of their results: tables and pictures."""

from pathlib import Path

from cli import text_table
from evaluation import curves_over_steps, table_over_steps
from plots import (
    draw_heat_map, draw_passkeys, draw_perplexity, draw_perplexity_over_steps, draw_positions,
    draw_reach_over_steps, label, new_figure, save_figure
)

# ---- perplexity ----------------------------------------------------------------------------------


def perplexity_cells(result: dict) -> dict[int, str]:
    """The table's cells of one checkpoint: {window: perplexity and its standard error}."""
    cells = {}
    for row in result["windows"]:
        cell = f"{row['ppl']:.2f}"
        if row["stderr"] is not None:
            cell += f" ± {row['ppl'] * row['stderr']:.2f}"
        cells[row["window"]] = cell
    return cells


def perplexity_by_window(result: dict) -> dict[int, float]:
    """{window: perplexity} of one checkpoint."""
    return {row["window"]: row["ppl"] for row in result["windows"]}


def perplexity_table(results: list[dict], windows: list[int], over_steps: bool) -> str:
    """Perplexity and its standard error, a row for each checkpoint, a column for each window."""
    if over_steps:
        return table_over_steps(curves_over_steps(results, perplexity_cells), "window")
    header = ["checkpoint", "method", "scale"]
    rows = []
    for result in results:
        cells = perplexity_cells(result)
        row = [result["init"], result["method"], f"{result['scale']:g}"]
        row += [cells.get(window, "-") for window in windows]
        rows.append(row)
    return text_table(header + windows, rows)


def draw_perplexity_results(
    results: list[dict], over_steps: bool, by_position: bool, path: Path
) -> None:
    """The picture of eval_ppl.py: perplexity, and with by_position the loss by position."""
    panels = 2 if by_position else 1
    figure, axes = new_figure(panels)
    if over_steps:
        draw_perplexity_over_steps(axes[0], curves_over_steps(results, perplexity_by_window))
    else:
        draw_perplexity(axes[0], results)
    if by_position:
        draw_positions(axes[1], results)
    save_figure(figure, path)


# ---- passkeys ------------------------------------------------------------------------------------


def k_max_by_length(result: dict) -> dict[int, int]:
    """{length: k_max} of one checkpoint."""
    return {one["length"]: one["k_max"] for one in result["lengths"]}


def beyond_by_length(result: dict) -> dict[int, str]:
    """{length: the share of keys found beyond the original window} of one checkpoint."""
    return {one["length"]: beyond_cell(one) for one in result["lengths"]}


def passkey_tables(results: list[dict], over_steps: bool) -> str:
    """k_max at each length; where all checkpoints have one length, the success at each k too."""
    if over_steps:
        k_max = table_over_steps(curves_over_steps(results, k_max_by_length), "length")
        beyond = table_over_steps(curves_over_steps(results, beyond_by_length), "length")
        return f"k_max\n\n{k_max}\n\nfound beyond the original window\n\n{beyond}"
    rows = []
    for result in results:
        for one in result["lengths"]:
            successes = [point["success"] for point in one["points"]]
            found = sum(successes) / len(successes)
            row = [result["init"], result["method"], f"{result['scale']:g}"]
            row += [result["original_window"], one["length"], f"{found:.1%}"]
            row += [beyond_cell(one), one["k_max"]]
            rows.append(row)
    header = ["checkpoint", "method", "scale", "original window", "length", "found"]
    header += ["found beyond the original window", "k_max"]
    table = text_table(header, rows)
    if have_one_length(results):
        table = success_table(results) + "\n\n" + table
    return table


def beyond_cell(one: dict) -> str:
    """The share of keys found beyond the original window, with its 95% interval."""
    if "beyond" not in one:
        return "-"
    share = one["beyond"]
    return f"{share['found']:.1%} ({share['low']:.0%} to {share['high']:.0%})"


def have_one_length(results: list[dict]) -> bool:
    return all(len(result["lengths"]) == 1 for result in results)


def success_table(results: list[dict]) -> str:
    """The share of keys found at each k, a column for each checkpoint."""
    header = ["k"]
    columns = []
    for result in results:
        header.append(label(result))
        columns.append({point["k"]: f"{point['success']:.0%}" for point in result["points"]})
    rows = []
    for k in sorted({k for column in columns for k in column}):
        rows.append([k] + [column.get(k, "-") for column in columns])
    return text_table(header, rows)


def draw_passkey_results(
    results: list[dict], over_steps: bool, threshold: float, path: Path
) -> None:
    """The picture of passkey.py: k_max over steps, success over k, or a heat map over lengths."""
    if over_steps:
        figure, axes = new_figure(1)
        curves = curves_over_steps(results, k_max_by_length)
        draw_reach_over_steps(axes[0], curves, results)
    elif have_one_length(results):
        figure, axes = new_figure(1, width=7.5)
        draw_passkeys(axes[0], results, threshold)
    else:
        figure, axes = new_figure(len(results), width=5.2)
        for axis, result in zip(axes, results):
            picture = draw_heat_map(axis, result)
        figure.colorbar(picture, ax=axes, label="keys found")
    save_figure(figure, path)
