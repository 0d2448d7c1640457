"""cli.py: flags and their errors, files that are there whole or not at all, JSON and tables."""

import argparse
import errno
import json
import os

import pytest
import torch

import cli
from conftest import assert_refused

# ---- errors --------------------------------------------------------------------------------------


def script_that_raises(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("--scale 0 is too small"), "--scale 0 is too small"),
        (ValueError("several\n  lines\tin one"), "several lines in one"),
        (FileNotFoundError(2, "No such file", "x/y"), "x/y: No such file"),
        (OSError("the disk\nis full"), "the disk is full"),
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(command, error, line):
    ended = command(script_that_raises(error))
    assert ended == (2, "", f"test_cli.py: error: {line}\n")


def test_an_interrupt_ends_with_130(command):
    assert command(script_that_raises(KeyboardInterrupt())) == (130, "", "")


def test_after_an_interrupt_a_script_may_say_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py"])
    with pytest.raises(SystemExit, match="130"):
        cli.run(script_that_raises(KeyboardInterrupt()), after_interrupt="stopped")
    assert capsys.readouterr().err == "demo.py: stopped\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError(), KeyError("x")])
def test_a_bug_keeps_its_traceback(command, error):
    with pytest.raises(type(error)):
        command(script_that_raises(error))


def test_a_script_that_ends_well_says_nothing(command):
    def main() -> None:
        print("done")

    assert command(main) == (0, "done\n", "")


def test_first_line():
    assert cli.first_line(ValueError("\none\ntwo")) == "one"
    assert cli.first_line(ValueError()) == "ValueError"


def test_an_extra_is_imported_or_its_command_is_told():
    assert cli.import_extra("os.path", "test", "x") is os.path
    with pytest.raises(ValueError) as caught:
        cli.import_extra("no_such_library.part", "parquet", "a.parquet")
    assert str(caught.value) == (
        'a.parquet needs the library no_such_library: pip install -e ".[parquet]"'
    )


# ---- flags ---------------------------------------------------------------------------------------


def script() -> None:
    """Says hello.

    At length.
    """
    parser = cli.Parser(script.__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--plain", help="has no default")
    parser.add_argument("--steps", type=cli.at_least(1), default=7, help="steps")
    parser.add_argument("--decay", type=cli.at_least(0.0), default=0.5, help="decay")
    parser.add_argument("--share", type=cli.fraction, default=1.0, help="share")
    parser.add_argument("--whether", action="store_true", help="a switch")
    parser.add_argument("--json", type=cli.file_name(".json"), help="the results")
    parser.add_argument("--plot", type=cli.file_name(*cli.PICTURES), help="the picture")
    parser.add_argument("--windows", nargs="+", action=cli.WholeNumbers, const=2, help="windows")
    print(json.dumps(vars(parser.parse_args()), default=str))


def flags(ended) -> dict:
    """The flags that `script` printed."""
    assert ended.code == 0, ended.error
    return json.loads(ended.out)


def test_help_shows_the_first_paragraph_and_each_default(command):
    ended = command(script, "--help")
    text = " ".join(ended.out.split())
    assert ended.code == 0
    assert "Says hello." in text
    assert "At length" not in text
    for shown in ("steps (default: 7)", "decay (default: 0.5)", "share (default: 1.0)"):
        assert shown in text
    assert "the seed of everything random (default: 0)" in text  # a zero is a default as any other
    # No default is shown where the help text describes it, or where there is none
    assert "has no default (" not in text
    assert "a switch (" not in text


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], {"steps": 7, "decay": 0.5, "share": 1.0, "windows": None, "json": None, "seed": 0}),
        (["--steps", "1", "--decay", "0", "--share", "0.25"], {"steps": 1, "decay": 0.0}),
        (["--decay", "1e-3", "--seed", "12345678901234567890"], {"seed": 12345678901234567890}),
        (["--scale", "2.5", "--rope", "yarn"], {"scale": 2.5, "rope": "yarn"}),
        (["--windows", "256,512"], {"windows": [256, 512]}),
        (["--windows", "256", "512"], {"windows": [256, 512]}),
        (["--windows", "512,256,", "256", "2"], {"windows": [2, 256, 512]}),
        (["--windows", "512, 256"], {"windows": [256, 512]}),
    ],
)
def test_flags_are_read(command, arguments, expected):
    assert expected.items() <= flags(command(script, *arguments)).items()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--steps", "0"], "argument --steps: must be a whole number of at least 1, got 0"),
        (["--steps", "-3"], "argument --steps: must be a whole number of at least 1, got -3"),
        (["--steps", "1.5"], "argument --steps: must be a whole number of at least 1, got 1.5"),
        (["--steps", "many"], "argument --steps: must be a whole number of at least 1, got many"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, got -1"),
        (["--original_window", "0"], "argument --original_window: must be a whole number"),
        (["--decay", "-0.1"], "argument --decay: must be a number of at least 0, got -0.1"),
        (["--decay", "nan"], "argument --decay: must be a number of at least 0, got nan"),
        (["--decay", "inf"], "argument --decay: must be a number of at least 0, got inf"),
        (["--decay", "1e999"], "argument --decay: must be a number"),
        (["--share", "0"], "argument --share: must be above 0 and at most 1, got 0"),
        (["--share", "1.01"], "argument --share: must be above 0 and at most 1, got 1.01"),
        (["--share", "nan"], "argument --share: must be above 0 and at most 1, got nan"),
        (["--share", "half"], "argument --share: must be above 0 and at most 1, got half"),
        (["--windows", "1"], "--windows takes whole numbers of at least 2, got '1'"),
        (["--windows", "256,1.5"], "--windows takes whole numbers of at least 2, got '1.5'"),
        (["--windows", "256", "many"], "--windows takes whole numbers of at least 2, got 'many'"),
        (["--windows", "-4"], "--windows"),
        (["--windows"], "--windows"),
        (["--json", "results.txt"], "argument --json: results.txt must end in .json"),
        (["--plot", "p.gif"], "argument --plot: p.gif must end in .png or .svg or .pdf"),
        (["--scale", "two"], "argument --scale: invalid float value: 'two'"),
        (["--dtype", "int3"], "argument --dtype"),
        (["--step", "3"], "unrecognized arguments: --step"),  # no abbreviations
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--scal", "2"], "unrecognized arguments: --scal 2; did you mean --scale?"),
    ],
)
def test_wrong_flags_are_refused(command, arguments, says):
    assert_refused(command(script, *arguments), "test_cli.py", says)


