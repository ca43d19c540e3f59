"""Run `dmoerm export`."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from ..data.formatting import Formatter
from ..modeling.assembly import inner_model
from ..modeling.card import write_model_card
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.load_errors import loading
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..scoring.export import export_adapter, export_reward_model, logit_shift
from ..tasks import slug

if TYPE_CHECKING:
    from ..scripts.export import ExportArguments


def export(arguments: "ExportArguments") -> None:
    """
    Write a part of a DMoERM to a folder, and print what was written.

    Raises:
        ValueError: If the folder is not free, or the model does not have the part.
    """
    folder = Path(arguments.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder}: got a file, or a folder that is not empty, need a new or empty folder: name another."
        )
    if arguments.point is not None and arguments.what != "experts":
        raise ValueError(f"got --point and --what {arguments.what}, need --what experts with it: change one of them.")
    with loading(arguments.model, "a DMoERM", DMoERMConfig.model_type):
        model = DMoERMForSequenceClassification.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tasks = list(model.config.tasks)
    if arguments.task not in (tasks if len(tasks) > 1 else [None, *tasks]):
        raise ValueError(f"got --task {arguments.task}, need one of {tasks}: name the task to export.")
    task = arguments.task or tasks[0]
    points = model.config.tasks[task]
    if arguments.what == "experts" and not points:
        raise ValueError(f"{arguments.model}: got a model without experts, need a DMoERM: export its reward_model.")
    if arguments.point is not None and arguments.point not in points:
        raise ValueError(f"got --point {arguments.point!r}, need one of {list(points)}, those of the task {task!r}.")
    if arguments.pad_token is not None:
        if arguments.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"got --pad_token {arguments.pad_token!r}, need a token that the tokenizer has.")
        tokenizer.pad_token = arguments.pad_token
    if arguments.what == "inner_model":
        part = inner_model(model, task)
        part.save_pretrained(folder)
        Formatter.for_model(model.config, tokenizer, 1).tokenizer.save_pretrained(folder)
        write_model_card(part, folder)
        print(f"inner model of {task}: {folder}")
        return
    export_reward_model(model, task, folder, tokenizer)
    print(f"reward model of {task}: {folder}; its logit leaves out the bias {logit_shift(model, task):+.4f}")
    chosen = points if arguments.point is None else [arguments.point]
    for point in chosen if arguments.what == "experts" else []:
        export_adapter(model, task, point, folder / slug(point), base=folder)
        print(f"expert in {point}: {folder / slug(point)}; bias {logit_shift(model, task, point):+.4f}")
