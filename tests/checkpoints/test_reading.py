import argparse
import functools
import os
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import visattn
from visattn.checkpoints.reading import read
from visattn.errors import UserError

OLD = {"_use_new_zipfile_serialization": False}
FORMATS = {
    "zip": torch.save,
    "old": lambda value, file: torch.save(value, file, **OLD),
    "pickle": lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2)),
}


class Runs:
    """Runs a function when it is unpickled without care."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(marker):
    command = f"touch '{marker}'"
    runs = Runs(os.system, command)
    return {
        "alone": runs,
        "in a state dict": {"state_dict": OrderedDict(w=torch.ones(2), x=runs)},
        "deep": {"state_dict": {"w": torch.ones(2)}, "meta": {"a": [1, {"b": (runs,)}]}},
        "as a key": {runs: 1, "w": torch.ones(2)},
        "eval": {"w": torch.ones(2), "x": Runs(eval, f"open({str(marker)!r}, 'w').close()")},
        "mkdir": Runs(os.mkdir, str(marker)),
        "partial": Runs(functools.partial(os.system, command)),
        "getattr": Runs(getattr, torch.nn.Module, "forward"),
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", hostile(""))
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, case, form):
    marker, file = tmp_path / "marker", tmp_path / "file.pth"
    FORMATS[form](hostile(marker)[case], file)
    net = visattn.ChannelAttention(8)
    with pytest.raises(ValueError, match=r"load_checkpoint: the pickle calls for [\w.]+, .*nothing was run") as caught:
        visattn.load_checkpoint(net, file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert net.gamma == 0
    if case not in ("getattr", "as a key"):  # the file does what it is here for when it is read without care
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            (pickle.loads(file.read_bytes()) if form == "pickle" else torch.load(file, weights_only=False))
        assert marker.exists()


def test_what_is_refused_is_named_with_what_to_do(tmp_path):
    file = tmp_path / "file.pth"
    torch.save({"w": Runs(os.system, "true")}, file)
    with pytest.raises(ValueError, match=r"calls for posix\.system.*That can run commands: do not open the file"):
        read(file)
    torch.save({"state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, file)
    remedy = r'torch\.save\(torch\.load\(file, weights_only=False\)\["state_dict"\], "tensors\.pt"\)'
    with pytest.raises(ValueError, match=rf"calls for argparse\.Namespace.*Where you trust the file.*{remedy}"):
        read(file)
    torch.save({"w": np.ones(2)}, file)
    with pytest.raises(ValueError, match=r"calls for numpy\.\w+\.multiarray\._reconstruct"):
        read(file)
    torch.save({"w": torch.ones(2), "x": Runs(os.system, "true")}, file, pickle_protocol=4)
    with pytest.raises(ValueError, match="a form that is not read safely; nothing was run"):
        read(file)


@pytest.mark.parametrize("options", [{}, OLD])
def test_plain_values_beside_the_tensors_do_no_harm(tmp_path, options):
    file = tmp_path / "file.pth"
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    around = {
        "epoch": 3,
        "arch": "danet",
        "best_pred": np.float64(0.5),
        "best_acc1": torch.tensor(0.5),
        "flags": [True, None, (1.5, "a"), {2, 3}],
        "counted": Counter(a=1),
        "optimizer": optimizer.state_dict(),
        "meta": {"CLASSES": ("a", "b"), "PALETTE": [[0, 0, 0]], "score": np.float32(1), "step": np.int64(7)},
    }
    torch.save({**around, "state_dict": OrderedDict(w=weight)}, file, **options)
    content = read(file)
    assert list(content.tensors) == ["w"]
    assert torch.equal(content.tensors["w"], weight)
    assert content.within == "state_dict"


STATE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("value", "within"),
    [
        (STATE, ""),
        ({"state_dict": STATE}, "state_dict"),
        ({"model": STATE, "epoch": 1}, "model"),
        ({"net": STATE, "step": 1}, "net"),
        ({"checkpoint": {"model": {"state_dict": STATE}}}, None),
        ({"model": {"state_dict": STATE}}, "model.state_dict"),
        ({"state_dict": STATE, "state_dict_ema": {"w": torch.zeros(2)}}, "state_dict"),
        ({"generator": STATE, "epoch": 1}, "generator"),
    ],
)
def test_what_is_around_a_state_dict(tmp_path, value, within):
    file = tmp_path / "file.pth"
    torch.save(value, file)
    if within is None:
        with pytest.raises(ValueError, match="holds no state dict of tensors, only checkpoint, got file="):
            read(file)
    else:
        content = read(file)
        assert content.within == within
        assert torch.equal(content.tensors["w"], STATE["w"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "no state dict of tensors, only dict"),
        ([torch.ones(2)], "no state dict of tensors, only list"),
        (torch.ones(2), "no state dict of tensors, only Tensor"),
        ({"epoch": 3, "note": "none"}, "no state dict of tensors, only epoch, note"),
        ({0: torch.ones(2)}, "no state dict of tensors, only 0"),
        ({"a": STATE, "b": STATE}, r"holds several state dicts \(a, b\), got file=.* Save one alone"),
        ({"w": torch.ones(1).expand(1000, 1000, 1000)}, "tensor 'w' is not one that the file holds as a whole"),
        ({"w": torch.ones(2).to_sparse()}, "tensor 'w' is not one that the file holds as a whole"),
        ({"w": torch.ones(2, device="meta")}, "tensor 'w' is not one that the file holds as a whole"),
    ],
)
def test_a_checkpoint_without_tensors_of_its_own(tmp_path, value, message):
    file = tmp_path / "file.pth"
    torch.save(value, file)
    with pytest.raises(ValueError, match=message):
        read(file)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.98])
def test_a_file_that_is_cut_off(tmp_path, form, share):
    file, state = tmp_path / "file", {"weight": torch.randn(40, 30), "bias": torch.randn(40)}
    (save_file if form == "safetensors" else FORMATS[form])(state, file)
    assert list(read(file).tensors) == list(state) or form == "safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError, match=r"the file is cut off or damaged \(.+\), got file=.* Download or copy it again"
    ):
        read(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty, got file="),
        (b"<!DOCTYPE html><html></html>", r"neither a safetensors file nor one that torch\.save wrote.*web page"),
        (b"hello", r"neither a safetensors file nor one that torch\.save wrote, got file='[^']*'\.$"),
        (b"\x80", r"neither a safetensors file nor one that torch\.save wrote"),
        (b"\x80\x02", "cut off or damaged"),
        (bytes(range(128, 256)), r"neither a safetensors file nor one that torch\.save wrote"),
        (b"PK\x03\x04 and no more", "cut off or damaged"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}              ", "the file holds no tensors"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "cut off or damaged"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(file)


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load_checkpoint: no such file, got file='.*none\.pth'"):
        visattn.load_checkpoint(visattn.ChannelAttention(8), tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"load_checkpoint: a checkpoint is a file, got file='.*', a folder"):
        visattn.load_checkpoint(visattn.ChannelAttention(8), str(tmp_path))
    pipe = tmp_path / "loop"
    pipe.symlink_to(pipe)
    with pytest.raises(ValueError, match="the file cannot be read"):
        read(pipe)


@pytest.mark.parametrize(
    ("entries", "compression", "message"),
    [
        ({"a/readme.txt": b"hello"}, zipfile.ZIP_STORED, r"a zip archive that torch\.save did not write"),
        ({"a/data.pkl": b"\x80\x02}."}, zipfile.ZIP_STORED, "cut off or damaged"),
        ({"a/data.pkl": b"", "a/constants.pkl": b""}, zipfile.ZIP_STORED, "a TorchScript archive is a program"),
        ({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(10**6)}, zipfile.ZIP_DEFLATED, "may be made to fill memory"),
    ],
)
def test_zip_archives_of_another_kind(tmp_path, entries, compression, message):
    file = tmp_path / "file.pth"
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=message):
        read(file)


def test_safetensors(tmp_path):
    file = tmp_path / "file.safetensors"
    save_file(STATE, file, {"a": "b"})
    content = read(file)
    assert torch.equal(content.tensors["w"], STATE["w"])
    assert content.metadata == {"a": "b"}


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "file.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        UserError, match=r"reading a safetensors file needs safetensors, which is not installed\. Install"
    ):
        read(tmp_path / "file.safetensors")


def test_tensors_that_share_memory_many_times_over(tmp_path):
    memory = torch.zeros(10_000)
    torch.save({f"a{i}": memory.view(100, 100) for i in range(100)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="the tensors share memory, and without would take 32 times the file or more"):
        read(tmp_path / "a.pth")
