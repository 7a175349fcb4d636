import subprocess
import sys

import pytest

import visattn
from visattn.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code, *capsys.readouterr()


def test_list_names_every_block(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert all(name in out for name in visattn.list_blocks())
    status, out, _ = run(capsys, "list", "--role", "convolution")
    assert "selective_kernel" in out
    assert "dual" not in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["list", "--role", "gate"], "visattn: list_blocks: role must be one of attention, convolution, tokens, part"),
        (["lost"], "visattn: No such command 'lost'."),
        (["compare", "--epochs", "abc"], "visattn: Invalid value for '--epochs': "),
        (["compare", "--nonsense"], "visattn: No such option: --nonsense. See visattn --help."),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, arguments, line):
    status, out, error = run(capsys, *arguments)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(line)


def test_no_arguments_is_help(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert "compare" in out


@pytest.mark.parametrize(
    ("missing", "arguments"), [("typer", ["list"]), ("rich", ["list"]), ("timm", ["compare"]), ("numpy", ["verify"])]
)
def test_a_missing_extra_is_named(missing, arguments):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom visattn.cli import main\nmain({arguments!r})"
        if missing != "numpy"
        else f"import sys, torch; sys.modules['numpy'] = None\nfrom visattn.cli import main\nmain({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"needs {missing}, which is not installed. Install it with: pip install 'visattn[compare]'" in done.stderr
    assert "Traceback" not in done.stderr
