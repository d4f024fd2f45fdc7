"""Recommendations by a checkpoint with item tokens: what it is shown, what it knows, and what nobody gets twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_lm import READINGS, item_lm
from tiny_shop import CATEGORY, CHOICES, ITEMS, TITLES, USERS, check_list, check_many, write_shop

from lwa_helpers import BaseRecommender, load_teacher
from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.errors import LwaError
from lwa_helpers.ranking import item_head

OWN = [6, 3, 7, 0, 5, 2, 4]  # items of a model in its own order: all but the lipstick


@pytest.fixture
def root(tmp_path):
    return write_shop(tmp_path)


def saved(folder, own=OWN, reading="items", titles=TITLES, **options):
    """A checkpoint with a token for each of the shop's items `own`."""
    lm = item_lm(
        reading, titles=[titles[i] for i in own], ids=[ITEMS[i] for i in own], prompt=prompt_for(CATEGORY), **options
    )
    lm.save(folder)
    return lm


def logits_of(lm, *parts):
    """transformers' own logits of the items after parts of a prompt: numbers are the model's items, the others text."""
    ids = []
    for part in parts:
        is_item = isinstance(part, int)
        ids += [lm.items.first + part] if is_item else lm.tokenizer(part, split_special_tokens=True)["input_ids"]
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0, -1, lm.items.first :].numpy()


HEADER = "Products this person bought, in order:"


@pytest.mark.parametrize(
    ("reading", "shown"),
    [
        ("items", [3, 5]),
        ("hybrid", [HEADER, "\n", 3, "Soap", "\n", 5, "Comb", "\n"]),
        ("titles", [HEADER, "\n", "Soap", "\n", "Comb", "\n"]),
    ],
)
def test_the_whole_catalogue_is_ranked_from_what_the_model_knows(root, tmp_path, reading, shown):
    """ann bought Soap, lipstick and Comb. The model has an order of its own and has never heard of the lipstick."""
    lm = saved(tmp_path / "student", reading=reading)
    found = BaseRecommender(tmp_path / "student", root).recommend("ann", CATEGORY, 8)
    scores = logits_of(lm, *shown)
    order = [place for place in np.argsort(-scores) if OWN[place] not in CHOICES["ann"]]
    assert [r.item_id for r in found] == [ITEMS[OWN[place]] for place in order]
    assert [r.score for r in found] == pytest.approx(scores[order].tolist(), abs=1e-4)
    check_list(found, {ITEMS[i] for i in CHOICES["ann"]}, dict(zip(ITEMS, TITLES)))


@pytest.mark.parametrize("reading", READINGS)
def test_nobody_gets_what_they_have_and_all_get_what_there_is(root, tmp_path, reading):
    saved(tmp_path / "student", reading=reading)
    found = BaseRecommender(tmp_path / "student", root).recommend_many([*CHOICES, "nobody"], CATEGORY, 50)
    for user, choices in CHOICES.items():
        check_list(found[user], {ITEMS[i] for i in choices}, dict(zip(ITEMS, TITLES)))
        assert {r.item_id for r in found[user]} == {ITEMS[i] for i in OWN if i not in choices}
        assert not any(r.cold for r in found[user])
    assert found["all"] == [] and all(r.cold for r in found["nobody"]) and len(found["nobody"]) == len(ITEMS)


@pytest.mark.parametrize("reading", READINGS)
def test_many_users_share_a_forward_pass(root, tmp_path, monkeypatch, reading):
    saved(tmp_path / "student", reading=reading)
    recommender = BaseRecommender(tmp_path / "student", root)
    check_many(recommender, USERS, 4)
    passes, states = [], item_head.end_states
    monkeypatch.setattr(item_head, "end_states", lambda *args: passes.append(len(args[1])) or states(*args))
    recommender.recommend_many(USERS, CATEGORY, 4, progress=False)
    assert passes == [5] and recommender.answers is None


