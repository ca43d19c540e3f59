"""Files that appear whole or not at all."""

import json
import os
import stat

import pytest
from matplotlib.figure import Figure

from dmoerm_trl.files import check_writable, partial_path, read_json, save_figure, write_json, write_text, writing


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "scores.jsonl"
    with writing(path) as file:
        file.write("幽默\n")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "幽默\n"
    assert os.listdir(path.parent) == ["scores.jsonl"]


def test_an_error_leaves_what_stood_there_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "before")
    with pytest.raises(KeyError), writing(tmp_path / "a") as file:
        file.write("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_run_left_half_written_is_written_anew(tmp_path):
    partial_path(tmp_path / "a").write_text("a long half of what a killed run wrote")
    write_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert os.listdir(tmp_path) == ["a"]


def test_links_at_either_name_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for link in (tmp_path / "a", partial_path(tmp_path / "a")):
        link.symlink_to(tmp_path / "precious")
    check_writable(tmp_path / "a")
    partial_path(tmp_path / "a").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "a", "whole")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a").read_text() == "whole" and not (tmp_path / "a").is_symlink()


def test_a_private_file_is_its_owners(tmp_path):
    write_text(tmp_path / "a", "secret", private=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_bytes(tmp_path):
    with writing(tmp_path / "a", binary=True) as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"


def test_two_writers_of_one_file_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="another process"), writing(tmp_path / "a") as file:
        file.write("first")
        write_text(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "second"


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "a")
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(ValueError, match="cannot be written .it is a folder."):
        check_writable(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable(tmp_path / "file" / "a")


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"幽默": [1.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"幽默": [1.5, None]}
    with pytest.raises(ValueError, match=r"a\.json: got a number that is NaN or infinite"):
        write_json(tmp_path / "a.json", {"mean": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"幽默": [1.5, None]}


@pytest.mark.parametrize(("name", "starts"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a", b"\x89PNG")])
def test_a_figure_is_written_in_the_format_of_its_name(tmp_path, name, starts):
    save_figure(Figure(), tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(starts)
    assert os.listdir(tmp_path / "new") == [name]


def test_an_input_is_not_written_over_by_whatever_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("precious")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    check_writable(tmp_path / "scores.jsonl", inputs=[tmp_path / "rows.jsonl", None, "paper", "some/hub-name"])
    for path in (tmp_path / "rows.jsonl", tmp_path / "." / "rows.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(ValueError, match="got an output file that is an input too, need another one"):
            check_writable(path, inputs=["paper", tmp_path / "rows.jsonl"])
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable("")
    assert (tmp_path / "rows.jsonl").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"a": '])
def test_json_that_cannot_be_read_names_its_file_and_the_way_out(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: got a file that is not JSON .*: write it anew\."):
        read_json(tmp_path / "a.json", "write it anew")
