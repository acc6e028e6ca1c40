import pytest

from masklr.names import did_you_mean, matching

NAMES = ["norm", "blocks", "blocks.0", "blocks.0.attn", "blocks.0.attn.qkv", "blocks.1", "blocks.10", "head.fc+1"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["blocks.*"], ["blocks.0", "blocks.1", "blocks.10"]),
        (["blocks.**"], ["blocks.0", "blocks.0.attn", "blocks.0.attn.qkv", "blocks.1", "blocks.10"]),
        (["blocks.?"], ["blocks.0", "blocks.1"]),
        (["blocks.[01]"], ["blocks.0", "blocks.1"]),
        (["*.*.attn"], ["blocks.0.attn"]),
        (["**.qkv"], ["blocks.0.attn.qkv"]),
        (["*"], ["norm", "blocks"]),
        (["**"], NAMES),
        (["head.fc+1"], ["head.fc+1"]),
        (["blocks.1", "norm", "blocks.?"], ["norm", "blocks.0", "blocks.1"]),
        ([], []),
    ],
)
def test_patterns_match_whole_dotted_names_in_the_order_of_the_names(patterns, expected):
    assert matching(NAMES, patterns, "layers") == expected


def test_a_dot_stands_for_itself():
    with pytest.raises(ValueError, match="blocks0"):
        matching(["blocks0"], ["blocks.0"], "layers")


def test_every_pattern_must_match_and_the_error_names_argument_pattern_and_nearest():
    with pytest.raises(
        ValueError, match=r"Expected `layers` to match something, got 'blocks.0.atn'; did you mean blocks.0.attn"
    ):
        matching(NAMES, ["norm", "blocks.0.atn"], "layers")


def test_patterns_take_names_from_an_iterator_once():
    assert matching(iter(NAMES), iter(["norm", "blocks.1"]), "layers") == ["norm", "blocks.1"]


@pytest.mark.parametrize(
    ("name", "known", "end"),
    [
        ("depht", ["image", "depth"], "; did you mean depth?"),
        ("zzz", ["a", "b"], "; there are a, b."),
        ("zzz", list("abcdefghij"), "; there are a, b, c, d, e, f, g, h and 2 more."),
        ("zzz", [], "; there are none."),
    ],
)
def test_hint_names_the_nearest_or_what_there_is(name, known, end):
    assert did_you_mean(name, iter(known)) == end


def test_set_of_characters_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"Expected a pattern of names, got 'a\[\^\]' \(unterminated character set"):
        matching(["a"], ["a[^]"], "include")