def test_the_newest_items_are_read_as_many_as_the_model_was_taught_to(root, tmp_path):
    lm = saved(tmp_path / "student", own=list(range(8)), history_items=2)
    found = BaseRecommender(tmp_path / "student", root).recommend("bob", CATEGORY, 8)
    scores = logits_of(lm, 3, 2)
    assert [r.score for r in found] == pytest.approx(sorted(scores[[4, 5, 6, 7]], reverse=True), abs=1e-5)


def test_a_user_of_whose_items_the_model_knows_none_gets_popular_ones(root, tmp_path):
    """dan bought 1, 2 and 6, cid 4, 5 and 1. Of what is left to dan, items 0, 4 and 5 were bought by 4, 3 and 3."""
    lm = saved(tmp_path / "student", own=[7, 5, 4, 0])
    found = BaseRecommender(tmp_path / "student", root).recommend_many(["dan", "cid"], CATEGORY, 8)
    assert [r.item_id for r in found["dan"]] == [ITEMS[i] for i in (0, 5, 4, 7)]
    assert [r.score for r in found["dan"]] == pytest.approx([4, 3, 3, 1]) and not any(r.cold for r in found["dan"])
    scores = logits_of(lm, 2, 1)
    assert [r.score for r in found["cid"]] == pytest.approx(sorted(scores[[0, 3]], reverse=True), abs=1e-5)


def test_an_item_that_the_shop_does_not_hold_is_never_named(root, tmp_path):
    lm = item_lm(titles=["Ghost", "Comb", "Towel", "Phantom"], ids=["X1", ITEMS[2], ITEMS[7], "X2"])
    lm.save(tmp_path / "student")
    found = BaseRecommender(tmp_path / "student", root).recommend_many(["ann", "cid", "all"], CATEGORY, 9)
    named = {user: {r.item_id for r in rows} for user, rows in found.items()}
    assert named == {"ann": {ITEMS[7]}, "cid": {ITEMS[2], ITEMS[7]}, "all": set()}
    assert found["ann"][0].score == pytest.approx(logits_of(lm, 1)[2], abs=1e-5)


@pytest.mark.parametrize(("reading", "item"), [("hybrid", [2]), ("titles", [])])
def test_a_title_spells_no_special_token(tmp_path, reading, item):
    titles = ["Comb<end>" if title == "Comb" else title for title in TITLES]
    lm = saved(tmp_path / "student", own=list(range(8)), reading=reading, titles=titles, history_items=1)
    found = BaseRecommender(tmp_path / "student", write_shop(tmp_path, titles)).recommend("ann", CATEGORY, 8)
    scores = logits_of(lm, HEADER, "\n", *item, "Comb<end>", "\n")
    assert [r.score for r in found] == pytest.approx(sorted(scores[3:], reverse=True), abs=1e-4)


def test_a_shop_whose_titles_the_model_was_not_made_for_is_refused_where_it_reads_them(tmp_path):
    root = write_shop(tmp_path, [*TITLES[:-1], "Zorblax"])
    for reading in ("titles", "hybrid"):
        saved(tmp_path / reading, own=list(range(8)), reading=reading)
        with pytest.raises(LwaError, match="'Zorblax' is outside the model's cut vocabulary"):
            BaseRecommender(tmp_path / reading, root).recommend("ann", CATEGORY, 1)
    saved(tmp_path / "items", own=list(range(8)))
    assert len(BaseRecommender(tmp_path / "items", root).recommend("ann", CATEGORY, 9)) == 5


def test_a_model_of_other_items_and_a_wrong_list_of_items_are_named(root, tmp_path):
    directory = tmp_path / "student"
    saved(directory)
    with pytest.raises(LwaError, match="other items than movielens"):
        BaseRecommender(directory, root).recommend("1", "MovieLens", 1)
    (directory / "items.json").write_text(json.dumps(ITEMS))
    with pytest.raises(LwaError, match="items.json is not a list of item tokens"):
        BaseRecommender(directory, root).recommend("ann", CATEGORY, 1)
    (directory / "items.json").unlink()  # an ordinary model of text, whose vocabulary happens to hold titles
    assert load_teacher(directory).items is None
