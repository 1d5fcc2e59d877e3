from __future__ import annotations

import zipfile

import pytest
from prefopt_rewards.lexicon import Lexicon

from prefopt.api import Completion, ConfigError, Rollout

LINES = "good\t1.9\t0.9\t[2, 1]\nBad\t-2.5\ncan't\t0.5\n"


def scores(reward: Lexicon, *texts: str) -> list[float | None]:
    group = Rollout(prompt="p", index=3, completions=tuple(map(Completion, texts)))
    (found,) = reward.open(None)([group])
    assert all(s.reason == "lexicon, row 3, sample 2: it has no words" for s in found if s.value is None)
    return [s.value for s in found]


def test_the_mean_is_over_words_and_unknown_words_are_worth_nothing(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(LINES)
    found = scores(Lexicon(path=str(path)), "Good, good BAD dogs!", "can't 42", "?!")
    assert found == [pytest.approx((1.9 + 1.9 - 2.5) / 4), 0.5, None]
    assert scores(Lexicon(path=str(path), mean="none"), "good good", "bad") == [3.8, -2.5]


def test_a_zip_of_one_list_is_read_as_the_list(tmp_path):
    with zipfile.ZipFile(tmp_path / "words.zip", "w") as archive:
        archive.writestr("folder/words.txt", LINES)
    assert scores(Lexicon(path=str(tmp_path / "words.zip")), "good") == [1.9]


@pytest.mark.parametrize(
    ("text", "message"), [("good\t1\nbad\n", "words.txt:2: no tab"), ("good\tx\n", "words.txt:1: `good\tx` is no word")]
)
def test_a_list_that_is_none_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        scores(Lexicon(path=str(tmp_path / "words.txt")), "good")
