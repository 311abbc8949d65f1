"""The repeated sentence: as much as asked for, in every split."""

import pytest

from data.repeated_text import RepeatedText
from data.text import Splits


def test_it_repeats_whole_sentences():
    documents = list(RepeatedText(100_000, "Again and again.").documents())
    assert 100_000 <= sum(len(document.text) for document in documents) <= 111_000
    assert len({document.text for document in documents}) == len(documents) == 10
    assert all(set(document.text.split(". ")) == {"Again and again", "Again and again."} for document in documents)


def test_every_split_has_its_share():
    splits = [Splits().of(document.text) for document in RepeatedText().documents()]
    assert len(splits) > 50
    assert min(splits.count(split) for split in ("train", "validation", "held_out")) >= 5


@pytest.mark.parametrize(("options", "name"), [({"sentence": " "}, "sentence"), ({"characters": 0}, "characters")])
def test_nothing_to_repeat_is_refused(options, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        RepeatedText(**options)
