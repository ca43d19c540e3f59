"""The task tables: the paper's, in both languages, and one's own."""

import pytest

import dmoerm_trl
from dmoerm_trl.tasks import TaskTable, slug


def test_the_papers_table_is_the_same_in_both_languages():
    english, chinese = TaskTable.load("paper"), TaskTable.load("paper-zh")
    assert list(english.tasks) == ["text_creation", "roleplay", "objective_qa", "subjective_qa", "chitchat"]
    assert [len(points) for points in english.tasks.values()] == [5, 6, 6, 5, 5]
    assert [len(points) for points in chinese.tasks.values()] == [5, 6, 6, 5, 5]
    assert english.tasks["chitchat"][3] == "empathy ability" and chinese.tasks["闲聊"][3] == "共情能力"
    translation = {}
    for one, other in zip(english.tasks.values(), chinese.tasks.values(), strict=True):
        for point, name in zip(one, other, strict=True):
            assert translation.setdefault(point, name) == name
    assert tuple(translation[point] for point in english.overall[:4]) == chinese.overall[:4]


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks:\n  mail: [politeness, brevity]\noverall: [clarity]\n")
    table = TaskTable.load(str(path))
    assert table.tasks == {"mail": ("politeness", "brevity")} and table.overall == ("clarity",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {}\noverall: [a]\n", "got no task, need at least one"),
        ("tasks: {overall: [a]}\noverall: [a]\n", "'overall', which is reserved"),
        ("tasks: {others: [a]}\noverall: [a]\n", "'others', which is reserved"),
        ("tasks: {mail: []}\noverall: [a]\n", "task 'mail'.*need at least one"),
        ("tasks: {mail: [a b, a_b]}\noverall: [a]\n", "task 'mail'.*all distinct"),
        ("tasks: {mail: politeness}\noverall: [a]\n", "`mail` has 'politeness', need a list"),
        ("tasks: {mail: [a]}\n", "need exactly the keys"),
        ("tasks: {mail: [a]}\noverall: [a]\nmore: 1\n", "need exactly the keys"),
        ("tasks: {1: [a]}\noverall: [a]\n", "the name 1 of a task.*need text: write it in quotes"),
        ("tasks: {true: [a]}\noverall: [a]\n", "the name True of a task"),
        ("tasks: {null: [a]}\noverall: [a]\n", "the name None of a task"),
        ("tasks: {2024-01-01: [a]}\noverall: [a]\n", "the name datetime.date.* of a task"),
        ("tasks: {mail: [yes]}\noverall: [a]\n", "`mail` has .True., need a list .*in quotes"),
        ("tasks: {mail: [[a]]}\noverall: [a]\n", "`mail` has .*need a list"),
        ("tasks: {Mail: [a], mail!: [a]}\noverall: [a]\n", "the tasks 'Mail' and 'mail!'.*the folder 'mail'"),
        ("tasks: {'!!': [a]}\noverall: [a]\n", "the name '!!' of a task .*letters or digits"),
        ("tasks: {mail: [a, '?']}\noverall: [a]\n", "the name '.' of a task or a point.*letters or digits"),
        (f"tasks: {{{'m' * 300}: [a]}}\noverall: [a]\n", "no more than 120 bytes of them .300."),
        (f"tasks: {{mail: [{'很' * 50}]}}\noverall: [a]\n", "no more than 120 bytes of them .150."),
        ('tasks: {"ma\\x1bil": [a]}\noverall: [a]\n', "the name 'ma.x1bil' .*need printable"),
        ('tasks: {mail: ["\\u202eb"]}\noverall: [a]\n', "the name '.u202eb' .*need printable"),
        ("tasks: {mail: [a]}\ntasks: {chat: [a]}\noverall: [a]\n", "line 2.*'tasks' stands in line 1 already"),
        ("tasks: {mail: [a], mail: [b]}\noverall: [a]\n", "'mail' stands in line 1 already"),
        ("tasks: &a {mail: *a}\noverall: [a]\n", "broken YAML"),
        (
            "a: &a [x, x]\n"
            + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24)),
            "more than 100,000 values",
        ),
        ("- a\n", "got a list"),
        ("", "got an empty file"),
        ("tasks: " + "[" * 5000, "broken YAML"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(tmp_path, text, message):
    path = tmp_path / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        TaskTable.load(str(path))
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 1000


def test_the_points_of_tasks_may_be_written_once(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks: {mail: &points [wit, देवनागरी], chat: *points}\noverall: *points\n", encoding="utf-8-sig")
    points = ("wit", "देवनागरी")
    assert TaskTable.load(str(path)) == TaskTable({"mail": points, "chat": points}, points)


def test_a_source_that_is_no_table():
    with pytest.raises(FileNotFoundError, match="need 'paper', 'paper-zh' or the path"):
        TaskTable.load("papers")
    with pytest.raises(ValueError, match="got language 'fr', need one of"):
        TaskTable.load("paper-fr")


def test_slugs_name_modules():
    assert (
        slug("Empathy ability") == "empathy_ability" and slug("a.b / c") == "a_b_c" and slug("共情能力") == "共情能力"
    )


def test_every_public_name_is_there():
    assert all(getattr(dmoerm_trl, name) is not None for name in dmoerm_trl.__all__)
    assert set(dmoerm_trl.__all__) <= set(dir(dmoerm_trl))
    with pytest.raises(AttributeError, match="attribute Nothing"):
        dmoerm_trl.Nothing  # noqa: B018
