"""The sparse losses against naive loops in float64, and the encoding against a stable sort."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from models.distill import (
    DistillLoss,
    densify,
    encode,
    label_cross_entropy,
    sparse_soft_cross_entropy,
)


def naive_softmax(row):
    shifted = [math.exp(value - max(row)) for value in row]
    return [value / sum(shifted) for value in shifted]


def naive_target(indices, probs, num_classes):
    """A dense target row by row, as docs and format say it, in Python floats."""
    rows = []
    for row_indices, row_probs in zip(indices.tolist(), probs.double().tolist()):
        total = sum(row_probs)
        others = num_classes - len(row_probs)
        row = [max(0.0, 1 - total) / others if others > 0 else 0.0] * num_classes
        for index, prob in zip(row_indices, row_probs):
            row[index] = prob / max(1.0, total)
        rows.append(row)
    return rows


def naive_cross_entropy(logits, target_rows):
    """Mean of -sum t log softmax, and its gradient, in Python floats."""
    loss, gradient = 0.0, []
    for row, target in zip(logits.double().tolist(), target_rows):
        log_sum = max(row) + math.log(sum(math.exp(value - max(row)) for value in row))
        loss += sum(t * (log_sum - value) for t, value in zip(target, row))
        gradient.append(
            [(sum(target) * p - t) / len(target_rows) for p, t in zip(naive_softmax(row), target)]
        )
    return loss / len(target_rows), gradient


def naive_entropy(target_rows):
    """Mean of -sum t log t, in Python floats."""
    terms = [[t * math.log(t) for t in row if t > 0] for row in target_rows]
    return -sum(map(sum, terms)) / len(target_rows)


def record(batch, k, num_classes, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return encode(torch.randn(batch, num_classes, generator=generator) * spread, k)


def student(batch, num_classes, scale=1.0, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, num_classes, generator=generator) * scale).to(dtype).requires_grad_()


def both(loss_function, logits):
    loss = loss_function(logits)
    return loss.item(), torch.autograd.grad(loss, logits)[0].double().numpy()


@pytest.mark.parametrize(
    ("num_classes", "k"), [(7, 1), (7, 3), (7, 6), (7, 7), (1000, 10), (2, 1), (1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_loss_and_gradient_equal_the_naive_ones(num_classes, k, dtype):
    indices, probs = record(4, k, num_classes)
    logits = student(4, num_classes, 2.0, dtype)
    loss, gradient = both(lambda z: sparse_soft_cross_entropy(z, indices, probs), logits)
    expected, expected_gradient = naive_cross_entropy(
        logits, naive_target(indices, probs, num_classes)
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss == pytest.approx(expected, rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=tolerance)


def test_gradient_passes_the_numerical_check():
    indices, probs = record(3, 4, 9)
    logits = student(3, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: sparse_soft_cross_entropy(z, indices, probs), logits)
    targets = densify(*record(3, 4, 9, seed=5), 9).double()
    assert torch.autograd.gradcheck(
        lambda z: DistillLoss(0.3, 2.5)(z, indices, probs, targets)["loss"], logits
    )


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_stay_exact(scale):
    indices, probs = record(4, 10, 1000)
    logits = student(4, 1000, scale)
    loss, gradient = both(lambda z: sparse_soft_cross_entropy(z, indices, probs), logits)
    expected, expected_gradient = naive_cross_entropy(logits, naive_target(indices, probs, 1000))
    assert loss == pytest.approx(expected, rel=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-6)


def test_a_common_offset_of_the_logits_costs_no_precision():
    indices, probs = record(4, 10, 100)
    # multiples of 1/64 survive the offset exactly
    logits = student(4, 100).detach().mul(64).round() / 64
    assert (
        sparse_soft_cross_entropy(logits + 8192, indices, probs).item()
        == sparse_soft_cross_entropy(logits, indices, probs).item()
    )


def test_sums_above_one_are_rescaled():
    indices = torch.tensor([[2, 0], [1, 3]])
    probs = torch.tensor([[0.8, 0.201], [0.6, 0.41]], dtype=torch.float16)
    assert (probs.float().sum(-1) > 1).all()
    assert densify(indices, probs, 5).sum(-1).tolist() == pytest.approx([1, 1], abs=1e-6)
    logits = student(2, 5)
    expected, _ = naive_cross_entropy(logits, naive_target(indices, probs, 5))
    assert sparse_soft_cross_entropy(logits, indices, probs).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_or_the_excess_is_taken_from_the_other_classes():
    """As the original does: its targets are negative there."""
    indices, probs = (
        torch.tensor([[2, 0], [1, 3]]),
        torch.tensor([[0.8, 0.201], [0.5, 0.41]], dtype=torch.float16),
    )
    stored = probs.double().numpy()
    targets = np.repeat((1 - stored.sum(1, keepdims=True)) / 3, 5, axis=1)
    np.put_along_axis(targets, indices.numpy(), stored, axis=1)
    assert targets[0].min() < 0 < targets[1].min()
    np.testing.assert_allclose(
        densify(indices, probs, 5, subtract=True).numpy(), targets, rtol=1e-6, atol=1e-7
    )
    logits = student(2, 5, dtype=torch.float64)
    expected, expected_gradient = naive_cross_entropy(logits, targets.tolist())
    parts = DistillLoss(subtract=True)(logits, indices, probs)
    # A negative target has no entropy.
    entropy = -np.log(targets, where=targets > 0, out=np.zeros_like(targets))
    entropy = (targets * entropy).sum(1).mean()
    assert parts["kl"].item() == pytest.approx(expected - entropy, rel=1e-6)
    for loss_of in (
        partial(sparse_soft_cross_entropy, indices=indices, probs=probs, subtract=True),
        lambda z: DistillLoss(subtract=True)(z, indices, probs)["loss"],
    ):
        loss, gradient = both(loss_of, logits)
        assert loss == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-12)
    no_other = densify(torch.tensor([[1, 0]]), torch.tensor([[0.8, 0.4]]), 2, subtract=True)
    assert no_other.sum().item() == pytest.approx(1)


def test_all_classes_stored_leaves_no_rest():
    indices, probs = torch.tensor([[1, 0, 2]]), torch.tensor([[0.5, 0.25, 0.125]])
    assert densify(indices, probs, 3).tolist() == [[0.25, 0.5, 0.125]]
    logits = student(1, 3)
    expected, _ = naive_cross_entropy(logits, [[0.25, 0.5, 0.125]])
    assert sparse_soft_cross_entropy(logits, indices, probs).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(("num_classes", "k"), [(7, 3), (7, 7), (50, 1)])
def test_densify_equals_the_naive_target(num_classes, k):
    indices, probs = record(5, k, num_classes)
    dense = densify(indices, probs, num_classes)
    assert dense.dtype == torch.float32
    np.testing.assert_allclose(
        dense.numpy(), naive_target(indices, probs, num_classes), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("index_type", [torch.int64, torch.int32, torch.uint16])
def test_stored_index_types_are_accepted(index_type):
    indices, probs = record(4, 3, 20)
    logits = student(4, 20)
    stored = (
        torch.from_numpy(indices.numpy().astype("uint16"))
        if index_type == torch.uint16
        else indices.to(index_type)
    )
    assert (
        sparse_soft_cross_entropy(logits, stored, probs).item()
        == sparse_soft_cross_entropy(logits, indices, probs).item()
    )
    assert torch.equal(densify(stored, probs, 20), densify(indices, probs, 20))


def test_autocast_and_low_precision_students_get_float32_losses():
    indices, probs = record(4, 10, 1000)
    logits = student(4, 1000, 5.0, torch.bfloat16)
    plain = sparse_soft_cross_entropy(logits.float(), indices, probs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sparse_soft_cross_entropy(logits, indices, probs)
    assert loss.dtype == torch.float32
    assert loss.item() == plain.item()


@pytest.mark.parametrize(("num_classes", "k"), [(10, 10), (1000, 10), (21841, 100)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_encode_equals_a_float64_softmax_and_a_stable_sort(num_classes, k, temperature):
    logits = torch.randn(3, num_classes, generator=torch.Generator().manual_seed(0)) * 4
    indices, probs = encode(logits, k, temperature)
    assert (
        indices.dtype == torch.int64
        and probs.dtype == torch.float16
        and indices.shape == probs.shape == (3, k)
    )
    exact = torch.softmax(logits.double() / temperature, -1)
    assert torch.equal(indices, torch.sort(logits, stable=True, descending=True).indices[:, :k])
    np.testing.assert_allclose(
        probs.double().numpy(), exact.gather(1, indices).numpy(), rtol=2**-11, atol=2**-25
    )


def test_ties_are_ordered_by_class():
    logits = torch.tensor(
        [[0.0, 2.0, 0.0, 2.0, 0.0, 0.0], [-500.0, 0.0, -400.0, -600.0, -500.0, 0.0]]
    )
    # beyond 104 below the top all are 0 in float32
    assert encode(logits, 5)[0].tolist() == [[1, 3, 0, 2, 4], [1, 5, 0, 2, 3]]
    many = torch.randint(0, 4, (8, 3000), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(
        encode(many, 1200)[0], torch.sort(many, stable=True, descending=True).indices[:, :1200]
    )


def test_encode_takes_half_logits_and_more_classes_than_there_are():
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).half()
    indices, probs = encode(logits, 10)
    assert indices.shape == (2, 6)
    assert torch.equal(probs, encode(logits.float(), 6)[1])


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (5, 0.0), (5, -1.0)])
def test_encode_refuses(k, temperature):
    with pytest.raises(
        ValueError, match=f"k = {k}, temperature = {temperature}: at least one class"
    ):
        encode(torch.zeros(1, 9), k, temperature)


def test_label_loss_is_the_mean_over_labelled_images():
    logits = student(4, 5)
    targets = torch.zeros(4, 5)
    targets[0, 2], targets[2] = 1, torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1])
    expected, _ = naive_cross_entropy(logits[[0, 2]], targets[[0, 2]].double().tolist())
    assert label_cross_entropy(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    loss, gradient = both(lambda z: label_cross_entropy(z, torch.zeros(4, 5)), logits)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.7, 1.0), (0.5, 3.0), (0.0, 2.0)])
def test_mixed_loss_equals_the_naive_one(alpha, temperature):
    indices, probs = record(4, 3, 11)
    targets = densify(*record(4, 2, 11, seed=9), 11)
    logits = student(4, 11, 2.0)
    parts = DistillLoss(alpha, temperature)(logits, indices, probs, targets)
    loss, gradient = both(lambda _: parts["loss"], logits)
    soft, soft_gradient = naive_cross_entropy(
        logits.double() / temperature, naive_target(indices, probs, 11)
    )
    label, label_gradient = naive_cross_entropy(logits, targets.double().tolist())
    assert loss == pytest.approx((1 - alpha) * label + alpha * temperature**2 * soft, rel=1e-6)
    expected = (1 - alpha) * np.array(label_gradient) + alpha * temperature * np.array(
        soft_gradient
    )
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-6)
    # Apart, whatever weighs them; the teacher's without what no student can change.
    if alpha < 1:
        assert parts["label_loss"].item() == pytest.approx(label, rel=1e-6)
    entropy = naive_entropy(naive_target(indices, probs, 11))
    assert parts["kl"].item() == pytest.approx(temperature**2 * (soft - entropy), rel=1e-5)


@pytest.mark.parametrize(("num_classes", "k"), [(7, 1), (7, 7), (1000, 10), (1, 1)])
def test_a_student_that_answers_as_the_record_says_has_no_divergence(num_classes, k):
    indices, probs = record(4, k, num_classes)
    target = densify(indices, probs, num_classes).double()
    parts = DistillLoss()(target.clamp(min=1e-300).log(), indices, probs)
    assert set(parts) == {"loss", "kl"}  # without labels
    assert parts["kl"].item() == pytest.approx(0, abs=2e-3 if k == num_classes else 1e-7)
    entropy = naive_entropy(naive_target(indices, probs, num_classes))
    assert parts["loss"].item() == pytest.approx(entropy, abs=2e-3)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_two_heads_learn_each_its_own(hard, temperature):
    indices, probs = record(4, 3, 11)
    targets = densify(*record(4, 2, 11, seed=9), 11)
    heads = student(4, 11, 2.0), student(4, 11, 2.0, seed=2)
    parts = DistillLoss(0.3, temperature, hard, two_heads=True)(heads, indices, probs, targets)
    label, label_gradient = naive_cross_entropy(heads[0], targets.double().tolist())
    wanted, scale = naive_target(indices, probs, 11), temperature
    if hard:
        wanted = torch.nn.functional.one_hot(indices[:, 0], 11).tolist()
        scale = 1.0
    theirs, their_gradient = naive_cross_entropy(heads[1].double() / scale, wanted)
    assert parts["label_loss"].item() == pytest.approx(label, rel=1e-6)
    divergence = theirs - naive_entropy(wanted)
    assert parts["kl"].item() == pytest.approx(scale**2 * divergence, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(0.7 * label + 0.3 * scale**2 * theirs, rel=1e-6)
    gradients = torch.autograd.grad(parts["loss"], heads)
    expected = 0.7 * np.array(label_gradient), 0.3 * scale * np.array(their_gradient)
    for found, gradient in zip(gradients, expected):
        np.testing.assert_allclose(found.double().numpy(), gradient, rtol=0, atol=2e-6)


def test_two_heads_are_two_tensors():
    answers = torch.zeros(2, 5), (torch.zeros(2, 5),), (torch.zeros(2, 5),) * 3
    for answer in answers:
        with pytest.raises(ValueError, match=r"DISTILL.TWO_HEADS: .* does with a (Tensor|tuple)"):
            DistillLoss(0.5, two_heads=True)(answer, *record(2, 3, 5), torch.zeros(2, 5))


def test_hard_targets_are_the_stored_top_class():
    indices, probs = record(4, 3, 11)
    logits = student(4, 11, 2.0)
    one_hot = torch.nn.functional.one_hot(indices[:, 0], 11)
    hard, _ = naive_cross_entropy(logits, one_hot.double().tolist())
    alone = DistillLoss(temperature=4.0, hard=True)(logits, indices, probs)
    assert alone["loss"].item() == alone["kl"].item() == pytest.approx(hard, rel=1e-6)
    targets = densify(*record(4, 2, 11, seed=9), 11)
    label, _ = naive_cross_entropy(logits, targets.double().tolist())
    mixed = DistillLoss(alpha=0.25, hard=True)(logits, indices, probs, targets)
    assert mixed["loss"].item() == pytest.approx(0.75 * label + 0.25 * hard, rel=1e-6)


def test_alpha_below_one_needs_labels():
    with pytest.raises(ValueError, match=r"DISTILL.ALPHA 0.5 asks for labels.*set DISTILL.ALPHA 1"):
        DistillLoss(alpha=0.5)(student(2, 5), *record(2, 3, 5))


def test_a_model_that_answers_with_a_tuple_cannot_learn():
    answer, indices = (torch.zeros(2, 5),), torch.zeros(2, 1).long()
    losses = [lambda: label_cross_entropy(answer, torch.zeros(2, 5))]
    losses += [lambda hard=h: DistillLoss(hard=hard)(answer, indices, indices) for h in (0, 1)]
    for loss in losses:
        with pytest.raises(ValueError, match="the model answers with a tuple: one tensor is need"):
            loss()
