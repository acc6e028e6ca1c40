import pytest
import torch

from masklr.data import Mixing


def mixed(batch=400, seed=0, images=None, **options):
    generator = torch.Generator().manual_seed(seed)
    if images is None:
        images = torch.randn(batch, 2, 6, 8, generator=generator)
    return images, Mixing(**options)(images, torch.arange(len(images)), generator)


def test_mixup_is_a_weighted_mean_with_the_image_before():
    images, (found, labels, share) = mixed(cutmix=0.0)
    weight = share[:, None, None, None]
    torch.testing.assert_close(found, weight * images + (1 - weight) * images.roll(1, 0))
    assert torch.equal(labels, torch.arange(400).roll(1))
    assert 0 <= share.min() <= share.max() <= 1
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)), within 5 of their standard errors.
    deviation = (1 / (4 * 2.6)) ** 0.5
    assert abs(share.mean() - 0.5) < 5 * deviation / 20
    assert abs(share.var() - deviation**2) < 5 * 0.07 / 20


def test_cutmix_puts_one_box_of_the_other_image_in_and_counts_its_pixels():
    images, (found, _, share) = mixed(mixup=0.0)
    own, other = found == images, found == images.roll(1, 0)
    assert (own | other).all()
    inside = other.all(1) & ~own.all(1)
    assert torch.equal(other.all(1), other.any(1))
    torch.testing.assert_close(share, 1 - inside.float().mean((1, 2)))
    rows, columns = inside.any(2), inside.any(1)
    assert torch.equal(inside, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert (side.long().diff(dim=1).abs().sum(1) <= 2).all()
        assert ((side.long().diff(dim=1) == 1).sum(1) <= 1).all()
    assert len({tuple(box.flatten().tolist()) for box in inside}) > 100


def test_each_sample_has_one_of_both_or_none_with_the_probabilities_given():
    images, (found, _, share) = mixed(batch=3000, p=0.6)
    changed = (found != images).flatten(1)
    whole = changed.all(1) & (share > 0)
    untouched = ~changed.any(1)
    boxed = ~whole & ~untouched
    other = images.roll(1, 0)
    assert torch.equal(found[boxed] == images[boxed], ~(found[boxed] == other[boxed]))
    assert (share[untouched] == 1).all()
    error = (0.3 * 0.7 / 3000) ** 0.5
    assert abs(whole.float().mean() - 0.3) < 5 * error
    # Of boxes, some cover no pixel center or all.
    assert 0.2 < boxed.float().mean() < 0.3 + 5 * error


def test_draws_follow_the_generator_and_nothing_is_drawn_twice():
    images, first = mixed(seed=1)
    _, again = mixed(seed=1)
    _, other = mixed(seed=2, images=images)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.share, other.share)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    mixed(seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mixup": -0.1}, r"Expected `mixup` of 0 or more, got -0\.1"),
        ({"cutmix": -1.0}, r"Expected `cutmix` of 0 or more, got -1\.0"),
        ({"mixup": 0.0, "cutmix": 0.0}, "Expected `mixup` or `cutmix` above 0, got 0 for both"),
        ({"p": 1.5}, r"Expected `p` in \[0, 1\], got 1\.5"),
    ],
)
def test_bad_values_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mixing(**options)
