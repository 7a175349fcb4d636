import pytest
import torch
from torch.nn import functional

from visattn.tasks import CLASSIFICATION, SEGMENTATION, main_output, task_named


def test_loss_is_the_cross_entropy_of_what_is_not_ignored():
    logits, truth = torch.randn(2, 5, 3, 7), torch.randint(0, 5, (2, 3, 7))
    truth[0, :2] = 255
    expected = functional.cross_entropy(logits, truth, ignore_index=255)
    assert torch.allclose(SEGMENTATION.loss(logits, truth), expected)
    assert SEGMENTATION.counted(truth).item() == 42 - 14
    names = torch.randint(0, 5, (2,))
    assert torch.allclose(
        CLASSIFICATION.loss(logits[..., 0, 0], names), functional.cross_entropy(logits[..., 0, 0], names)
    )


def test_class_255_of_images_is_a_class_like_any_other():
    assert CLASSIFICATION.counted(torch.tensor([255, 3])).item() == 2


def test_losses_of_several_outputs_are_summed_and_the_first_answers():
    outputs, truth = tuple(torch.randn(3, 2, 4, 3, 3)), torch.randint(0, 4, (2, 3, 3))
    expected = sum(functional.cross_entropy(one, truth) for one in outputs)
    assert torch.allclose(SEGMENTATION.loss(outputs, truth), expected)
    assert main_output(outputs) is outputs[0]
    assert main_output(outputs[1]) is outputs[1]


def test_a_batch_without_a_known_pixel_costs_nothing():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = SEGMENTATION.loss(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_loss_of_low_precision_is_taken_in_float32():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    assert SEGMENTATION.loss(logits, torch.zeros(2, 4, 4, dtype=torch.int64)).dtype == torch.float32


def test_an_unknown_task():
    assert task_named("segmentation") is SEGMENTATION
    with pytest.raises(ValueError, match=r"task must be one of classification, segmentation, got 'segment'\. Did you"):
        task_named("segment")


def test_the_score_at_the_head_of_a_text():
    assert (CLASSIFICATION.heading, SEGMENTATION.heading) == ("Top-1", "mIoU")
