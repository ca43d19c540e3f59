"""Tasks and their capability points: the paper's table 12, or a YAML file of one's own."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

OTHERS = "others"
"""The label of rows that belong to none of the tasks: no inner model is trained for them, the router sends them to one."""

OVERALL = "overall"
"""The name of the one task of DMoERM-w/o-Outer."""


@dataclass(frozen=True)
class TaskTable:
    """
    The tasks of the outer layer and the capability points of each inner model.

    Args:
        tasks (`dict[str, tuple[str, ...]]`):
            Task name -> names of its capability points, in the order of the experts.
        overall (`tuple[str, ...]`):
            The capability points of DMoERM-w/o-Outer, the one inner model for everything.
    """

    tasks: dict[str, tuple[str, ...]]
    overall: tuple[str, ...]

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("got no task, need at least one: list them under `tasks`.")
        for reserved in {OTHERS, OVERALL} & set(self.tasks):
            raise ValueError(f"got a task named {reserved!r}, which is reserved: rename it.")
        for task, points in {**self.tasks, OVERALL: self.overall}.items():
            slugs = [slug(point) for point in points]
            if not points or "" in slugs or len(set(slugs)) != len(slugs):
                raise ValueError(f"task {task!r}: got points {list(points)}, need at least one, all distinct words.")

    @classmethod
    def paper(cls, language: str = "en") -> "TaskTable":
        """The paper's table 12, in English (`"en"`) or Chinese (`"zh"`)."""
        if language not in _PAPER:
            raise ValueError(f"got language {language!r}, need one of {sorted(_PAPER)}.")
        return _PAPER[language]

    @classmethod
    def load(cls, source: str) -> "TaskTable":
        """
        Reads a table: `"paper"`, `"paper-zh"`, or the path of a YAML file with `tasks` (name -> list of points) and
        `overall` (list of points).
        """
        if source == "paper" or source.startswith("paper-"):
            return cls.paper(source.removeprefix("paper").removeprefix("-") or "en")
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"got tasks {source!r}, need 'paper', 'paper-zh' or the path of a YAML file.")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if (
            not isinstance(content, dict)
            or set(content) != {"tasks", "overall"}
            or not isinstance(content["tasks"], dict)
        ):
            raise ValueError(f"{path}: need exactly the keys `tasks` (name -> points) and `overall` (points).")
        for name, points in {**content["tasks"], OVERALL: content["overall"]}.items():
            if not isinstance(points, list) or not all(isinstance(point, str) for point in points):
                raise ValueError(f"{path}: `{name}` has {points!r}, need a list of capability points.")
        return cls({task: tuple(points) for task, points in content["tasks"].items()}, tuple(content["overall"]))


def slug(name: str) -> str:
    """`"empathy ability"` -> `"empathy_ability"`: the form in which a point names a module, an adapter or a folder."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


_PAPER = {
    "en": TaskTable(
        tasks={
            "text_creation": ("intent conformity", "expressiveness", "readability", "content richness", "logic"),
            "roleplay": (
                "personality and emotional investment",
                "conversational sense",
                "empathy ability",
                "manifestation of relationship traits",
                "personalized characteristic expression",
                "content richness",
            ),
            "objective_qa": (
                "correctness",
                "objectiveness",
                "reasoning ability",
                "logic",
                "depth of knowledge",
                "question specific",
            ),
            "subjective_qa": (
                "convincing ability",
                "logic",
                "viewpoint richness",
                "breadth of knowledge",
                "question specific",
            ),
            "chitchat": (
                "conversational sense",
                "proactivity",
                "emotion expression",
                "empathy ability",
                "content richness",
            ),
        },
        overall=("intent conformity", "logic", "conversational sense", "content richness", "readability"),
    ),
    "zh": TaskTable(
        tasks={
            "文本创作": ("意图符合程度", "表达能力", "可读性", "内容丰富性", "逻辑性"),
            "角色扮演": ("人设和情感带入", "对话感", "共情能力", "关系特点体现", "个性化特征体现", "内容丰富性"),
            "客观知识问答": ("正确性", "客观程度", "推理能力", "逻辑性", "知识面深度", "问题针对性"),
            "主观知识问答": ("说服力", "逻辑性", "观点丰富度", "知识面广度", "问题针对性"),
            "闲聊": ("对话感", "主动性", "情感表达", "共情能力", "内容丰富性"),
        },
        overall=("意图符合程度", "逻辑性", "对话感", "内容丰富性", "可读性"),
    ),
}
