"""What a run is made of: its rate, its loss, its batch-norm statistics, its answers."""

import torch
from torch import nn

from bitbybit.training import TrainOptions, evaluate, reestimate_batch_norm
from bitbybit.training.loop import average_answer, distillation_loss, learning_rate_factor


def test_learning_rate_rises_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == 0.1
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.001


def test_distillation_vanishes_where_student_equals_teacher():
    logits, labels = torch.randn(6, 10), torch.arange(6)
    options = TrainOptions(model="digits_mlp", hash_config={}, distill=1.0)
    assert distillation_loss(logits, labels, logits, options).abs() < 1e-6  # float32 log-softmax
    assert distillation_loss(logits, labels, -logits, options) > 0.1


def test_average_answer_has_the_mean_of_the_softened_answers():
    logits = [3 * torch.randn(6, 10) for _ in range(3)]
    wanted = torch.stack([torch.softmax(one / 4, 1) for one in logits]).mean(0)
    torch.testing.assert_close(torch.softmax(average_answer(logits, 4.0) / 4, 1), wanted)
    assert average_answer(logits[:1], 4.0) is logits[0]


def test_batch_norm_reestimation_gives_the_statistics_of_the_images():
    model = nn.Sequential(nn.BatchNorm2d(3))
    images = torch.randn(64, 3, 4, 4) * 2 + 5
    reestimate_batch_norm(model, images, batch_size=16)
    # 1e-4: average of four batches' means, in float32
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert model[0].momentum == 0.1
    assert model.training


def test_batch_norm_reestimation_does_not_depend_on_the_images_being_sorted():
    model = nn.Sequential(nn.BatchNorm2d(3))
    images = torch.randn(256, 3, 4, 4) + torch.arange(4.0).repeat_interleave(64).view(-1, 1, 1, 1)
    reestimate_batch_norm(model, images, batch_size=64)
    # 10 %: batches of 64 differ a little in their share of each class; sorted, the variance would be 1 and not 2.25
    torch.testing.assert_close(model[0].running_var, images.var((0, 2, 3)), rtol=0.1, atol=0)


def test_evaluation_lets_no_gpu_round_the_factors_of_a_convolution(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(torch.backends.cudnn.allow_tf32)
            return x

    evaluate(Watched(), [(torch.eye(3), torch.arange(3))], torch.device("cpu"))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32  # as it was
