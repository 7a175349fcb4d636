import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

import visattn
from visattn.checkpoints import convert_file, load_checkpoint
from visattn.cli import main
from visattn.errors import UserError

NAMES = {"query_conv": "b", "key_conv": "c", "value_conv": "d"}


def position():
    """A state of position attention, and the same as changzy00 names it."""
    state = visattn.PositionAttention(8, reduction=1).state_dict()
    state["gamma"] += 0.5
    theirs = {
        "alpha": state["gamma"],
        **{f"{b}.{k}": state[f"{a}.{k}"] for a, b in NAMES.items() for k in ("weight", "bias")},
    }
    return state, theirs


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, *capsys.readouterr()


def test_a_published_file_becomes_one_with_our_names(tmp_path, capsys):
    state, theirs = position()
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"model": {f"module.{name}": tensor for name, tensor in theirs.items()}}, source)
    status, out, error = run(capsys, "convert", source, target)
    assert (status, error) == (0, "")
    assert out.startswith(
        "in.pth: PAM as of changzy00/pytorch-attention, under 'model', without the prefix 'module.'\n"
    )
    with safe_open(target, "pt") as file:
        assert {*file.keys()} == {*state}
        assert file.metadata()["visattn.source"] == "in.pth"
        assert file.metadata()["visattn.layout"].startswith("PAM as of changzy00/pytorch-attention")
    block = visattn.PositionAttention(8, reduction=1)
    record = load_checkpoint(block, target)
    assert record.layout.startswith("names as of visattn, converted from PAM as of changzy00/pytorch-attention")
    assert all(torch.equal(block.state_dict()[name], tensor) for name, tensor in state.items())
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.safetensors"]


def test_networks_and_what_they_drop(tmp_path):
    weight, source, target = torch.randn(4, 3, 1, 1), tmp_path / "in.pth", tmp_path / "out.safetensors"
    theirs = {"pretrained.conv1.0.weight": weight, "head.conv5a.0.weight": weight, "auxlayer.weight": weight}
    torch.save(theirs, source)  # the same memory twice, which safetensors does not write
    record = convert_file(source, target)
    assert record.dropped == ("auxlayer.weight",)
    with safe_open(target, "pt") as file:
        assert {*file.keys()} == {"backbone.conv1.0.weight", "head.conv5a.0.weight"}
    torch.save({**theirs, "dran.weight": weight}, source)
    message = (
        r"convert: the file \(DANet as of junfu1115/DANet\) has 1 tensors that this layout does not \(dran\.weight\)"
    )
    with pytest.raises(ValueError, match=message):
        convert_file(source, target)


def test_unknown_names_are_kept_and_a_second_conversion_says_the_same(tmp_path):
    net, target = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), tmp_path / "out.safetensors"
    net[0].weight.data = net[0].weight.data.t().contiguous().t()
    torch.save(net.state_dict(), tmp_path / "in.pth")
    first = convert_file(tmp_path / "in.pth", target)
    assert first.layout == "names of no published layout, kept"
    convert_file(target, target)
    again = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    load_checkpoint(again, target)
    assert torch.equal(again[0].weight, net[0].weight)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"visattn.layout": first.layout, "visattn.source": "in.pth"}


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_errors_are_one_line_and_leave_nothing_behind(tmp_path, capsys):
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"w": torch.ones(2), "x": Runs(f"touch {tmp_path / 'marker'}")}, source)
    cases = [
        ((source, target), f"convert: the pickle calls for {os.system.__module__}.system, and only tensors"),
        ((tmp_path / "none.pth", target), "convert: no such file, got file="),
        ((tmp_path, target), "convert: a checkpoint is a file, got file="),
        ((source, tmp_path / "out.pth"), "convert: the file to write must end in .safetensors, got "),
        ((source, tmp_path / "none" / "out.safetensors"), "no such folder: "),
    ]
    for arguments, message in cases:
        status, out, error = run(capsys, "convert", *arguments)
        assert (status, out, error.count("\n")) == (2, "", 1), message
        assert error.startswith(f"visattn: {message}")
    assert os.listdir(tmp_path) == ["in.pth"]
    (tmp_path / "folder.safetensors").mkdir()
    status, _, error = run(capsys, "convert", source, tmp_path / "folder.safetensors")
    assert (status, error.count("\n")) == (2, 1)
    assert "is a folder. Give the name of a file for OUT" in error


def test_an_older_file_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pth")
    target = tmp_path / "out.safetensors"
    target.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*out\.safetensors \(.*No space left on device\)"):
        convert_file(tmp_path / "in.pth", target)
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.safetensors"]


@pytest.mark.parametrize(
    ("name", "kind"), [("a", torch.complex128), ("a\udcff", torch.float32), ("__metadata__", torch.float32)]
)
def test_what_safetensors_does_not_take(tmp_path, name, kind, capsys):
    torch.save({name: torch.ones(2, dtype=kind)}, tmp_path / "a.pth")
    code, _, said = run(capsys, "convert", tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert code == 2
    assert said.startswith("visattn: cannot write")
    assert said.count("\n") == 1
    assert not (tmp_path / "b.safetensors").exists()
