"""How records are compared with answers: against loops in float64, and each rule of the verdict by
itself.
"""

import math
from dataclasses import replace

import pytest
import torch

from models.agreement import Agreement, compare
from models.distill import encode

CLASSES, K = 12, 4


def logits(batch: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, CLASSES, generator=torch.Generator().manual_seed(seed)) * 2


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def dense(indices: list[int], probs: list[float]) -> list[float]:
    rest = max(0.0, 1 - sum(probs)) / (CLASSES - K)
    return [
        dict(zip(indices, probs)).get(index, rest) / max(1.0, sum(probs))
        for index in range(CLASSES)
    ]


def test_equal_answers_differ_in_nothing():
    found = compare(*encode(logits(), K, 2.0), logits(), 2.0)
    for difference in (found.value_error, found.divergence, found.other_classes, found.inexact):
        assert not difference.any()
    assert found.top1.tolist() == logits().argmax(1).tolist() == found.stored_top1.tolist()


def test_differences_are_those_of_a_loop():
    indices, probs = encode(logits(), K)
    found = compare(indices, probs, logits(seed=1))
    for row in range(5):
        now = softmax(logits(seed=1)[row].tolist())
        order = sorted(range(CLASSES), key=lambda index: -now[index])[:K]
        names, values = indices[row].tolist(), probs[row].double().tolist()
        at_named = max(abs(now[index] - value) for index, value in zip(names, values))
        unnamed = max(
            [now[index] - values[-1] for index in order if index not in names], default=0.0
        )
        assert found.value_error[row].item() == pytest.approx(max(at_named, unnamed), abs=5e-4)
        stored, answer = dense(names, values), dense(order, [now[index] for index in order])
        divergence = sum(p * math.log(p / q) - p + q for p, q in zip(stored, answer))
        assert found.divergence[row].item() == pytest.approx(divergence, rel=5e-3)
        other = [a != b and abs(now[a] - now[b]) > 1e-3 for a, b in zip(names, order)]
        assert found.other_classes[row] == sum(other)
        assert found.other_top1[row] == other[0]
        assert found.inexact[row]


def test_classes_that_are_almost_equal_may_change_places():
    answer = torch.tensor([[4.0, 4.0005, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    indices, probs = encode(answer, K)
    assert indices[0, :2].tolist() == [1, 0]
    found = compare(indices[:, [1, 0, 2, 3]], probs, answer)
    assert not found.other_top1.any() and not found.other_classes.any() and found.inexact.all()
    apart = answer + torch.tensor([0.0, 0.01] + [0.0] * 10)
    assert compare(indices[:, [1, 0, 2, 3]], probs, apart).other_classes.tolist() == [2]


def test_a_class_that_a_record_does_not_name_counts_too():
    """The teacher is sure of class 3 now; the record knows of two others, whose probabilities
    hardly changed.
    """
    stored = torch.tensor([[0.004, 0.003]]).half()
    answer = torch.log(torch.tensor([[0.004, 0.003, 0.0, 0.9] + [0.093 / 8] * 8]).clamp(min=1e-9))
    assert compare(torch.tensor([[0, 1]]), stored, answer).value_error.item() == pytest.approx(
        0.9 - 0.003, abs=1e-3
    )


def judged(images: int = 2000, **found: float) -> list[str]:
    return Agreement(images=images, **found).faults()


@pytest.mark.parametrize(
    ("within", "beyond", "fault"),
    [
        ({"wrong_seeds": 0}, {"wrong_seeds": 1}, "1 of 2,000 seeds are wrong"),
        (
            {"other_top1": 2},
            {"other_top1": 3},
            "only 99.850% have the same top-1 class, at least 99.9% must",
        ),
        (
            {"sum_divergence": 0.19},
            {"sum_divergence": 0.21},
            "the mean KL divergence is 1.05e-04, at most 1e-04 is allowed",
        ),
        (
            {"sum_divergence": 0.19},
            {"sum_divergence": math.nan},
            "the mean KL divergence is nan, at most 1e-04 is allowed",
        ),
        (
            {"most_value_error": 0.0049},
            {"most_value_error": 0.0051},
            "a probability is off by 0.0051, at most 0.005 is allowed",
        ),
    ],
)
def test_the_verdict(within, beyond, fault):
    assert judged(**within) == [] and judged(**beyond) == [fault]
    assert judged(images=0) == ["no image was checked"]


def test_parts_add_up():
    """Two batches counted one after the other, and merged from two processes."""
    records = encode(logits(8), K)
    answers, seeds = logits(8, seed=1), torch.tensor([False] * 7 + [True])
    whole, first, second = Agreement(), Agreement(), Agreement()
    for part, rows in ((first, slice(0, 3)), (second, slice(3, 8))):
        found = compare(records[0][rows], records[1][rows], answers[rows])
        for agreement in (whole, part):
            agreement.add(found, seeds[rows], lambda row, low=rows.start: f"{low + row}")
    first.merge(second)
    assert first.worst == whole.worst and first.sum_divergence == pytest.approx(
        whole.sum_divergence
    )
    assert replace(first, sum_divergence=0) == replace(whole, sum_divergence=0)
    assert (whole.images, whole.wrong_seeds, whole.inexact, len(whole.worst)) == (8, 1, 8, 5)
    assert whole.worst[0][0] >= whole.worst[-1][0] > 0
    assert any("wrong seed" in text for _, text in whole.worst)
    inexact = Agreement(images=8, inexact=3)
    assert inexact.faults() == []
    assert inexact.faults(exact=True) == ["3 of 8 records are not exactly equal"]


def test_an_empty_batch_changes_nothing():
    agreement = Agreement()
    agreement.add(
        compare(*encode(logits()[:0], K), logits()[:0]), torch.empty(0, dtype=torch.bool), str
    )
    assert agreement == Agreement()
