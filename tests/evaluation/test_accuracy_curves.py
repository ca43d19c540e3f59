"""The accuracy curves: one panel a stage with the logged numbers, one legend, nothing empty, no global state."""

import builtins
import sys

import pytest

pytest.importorskip("matplotlib")

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402

from dmoerm_trl.evaluation.accuracy_curves import plot_accuracy_curves  # noqa: E402

HISTORY = [
    {"step": 5, "loss": 0.7, "accuracy": 0.5, "epoch": 0.1},
    {"step": 10, "loss": 0.6, "accuracy": 0.7, "epoch": 0.2},
    {"step": 10, "eval_loss": 0.65, "eval_accuracy": 0.6, "epoch": 0.2},
    {"step": 10, "train_runtime": 3.0},
]


@pytest.fixture
def figures(monkeypatch):
    """The figures saved during the test."""
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: saved.append(self) or savefig(self, *args, **kw))
    return saved


@pytest.mark.parametrize("stages", [1, 5, 37])
def test_one_panel_a_stage(stages, tmp_path, figures):
    histories = {f"roleplay: manifestation of relationship traits {index}": HISTORY for index in range(stages)}
    path = plot_accuracy_curves(histories, tmp_path / "new" / "curves.png")
    assert imread(path).std() > 0
    (figure,) = figures
    assert len(figure.axes) == stages and len(figure.legends) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "validation"]
    assert [axes.get_title().replace("\n", " ") for axes in figure.axes] == list(histories)
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


def test_the_curves_hold_the_logged_numbers(tmp_path, figures):
    plot_accuracy_curves({"roleplay phase 1": HISTORY}, tmp_path / "curves.png")
    curves = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert curves["train"] == [[5, 0.5], [10, 0.7]]
    assert curves["validation"] == [[10, 0.6]]


def test_stages_without_accuracy_are_named_not_drawn(tmp_path, figures):
    histories = {"roleplay phase 1": HISTORY, "chitchat phase 1": HISTORY[-1:], "chitchat phase 3": []}
    plot_accuracy_curves(histories, tmp_path / "curves.png")
    assert len(figures[0].axes) == 1
    assert figures[0].get_supxlabel() == "steps\nno accuracy logged: chitchat\nphase 1, chitchat phase 3"
    with pytest.raises(ValueError, match="got no log with `accuracy` or `eval_accuracy` in 2 stages"):
        plot_accuracy_curves({"a": [], "b": HISTORY[-1:]}, tmp_path / "none.png")


def test_the_caller_s_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_accuracy_curves({"roleplay phase 1": HISTORY}, tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_accuracy_curves({"roleplay phase 1": HISTORY}, tmp_path / "curves.png")