def test_a_file_name_is_one_that_can_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "old.json").write_text("")
    for name in ("new.json", "old.json", "new/folders/a.JSON"):
        path = str(tmp_path / name)
        assert flags(command(script, "--json", path))["json"] == path
    for name in ("folder.json", "file/a.json", "file/new/a.json"):
        path = tmp_path / name
        says = f"argument --json: {path} can't be written: give a file in a folder that can"
        assert_refused(command(script, "--json", path), "test_cli.py", says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json", "old.json"]


def test_data_is_there_or_on_the_hub(tmp_path):
    book = tmp_path / "katrine.txt"
    book.write_text("Text.")
    for given in (str(book), str(tmp_path), "hf:owner/name,split=test"):
        assert cli.data_path(given) == given
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        cli.data_path(str(tmp_path / "catrine.txt"))
    says = f"{tmp_path}/catrine.txt: no such file or folder, and a data set of the hub begins with "
    assert str(refused.value) == f"{says}hf:; near it: {book}"
    for given in (str(tmp_path / "else"), "owner/name", str(book / "under")):
        with pytest.raises(argparse.ArgumentTypeError, match="begins with hf:$"):
            cli.data_path(given)


def test_whole_numbers_outside_the_command_line():
    assert cli.parse_whole_numbers("10,2,,10, 3", "--save_at", 0) == [2, 3, 10]
    with pytest.raises(ValueError, match="--save_at takes whole numbers"):
        cli.parse_whole_numbers(" , ", "--save_at", 0)
    with pytest.raises(ValueError, match="^--save_at takes whole numbers of at least 1, got '0'$"):
        cli.parse_whole_numbers("5,0", "--save_at", 1)


def test_the_extension_is_what_the_flags_say():
    parser = argparse.ArgumentParser()
    cli.add_extension_flags(parser)
    args = parser.parse_args(["--scale", "4", "--original_window", "256"])
    assert cli.extension(args) == {"scale": 4.0, "rope": None, "original_window": 256}


# ---- device and dtype ----------------------------------------------------------------------------


def test_the_dtype_is_float32_on_a_cpu_and_as_asked():
    cpu = torch.device("cpu")
    assert cli.device_and_dtype("cpu") == (cpu, torch.float32)
    assert cli.device_and_dtype("cpu", "bfloat16") == (cpu, torch.bfloat16)
    assert cli.device_and_dtype("cpu", "float32") == (cpu, torch.float32)


def test_auto_is_a_gpu_where_there_is_one():
    device, dtype = cli.device_and_dtype("auto")
    if torch.cuda.is_available():
        assert device.type == "cuda"
    elif torch.backends.mps.is_available():
        assert device.type == "mps"
    else:
        assert (device.type, dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("name", ["toaster", "cuda:77", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError) as caught:
        cli.device_and_dtype(name)
    message = str(caught.value)
    assert message.startswith(f"--device {name} can't be used here: ")
    assert "\n" not in message


# ---- files ---------------------------------------------------------------------------------------


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_if_the_block_succeeds(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with cli.replacing(str(path)) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent  # else a rename could cross to another disk
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError("full")])
def test_a_file_stays_as_it_was_if_the_block_fails(tmp_path, error):
    old = tmp_path / "old.txt"
    old.write_text("old")
    for path in (old, tmp_path / "new.txt"):
        with pytest.raises(type(error)):
            with cli.replacing(path) as temporary:
                temporary.write_text("half of i")
                raise error
    assert names(tmp_path) == ["old.txt"]
    assert old.read_text() == "old"


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    def write(path, files: int, fail: bool = False) -> None:
        with cli.replacing(path) as temporary:
            temporary.mkdir()
            for i in range(files):
                (temporary / f"{i}.txt").write_text(str(i))
            if fail:
                raise ValueError("half of it is written")

    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match="half"):
        write(folder, files=1, fail=True)
    assert names(tmp_path) == []
    write(folder, files=2)
    assert names(folder) == ["0.txt", "1.txt"]

    # A folder that has files in it is not replaced
    with pytest.raises(OSError, match="folder"):
        write(folder, files=3)
    assert names(folder) == ["0.txt", "1.txt"]
    assert names(tmp_path) == ["folder"]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught:
        with cli.replacing(tmp_path / "a.txt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.txt")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        cli.write_json(tmp_path / "file" / "a.json", {})
    assert names(tmp_path) == ["file"]


def test_json_is_written_and_read(tmp_path):
    path = tmp_path / "a.json"
    value = {"é": [1, 2.5, None], "b": {}}
    cli.write_json(path, value)
    assert cli.read_json(path) == value
    assert path.read_text() == cli.json_text(value)
    assert path.read_text() == json.dumps(value, indent=2) + "\n"
    with pytest.raises(TypeError):
        cli.write_json(path, {"x": object()})
    assert cli.read_json(path) == value
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"3", "holds a int, not a JSON object"),
        (b"null", "holds a NoneType, not a JSON object"),
    ],
)
def test_a_file_that_holds_no_json_object_is_refused(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        cli.read_json(path)
    assert str(caught.value).startswith(f"{path} {says}")
    assert "\n" not in str(caught.value)


# ---- text for people -----------------------------------------------------------------------------


def test_a_table_sets_words_left_and_numbers_right():
    rows = [
        ["out/base", "none", 1, "12.5 ± 0.3", "-"],
        ["x", "linear", 16, "7.25 ± 0.1", "90%"],
    ]
    assert cli.text_table(["checkpoint", "rope", "scale", 256, "found"], rows).split("\n") == [
        "checkpoint  rope    scale         256  found",
        "----------  ------  -----  ----------  -----",
        "out/base    none        1  12.5 ± 0.3      -",
        "x           linear     16  7.25 ± 0.1    90%",
    ]


def test_a_table_has_no_spaces_at_the_end_of_its_lines():
    assert cli.text_table(["k", "name"], [[1, "a"]]) == "k  name\n-  ----\n1  a"
    assert cli.text_table(["k", "name"], []) == "k  name\n-  ----"


def test_bytes_are_formatted():
    assert cli.format_bytes(0) == "0.0 MB"
    assert cli.format_bytes(1_250_000) == "1.2 MB"
    assert cli.format_bytes(99.9e6) == "99.9 MB"
    assert cli.format_bytes(1e8) == "0.1 GB"
    assert cli.format_bytes(13.5e12) == "13,500.0 GB"
