import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from masklr.neighbors import neighbor_classes


def clouds(n=120, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centers = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    return centers[labels] + torch.randn(n, 6, generator=generator), labels


@pytest.mark.parametrize("k", [1, 5, 20])
def test_classes_are_those_of_scikit_learn_with_the_same_weights(k):
    (known, labels), (samples, _) = clouds(), clouds(seed=1)
    theirs = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: torch.tensor((1 - distance) / 0.07).exp().numpy(),
    ).fit(known.double().numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.predict(samples.double().numpy()))
    assert torch.equal(neighbor_classes(samples, known, labels, k), expected)


def test_weights_decide_where_counts_would_not():
    known, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    near_the_first = torch.tensor([[3.0, 1.0]])
    assert neighbor_classes(near_the_first, known, labels, 3).item() == 0
    assert neighbor_classes(near_the_first, known, labels, 3, temperature=10.0).item() == 1


def test_scale_of_features_does_not_matter_and_a_small_temperature_does_not_overflow():
    (known, labels), (samples, _) = clouds(), clouds(seed=1)
    scale = torch.linspace(0.1, 50, len(known))[:, None]
    found = neighbor_classes(samples, known, labels)
    assert torch.equal(neighbor_classes(samples * 7, known * scale, labels), found)
    nearest = neighbor_classes(samples, known, labels, num_neighbors=1)
    assert torch.equal(neighbor_classes(samples, known, labels, temperature=1e-4), nearest)


def test_all_vote_where_there_are_fewer_than_asked_for():
    known, labels = clouds(5)
    assert torch.equal(neighbor_classes(known, known, labels, 50), neighbor_classes(known, known, labels, 5))


def test_bad_values_raise():
    known, labels = clouds(5)
    for options, sentence in (
        ({"num_neighbors": 0}, "`num_neighbors` of at least 1"),
        ({"temperature": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            neighbor_classes(known, known, labels, **options)
    with pytest.raises(ValueError, match="Expected `known` samples, got none"):
        neighbor_classes(known, known[:0], labels[:0])
