"""Addresses: what is understood, and what is refused with which words."""

import numpy as np
import pytest
from tiny_models import CASES, build

from circuits.addresses import Address, parse_address
from circuits.errors import CircuitsError
from circuits.interventions import Bench, Change


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2_17_3", ("mlp_feature", 2, 17, 3, 4)),
        ("a2_153_7", ("attention_feature", 2, 153, 7, 8)),
        ("k1_5_4", ("mtc_key", 1, 5, 4, 5)),
        ("q1_5_9", ("mtc_query", 1, 5, 9, 10)),
        ("v0_3_2", ("value_feature", 0, 3, 2, 3)),
        ("2_17_3:8", ("mlp_feature", 2, 17, 3, 8)),
        ("2_17_5:", ("mlp_feature", 2, 17, 5, None)),
        ("2_17_:", ("mlp_feature", 2, 17, 0, None)),
        ("2_17_:4", ("mlp_feature", 2, 17, 0, 4)),
        ("2_error_7", ("mlp_error", 2, -1, 7, 8)),
        ("a2_error_7", ("attention_error", 2, -1, 7, 8)),
        ("v2_error_7", ("value_error", 2, -1, 7, 8)),
        ("r1_error_3", ("block_error", 1, -1, 3, 4)),
        ("E_17_3", ("embedding", -1, 17, 3, 4)),
    ],
)
def test_what_an_address_says(text: str, expected: tuple[str, int, int, int, int | None]) -> None:
    """Kind, layer, feature and positions."""
    found = parse_address(text)
    assert (found.kind, found.layer, found.feature, found.start, found.stop) == expected
    assert found.is_range == (":" in text)
    assert parse_address(text + "@mtc.1") == Address(text + "@mtc.1", *expected, 1, "mtc.1")


def test_an_id_that_comes_again() -> None:
    """`_2` at the end is the second node of this id."""
    assert parse_address("k2_3_4_2").nth == 2
    assert parse_address("k2_3_4_2").start == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2_17", "2 of three parts"),
        ("x2_17_3", "no feature of 'x'"),
        ("k2_error_3", "no error of 'k'"),
        ("ab_17_3", "'ab' is no layer"),
        ("2_seventeen_3", "'seventeen' is neither"),
        ("E_x_3", "'x' is no token id"),
        ("2_17_three", "'three' is no position"),
        ("2_17_5:5", "is empty"),
        ("2_17_5:3", "is empty"),
    ],
)
def test_what_is_no_address(text: str, words: str) -> None:
    """The message names the part, and shows the grammar."""
    with pytest.raises(CircuitsError, match=words) as refused:
        parse_address(text)
    assert "LAYER_FEATURE_POSITION" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3_1_2", "no layer 3; the model has layers 0 to 2"),
        ("a1_1_2", "no dictionary of layer 1 has nodes of kind attention_feature; there are clt.1, mtc.1"),
        ("k1_12_2", "mtc.1 has features 0 to 11, not 12"),
        ("k1_1_2@clt.1", "no dictionary named 'clt.1'"),
        ("k1_1_6", "no position 6; the prompt has positions 0 to 5"),
        ("k1_1_2:9", "no position 8"),
        ("k1_1_0", "special first token has no feature"),
        ("1_error_0", "special first token has no feature"),
        ("E_5_2", "no token 5 at these positions"),
        ("r1_error_2", "no error of this kind"),
    ],
)
def test_addresses_without_a_place(text: str, words: str) -> None:
    """What this model, its replacements or this prompt do not have."""
    bench = Bench(build(CASES["gpt2_mtc"]), CASES["gpt2_mtc"].token_ids)
    with pytest.raises(CircuitsError, match=words):
        bench.run([[Change(text, "ablate")]])


def test_two_dictionaries_with_one_id() -> None:
    """The graph counts the active ones: without a number the first active one, `@NAME` says it outright."""
    bench = Bench(build(CASES["gpt2_mtc_ranks"]), CASES["gpt2_mtc_ranks"].token_ids)
    table, names = bench.table, [dictionary.name for dictionary in bench.linear.dictionaries]
    second = int(np.flatnonzero(table.dictionary == names.index("mtc-second.2"))[0])
    assert table.kind[second] == "mtc_key"
    plain = f"k2_{table.feature[second]}_{table.position[second]}"
    assert int(table.feature[second]) >= 12
    found = [bench.planner.find(parse_address(text))[0] for text in (plain, plain + "@mtc-second.2")]
    assert [names[index] for index in found] == ["mtc-second.2"] * 2
    with pytest.raises(CircuitsError, match="only 1 dictionar"):
        bench.planner.find(parse_address(plain + "_3"))
