"""A training over several processes, and one that is stopped and goes on."""

import pickle
from itertools import chain

import pytest
import torch
from torch import nn

from visattn.data import cluttered_digits
from visattn.errors import UserError
from visattn.training import TrialSettings, train
from visattn.training.history import as_json, epochs_table
from visattn.training.launch import Launch, read_checkpoint
from visattn.training.trial import Epoch, _Batches, parameter_groups

SETTINGS = TrialSettings(epochs=3, batch_size=20, lr=2e-3, seed=3)


@pytest.fixture(scope="module")
def data():
    return cluttered_digits(train=50, val=30)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 14 * 14, 10))


def stop(epoch, step, steps):
    if (epoch, step) == (2, 2):
        raise KeyboardInterrupt


def test_a_stopped_training_goes_on_as_if_it_had_not_been_stopped(data, tmp_path):
    whole, stopped, again = network(), network(), network()
    expected = train(whole, data, SETTINGS)
    launch = Launch(checkpoint=tmp_path / "last.ckpt")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, SETTINGS, launch=launch, on_batch=stop)
    assert len(read_checkpoint(tmp_path / "last.ckpt")["history"]) == 1
    seen = []
    history = train(again, data, SETTINGS, launch=launch, on_epoch=seen.append)
    assert [epoch.epoch for epoch in seen] == [2, 3]
    assert [e.val_loss for e in history] == [e.val_loss for e in expected]
    assert [e.train_loss for e in history] == [e.train_loss for e in expected]
    pairs = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("count", "batch", "ranks"), [(23, 6, 2), (25, 6, 2), (25, 6, 3), (5, 6, 2)])
def test_processes_share_every_batch(data, count, batch, ranks):
    class Numbers:
        def __len__(self):
            return count

        def batch(self, indices, **where):
            return indices

        targets = batch

    settings = TrialSettings(epochs=1, batch_size=batch, lr=1e-3, seed=1)
    for training in (True, False):
        options = {"epoch": 2, "training": training}
        whole = [images.tolist() for images, _ in _Batches(Numbers(), settings, **options)]
        shares = [
            [images.tolist() for images, _ in _Batches(Numbers(), settings, **options, rank=rank, ranks=ranks)]
            for rank in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1  # as many steps for all: they wait for each other
        assert all(part for share in shares for part in share)
        together = [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]
        if not training:
            assert sorted(chain(*together)) == list(range(count))
        elif count >= batch:
            assert together == [sorted(chunk) for chunk in whole]
        if training:
            assert len({len(part) for share in shares for part in share}) == 1


def test_groups_are_told_by_the_whole_shapes_where_parameters_are_pieces():
    net = network()
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    pieces = nn.ModuleDict({"_fsdp_wrapped_module": network()})
    for parameter in pieces.parameters():
        parameter.data = parameter.data.flatten()[:3]
    expected, found = parameter_groups(net, 1e-3), parameter_groups(pieces, 1e-3, shapes)
    assert [len(group["params"]) for group in found] == [len(group["params"]) for group in expected]


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_checkpoint_with_more_than_tensors_is_refused_and_executes_nothing(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "history": [], "epoch": Hostile()}, path)
    with pytest.raises(UserError, match=r"last\.ckpt holds more than tensors and plain values, or is cut short\. Rem"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        read_checkpoint(path)


def test_a_checkpoint_that_is_none(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.ones(3)}, path)
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"is no checkpoint of visattn train\. Remove it to start from the beginning\."):
        read_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is no whole checkpoint: "):
        read_checkpoint(path)


def test_epochs_as_files_hold_them():
    epoch = Epoch(1, 0.5, 0.25, 0.75, 0.5, 2.0, {"pixel_accuracy": 0.9, "iou": [0.5, float("nan")]})
    assert epochs_table([epoch]).splitlines() == [
        "epoch,train_loss,train_score,val_loss,val_score,seconds,pixel_accuracy",
        "1,0.5,0.25,0.75,0.5,2.0,0.9",
    ]
    assert as_json(epoch.details) == {"pixel_accuracy": 0.9, "iou": [0.5, None]}


def test_a_checkpoint_that_cannot_be_written_is_named(data, tmp_path):
    file = tmp_path / "last.ckpt"
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt \(Is a directory\)"):
        train(
            network(), data, SETTINGS, launch=Launch(checkpoint=file), on_batch=lambda *step: file.mkdir(exist_ok=True)
        )
