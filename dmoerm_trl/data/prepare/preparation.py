"""Convert the examples of a set to checked rows, and count the examples that are left out by reason."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from ...tasks import OTHERS, TaskTable, check_name
from ..preference_row import PreferenceRow, RowError, check_row
from ..prepare import personal_data
from ..records import Record, Records
from .audit import PartAudit
from .reading import columns_of, read_examples
from .sets import PreferenceSet

GENERAL = "general"
"""Task of the rows of a set that has its own capability points but no tasks."""

ROUTED_AT_ONCE = 1000
"""Number of rows per call of a router."""


@dataclass
class Preparation:
    """
    Settings by which the examples of a set become rows, the same for all splits.

    Args:
        preference_set (`PreferenceSet`):
            The converter and columns of the set.
        columns (`Mapping[str, str]`):
            Standard name of a column -> its name in this source.
        tasks (`TaskTable`, *optional*):
            Table that the rows must fit. By default a table is made of the tasks and points of the rows; see [`table`].
        task (`str`, *optional*):
            Task of rows that have none.
        task_column (`str`, *optional*):
            Column of the task. A suffix `_<split>`, as in the domains of SHP, is removed.
        task_names (`Mapping[str, str]`):
            Value of `task_column` -> task. Other values are kept.
        route (`Callable`, *optional*):
            Function that routes prompts to tasks, for rows that have no task. Not with `task`.
        points (`Mapping[str, str | None]`):
            Name of a capability point in the set -> name to write, or None to leave it out. Other names are kept.
        where (`Mapping[str, Any]`):
            Column -> value, or list of values, of the examples to keep.
        drop_personal_data (`bool`, *optional*, defaults to `False`):
            Whether to leave out rows that seem to contain personal data.
        phone_region (`str`, *optional*, defaults to `"US"`):
            Country whose format is assumed for phone numbers without a country code.

    Raises:
        ValueError: If `points` names a point that the set does not have, or the names do not form a table.
        ImportError: If personal data is to be dropped and the extra `prepare` is not installed.
    """

    preference_set: PreferenceSet
    columns: Mapping[str, str] = field(default_factory=dict)
    tasks: TaskTable | None = None
    task: str | None = None
    task_column: str | None = None
    task_names: Mapping[str, str] = field(default_factory=dict)
    route: Callable[[Sequence[list[dict]]], Sequence[str]] | None = None
    points: Mapping[str, str | None] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    drop_personal_data: bool = False
    phone_region: str | None = "US"

    def __post_init__(self):
        own = self.preference_set.points
        if unknown := [point for point in self.points if point not in own]:
            raise ValueError(f"`points`: got {unknown[0]!r}, which the set does not have, need some of {list(own)}.")
        if self.own_points:
            TaskTable({GENERAL: self.own_points}, self.own_points)  # checks the names
        if personal_data.is_available():
            personal_data.check_region(self.phone_region)
        if self.drop_personal_data and not personal_data.is_available():
            raise ImportError(
                "got drop_personal_data without the packages `phonenumbers` and `python-stdnum`, need them to find personal "
                "data: pip install 'dmoerm-trl[prepare]'."
            )

    @cached_property
    def own_points(self) -> tuple[str, ...]:
        """The capability points of the set under their new names."""
        names = [self.points.get(point, point) for point in self.preference_set.points]
        return tuple(name for name in names if name is not None)

    def rows(
        self, dataset: Records, audit: PartAudit, *, split: str = "train", source: str = "set"
    ) -> Iterator[PreferenceRow]:
        """
        Yield the rows of a split. `audit` counts each of them and what was skipped.

        Raises:
            ValueError: If a column is missing, or there is no row at all.
        """
        self._check_columns(dataset, source)
        examples = self._examples(dataset, audit)
        look = personal_data.is_available()
        examples = tqdm(examples, desc=f"preparing {source} {split}", unit=" examples", delay=3)
        for place, converted, route in self._with_routes(self._converted(group, split) for group in examples):
            try:
                row = self._finished(converted, route)
            except RowError as error:
                audit.skip(place, error)
                continue
            if look:
                kinds = personal_data.kinds_in(row, self.phone_region)
                audit.flag(kinds)
                if kinds and self.drop_personal_data:
                    audit.skipped["personal data"] += 1
                    continue
            audit.add(row)
            if route is not None:
                audit.routes[route] += 1
                audit.routed += converted.task is None
            yield row
        if not audit.rows:
            raise ValueError(
                f"{source}, split {split!r}: got no row that can be used, need some; skipped were {dict(audit.skipped)}, "
                f"such as {list(audit.examples.values())}: see recipes/PREPARE.md."
            )

    def table(self, seen: Iterable[str | None]) -> TaskTable | None:
        """Build the task table of rows with the tasks `seen`, if the set has its own points and no table was given."""
        if self.tasks is not None or not self.own_points:
            return None
        named = [task for task in seen if task not in (None, OTHERS)]
        return TaskTable(dict.fromkeys(named, self.own_points), self.own_points)

    def _check_columns(self, dataset: Records, source: str) -> None:
        got = columns_of(dataset)
        needed = [*self.preference_set.columns, *([self.task_column] if self.task_column else []), *self.where]
        if missing := [name for name in needed if self.columns.get(name, name) not in got]:
            raise ValueError(
                f"{source}: got the columns {got}, need {needed}; missing are {missing}: take the set that has these "
                "columns, or say with `columns` what they are called here."
            )

    def _examples(self, dataset: Records, audit: PartAudit) -> Iterator[Record]:
        """Yield the examples of each row that are kept."""
        wanted = {column: value if isinstance(value, list) else [value] for column, value in self.where.items()}

        def is_wanted(example: Mapping[str, Any]) -> bool:
            return all(
                value in values or (isinstance(value, str) and value in map(str, values))  # in CSV numbers are text
                for value, values in ((example.get(column), values) for column, values in wanted.items())
            )

        of_set = self.preference_set
        for place, group in read_examples(dataset, self.columns, of_set.group_by, of_set.consecutive):
            if isinstance(group, RowError):
                yield Record(place, group)
                continue
            taken = [example for example in group if is_wanted(example)]
            if len(taken) < len(group):
                audit.skipped["left out by `where`"] += len(group) - len(taken)
            if taken:
                yield Record(place, taken)

    def _converted(self, group: Record, split: str) -> Record:
        """Return the row, whose task and names of points are not checked yet, or the error."""
        if isinstance(group.value, RowError):
            return group
        try:
            row = self._row(group.value, split)
            check_row(row)
        except RowError as error:
            return group._replace(value=error)
        return group._replace(value=row)

    def _with_routes(self, converted: Iterable[Record]) -> Iterator[tuple[str, PreferenceRow | RowError, str | None]]:
        """Yield each row or error with the router's task, which is None without a router and for errors."""
        if self.route is None:
            yield from ((*record, None) for record in converted)
            return
        converted = iter(converted)
        while batch := list(islice(converted, ROUTED_AT_ONCE)):
            prompts = [row.prompt for _, row in batch if isinstance(row, PreferenceRow)]
            routes = iter(self.route(prompts) if prompts else ())
            yield from (
                (*record, next(routes) if isinstance(record.value, PreferenceRow) else None) for record in batch
            )

    def _finished(self, row: PreferenceRow | RowError, route: str | None) -> PreferenceRow:
        if isinstance(row, RowError):
            raise row
        default = GENERAL if self.tasks is None and self.own_points else None
        row = replace(row, task=row.task or route or default)
        if self.tasks is not None:
            check_row(row, self.tasks)
        elif row.task is not None:  # the table will be made of the rows
            try:
                check_name(row.task)
            except ValueError as error:
                raise RowError("bad task", f"field `task`: {error}") from error
        return row

    def _row(self, group: list[dict[str, Any]], split: str) -> PreferenceRow:
        first = group[0]
        for column in self.preference_set.columns:  # a rating may be absent
            if column not in self.preference_set.points and any(example.get(column) is None for example in group):
                raise RowError(f"no `{column}`", f"got no `{column}`, need one.")
        row = self.preference_set.convert(group if self.preference_set.group_by else first)
        return replace(
            row,
            task=self._task(row, first, split),
            capability_ranks=self._renamed(row.capability_ranks),
            capability_pairs=self._renamed(row.capability_pairs),
        )

    def _task(self, row: PreferenceRow, example: Mapping[str, Any], split: str) -> str | None:
        named = example.get(self.task_column) if self.task_column else None
        if named is not None:
            named = str(named).removesuffix(f"_{split}")
            return self.task_names.get(named, named)
        return row.task or self.task

    def _renamed(self, labels: Mapping[str, list]) -> dict[str, list]:
        named = {self.points.get(point, point): of_point for point, of_point in labels.items()}
        named.pop(None, None)
        return named
