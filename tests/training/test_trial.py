import math
import warnings

import pytest
import torch
from torch import nn

import visattn
from visattn.data import cluttered_digits
from visattn.training import TrainingError, TrialSettings, parameter_groups, train

SETTINGS = TrialSettings(epochs=2, batch_size=20, lr=2e-3, seed=3)


@pytest.fixture(scope="module")
def data():
    return cluttered_digits(train=50, val=30)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 14 * 14, 10))


def numbers(history):
    return [(e.epoch, e.train_loss, e.train_score, e.val_loss, e.val_score) for e in history]


def test_a_trial_depends_on_its_arguments_alone(data):
    first, second = network(), network()
    one = train(first, data, SETTINGS)
    torch.randn(17)  # the global random state plays no part
    two = train(second, data, SETTINGS)
    assert numbers(one) == numbers(two)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = train(network(), data, TrialSettings(epochs=2, batch_size=20, lr=2e-3, seed=4))
    assert numbers(other) != numbers(one)


def test_the_random_state_of_the_caller_is_left_alone(data):
    net = network()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    train(net, data, SETTINGS)
    assert torch.equal(torch.randn(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_says_nothing_and_writes_nothing(data, capsys, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(network(), data, SETTINGS)
    printed = capsys.readouterr()
    assert (printed.out, printed.err, caplog.text) == ("", "", "")
    assert [str(w.message) for w in caught] == []
    assert list(tmp_path.iterdir()) == []


def test_epochs_are_counted_from_one_and_reported_as_they_end(data):
    seen, steps = [], []
    history = train(network(), data, SETTINGS, on_epoch=seen.append, on_batch=lambda *a: steps.append(a))
    assert seen == history
    assert [epoch.epoch for epoch in history] == [1, 2]
    assert steps == [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2)]  # 50 images are two full batches of 20
    assert all(0 <= epoch.val_score <= 1 and epoch.seconds > 0 for epoch in history)


def test_a_network_that_comes_in_eval_mode_is_trained_in_train_mode(data):
    net = network().eval()
    train(net, data, SETTINGS)
    assert net[1].num_batches_tracked == 4


def test_it_learns(data):
    history = train(network(), data, TrialSettings(epochs=8, batch_size=10, lr=2e-3, seed=0))
    assert history[-1].train_loss < history[0].train_loss


def test_a_loss_that_is_not_finite_ends_the_trial(data):
    net = network()
    with torch.no_grad():
        net[-1].bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is not finite in epoch 1"):
        train(net, data, SETTINGS)


def test_gates_learn_faster_and_vectors_do_not_decay():
    net = network()
    visattn.insert(net, "dual", at="0", sample=torch.randn(2, 1, 60, 60))
    groups = parameter_groups(net, lr=1e-3)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert {p.ndim > 1 for p in groups[0]["params"]} == {True}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert [group["weight_decay"] > 0 for group in groups] == [True, False, False]
    assert any(p is net[0].gate for p in groups[2]["params"])
    assert groups[2]["lr"] == pytest.approx(1e-2)


def test_gates_open(data):
    net = network()
    record = visattn.insert(net, "dual", at="0", sample=torch.randn(2, 1, 60, 60))
    train(net, data, SETTINGS)
    assert record.gates()["0"] != 0


def test_ctrl_c_reaches_the_caller(data):
    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), data, SETTINGS, on_batch=interrupt)


class Heads(nn.Module):
    """A network for pixels with two outputs in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.BatchNorm2d(8), nn.ReLU())
        self.main, self.side = nn.Conv2d(8, 11, 1), nn.Conv2d(8, 11, 1)

    def forward(self, x):
        body = self.body(x)
        main, side = (
            nn.functional.interpolate(head(body), scale_factor=2.0, mode="bilinear") for head in (self.main, self.side)
        )
        return (main, side) if self.training else main


@pytest.fixture(scope="module")
def masked():
    return cluttered_digits(train=50, val=30, task="segmentation")


def test_a_trial_on_masks_depends_on_its_arguments_alone(masked):
    first, second = Heads(), Heads()
    one = train(first, masked, SETTINGS)
    torch.randn(17)
    assert numbers(one) == numbers(train(second, masked, SETTINGS))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_trial_on_masks_measures_overlap(masked):
    last = train(Heads(), masked, SETTINGS)[-1]
    iou = [value for value in last.details["iou"] if not math.isnan(value)]
    assert len(last.details["iou"]) == 11
    assert last.val_score == pytest.approx(sum(iou) / len(iou))
    assert 0 < last.val_score < last.details["pixel_accuracy"] < 1


def test_outputs_beside_the_main_one_are_trained_too(masked):
    net = Heads()
    before = net.side.weight.clone()
    train(net, masked, SETTINGS)
    assert not torch.equal(net.side.weight, before)
