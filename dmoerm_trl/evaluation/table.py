"""The consistency table (the paper's table 3): one row per method, one column per task, then `others` and `overall`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.rows import PreferenceRow
from ..files import write_json, write_text
from ..markdown import column_widths, escape, markdown_table
from ..tasks import OTHERS, OVERALL
from .consistency import agreement, pooled

CEILING = "ceiling"
"""Row of the gold reward's consistency with the noisy labels, which no reward model can be expected to exceed."""

LENGTH_ONLY = "length only"
"""Row of [`length_scores`]."""


@dataclass(frozen=True)
class Cell:
    """Consistency of one method in one column: a share from 0 to 1 with its bootstrap interval over prompts."""

    mean: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Table:
    """
    Consistency of each method in each column.

    Args:
        columns (`tuple[str, ...]`): The tasks, then `"others"` if there are such rows, then `"overall"`.
        cells (`dict[str, dict[str, Cell]]`): Method -> column -> cell. A task without rows has no cell.
        confidence (`float`): Coverage of the intervals.
    """

    columns: tuple[str, ...]
    cells: dict[str, dict[str, Cell]]
    confidence: float

    @property
    def pairs(self) -> dict[str, int]:
        """Column -> number of non-tied pairs, which is the same for all methods."""
        return {column: cell.pairs for row in self.cells.values() for column, cell in row.items()}

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Convert the table to method -> column -> `{"mean": , "low": , "high": }`, with shares from 0 to 1."""
        return {
            method: {column: {"mean": c.mean, "low": c.low, "high": c.high} for column, c in row.items()}
            for method, row in self.cells.items()
        }

    def to_markdown(self) -> str:
        """
        Render the table in Markdown, in percent, with an interval in the overall column. The best of each column is bold and
        the second best underlined, judged by the printed numbers. The rows `"ceiling"` and `"length only"`, which are not
        reward models, and the numbers of pairs follow in a second table for comparison.
        """
        methods = [method for method in self.cells if method not in (CEILING, LENGTH_ONLY)]
        printed = {
            column: [
                f"{100 * self.cells[method][column].mean:.1f}" for method in methods if column in self.cells[method]
            ]
            for column in self.columns
        }
        places = {column: sorted(set(values), key=float, reverse=True)[:2] for column, values in printed.items()}
        columns = [escape(column) for column in self.columns]
        contest = [["method", *columns]]
        contest += [[escape(method), *(self._text(method, c, places[c]) for c in self.columns)] for method in methods]
        apart = [["for comparison", *columns]]
        apart += [[escape(m), *(self._text(m, c, []) for c in self.columns)] for m in self.cells if m not in methods]
        apart += [["pairs", *(str(self.pairs.get(column, "–")) for column in self.columns)]]

        widths = column_widths([*contest, *apart])
        caption = (
            f"Consistency with the labels, in percent; the brackets hold the {100 * self.confidence:g}% bootstrap "
            "interval over prompts. Best in bold, second best underlined."
        )
        shown = [contest, apart] if methods else [apart]
        tables = [markdown_table(table, left=[0], widths=widths) for table in shown]
        return "\n\n".join([*tables, caption]) + "\n"

    def save(self, path_prefix: str | Path) -> tuple[Path, Path]:
        """
        Write `<path_prefix>.md`, the output of [`Table.to_markdown`], and `<path_prefix>.json`, with `consistency`
        (the output of [`Table.to_dict`]), `pairs` (column -> number) and `confidence`. Return both paths.
        """
        markdown, content = Path(f"{path_prefix}.md"), Path(f"{path_prefix}.json")
        write_text(markdown, self.to_markdown())
        write_json(content, {"consistency": self.to_dict(), "pairs": self.pairs, "confidence": self.confidence})
        return markdown, content

    def _text(self, method: str, column: str, places: list[str]) -> str:
        """Format a cell such as `**70.7** [68.1, 73.2]`; only the overall column has the interval."""
        cell = self.cells[method].get(column)
        if cell is None:
            return "–"
        text = f"{100 * cell.mean:.1f}"
        if text in places:
            text = (f"**{text}**", f"<u>{text}</u>")[places.index(text)]
        return f"{text} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]" if column == OVERALL else text


def consistency_table(
    scores: dict[str, list[list[float]]],
    rows: Sequence[PreferenceRow],
    columns: Sequence[str],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """
    Compare methods on labelled rows.

    Args:
        scores (`dict[str, list[list[float]]]`):
            Method -> the rewards of each row's responses, in the order of `rows` and their responses.
        rows (`Sequence[PreferenceRow]`):
            The labelled rows. Rows with task `"others"` or without a task form the column `"others"`. Two responses with
            the same text are not a pair, whatever their ranks.
        columns (`Sequence[str]`):
            The tasks, in the order of the table. A task without rows is shown as a dash.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the bootstrap intervals over prompts.
        resamples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        [`Table`]: The table. Its `"overall"` column pools the pairs of all rows, so large tasks weigh more; it is not the
        mean of the other columns.

    Raises:
        ValueError: If a row's task is not among `columns`, or a method's scores do not match the rows or are not finite.

    Example:

    ```python
    from dmoerm_trl import consistency_table, load_rows

    rows, _ = load_rows("runs/demo/data/test.jsonl")
    rows = [row for row in rows if row.pairs_of()]
    scores = {"length only": [[float(len(text)) for text in row.responses] for row in rows]}
    print(consistency_table(scores, rows, ["chitchat", "roleplay"], resamples=10).to_markdown())
    ```
    """
    if not scores:
        raise ValueError("got no scores, need those of at least one method.")
    if {OTHERS, OVERALL} & set(columns) or len(set(columns)) != len(columns):
        raise ValueError(
            f"got columns {list(columns)}, need distinct tasks: {OTHERS!r} and {OVERALL!r} are added automatically."
        )
    indices: dict[str, list[int]] = {column: [] for column in (*columns, OTHERS)}
    for index, row in enumerate(rows):
        task = OTHERS if row.task is None else row.task
        if task not in indices:
            raise ValueError(f"row {index}: got task {task!r}, need {OTHERS!r} or one of {list(columns)}.")
        indices[task].append(index)
    indices = {
        column: of_column for column, of_column in indices.items() if any(rows[i].pairs_of() for i in of_column)
    }
    indices[OVERALL] = list(range(len(rows)))

    cells: dict[str, dict[str, Cell]] = {}
    for method, rewards in scores.items():
        if len(rewards) != len(rows):
            raise ValueError(f"method {method!r}: got scores of {len(rewards)} rows, need those of all {len(rows)}.")
        agreements = []
        for prompt, (row, of_row) in enumerate(zip(rows, rewards, strict=True)):
            try:
                if len(of_row) != len(row.responses):
                    raise ValueError(
                        f"got {len(of_row)} rewards for {len(row.responses)} responses, need one per response: score them all."
                    )
                agreements.append(agreement(of_row, row.pairs_of()))
            except ValueError as error:
                raise ValueError(f"method {method!r}, column {OVERALL!r}: prompt {prompt}: {error}") from error
        cells[method] = {}
        for column in (OVERALL, *columns, OTHERS):
            if column not in indices:  # no pairs
                continue
            try:
                result = pooled([agreements[index] for index in indices[column]], confidence, resamples, seed)
            except ValueError as error:
                raise ValueError(f"method {method!r}, column {column!r}: {error}") from error
            cells[method][column] = Cell(result["consistency"], result["low"], result["high"], result["pairs"])
    shown = (*columns, *([OTHERS] if OTHERS in indices else []), OVERALL)
    return Table(shown, {method: {c: row[c] for c in shown if c in row} for method, row in cells.items()}, confidence)


def length_scores(rows: Sequence[PreferenceRow]) -> list[list[float]]:
    """
    Score rows by the length-only baseline, whose reward is the number of characters of a response.

    A consistency far from 50% on either side shows that the labels can be guessed from length alone; only a reward model well
    above it has shown that it reads the text. Characters rather than tokens make the row the same for every base model.
    """
    return [[float(len(response)) for response in row.responses] for row in rows]
