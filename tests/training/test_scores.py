import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from visattn.tasks import CLASSIFICATION, SEGMENTATION
from visattn.training.scores import scores


def logits_of(classes, count):
    return torch.nn.functional.one_hot(classes, count).movedim(-1, 1).float()


def test_overlap_equals_what_is_counted_by_hand():
    truth = torch.tensor([[[0, 0, 1, 1], [2, 2, 255, 255]]])
    said = torch.tensor([[[0, 1, 1, 1], [2, 0, 3, 2]]])  # of 5 classes; 4 occurs nowhere, 3 where truth is ignored
    overlap = scores(SEGMENTATION, 5)
    overlap.update(logits_of(said, 5), truth)
    found = overlap.compute()
    # class 0: 1 of 0, 0, and a 2 taken for 0; class 1: 2 of 1, 1, and a 0 taken for 1; class 2: 1 of 2, 2
    assert found["iou"][:3].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2])
    assert found["iou"][3:].isnan().all()
    assert found["score"].item() == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert found["pixel_accuracy"].item() == pytest.approx(4 / 6)


def test_a_class_that_is_only_predicted_counts_as_missed():
    overlap = scores(SEGMENTATION, 3)
    overlap.update(logits_of(torch.tensor([[[0, 2]]]), 3), torch.tensor([[[0, 0]]]))
    assert overlap.compute()["score"].item() == pytest.approx((1 / 2 + 0) / 2)


def test_batches_add_up_and_a_reset_forgets():
    truth, said = torch.randint(0, 4, (6, 5, 7)), torch.randint(0, 4, (6, 5, 7))
    whole, parts = scores(SEGMENTATION, 4), scores(SEGMENTATION, 4)
    parts.update(logits_of(said[:1], 4), said[:1])
    parts.reset()
    whole.update(logits_of(said, 4), truth)
    for some in ([0, 1], [2, 3, 4, 5]):
        parts.update(logits_of(said[some], 4), truth[some])
    assert torch.equal(whole.compute()["iou"], parts.compute()["iou"])


@pytest.mark.parametrize("deterministic", [False, True])
def test_overlap_equals_torchmetrics(deterministic):
    truth, logits = torch.randint(0, 5, (3, 11, 7)), torch.randn(3, 6, 11, 7)
    truth[torch.rand(truth.shape) < 0.2] = 255
    overlap = scores(SEGMENTATION, 6)
    theirs = MulticlassJaccardIndex(6, ignore_index=255, average="macro")
    accuracy = MulticlassAccuracy(6, ignore_index=255, average="micro")
    torch.use_deterministic_algorithms(deterministic)
    try:
        overlap.update(logits, truth)
    finally:
        torch.use_deterministic_algorithms(False)
    assert overlap.compute()["score"].item() == pytest.approx(theirs(logits, truth).item())
    assert overlap.compute()["pixel_accuracy"].item() == pytest.approx(accuracy(logits, truth).item())


def test_nothing_but_ignored_pixels_is_no_number():
    overlap = scores(SEGMENTATION, 2)
    overlap.update(torch.zeros(1, 2, 3, 3), torch.full((1, 3, 3), 255))
    assert overlap.compute()["score"].isnan()


def test_top_1_of_classification():
    top1 = scores(CLASSIFICATION, 3)
    top1.update(torch.eye(3), torch.tensor([0, 1, 1]))
    assert top1.compute()["score"].item() == pytest.approx(2 / 3)
    assert list(top1.compute()) == ["score"]
