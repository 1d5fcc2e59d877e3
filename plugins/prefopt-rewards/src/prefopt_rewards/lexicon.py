"""A reward read from a list of words with values. It knows words; not what they mean in a sentence."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from collections.abc import Sequence as List
from pathlib import Path
from typing import Literal

from prefopt.api import Completion, ConfigError, RewardSource, Rollout, Score, Scorer, Services, UserPath
from prefopt_rewards.scores import missing

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


class Lexicon(RewardSource):
    """What the words of a reply are worth together, by a list such as VADER's: a word that is not in it is worth 0."""

    name = "lexicon"
    paper = "Lists of this form: Hutto and Gilbert 2014, VADER"

    path: UserPath
    """A text file with a word, a tab and its value in each line (further columns are ignored), or a zip of one such
    file."""
    mean: Literal["words", "none"] = "words"
    """Divide by the number of words, or not."""

    def open(self, services: Services) -> Scorer:
        values = read_lexicon(Path(self.path))
        return lambda groups: [self._scores(group, values) for group in groups]

    def _scores(self, group: Rollout, values: Mapping[str, float]) -> list[Score]:
        return [self._score(group, i, completion, values) for i, completion in enumerate(group.completions)]

    def _score(self, group: Rollout, i: int, completion: Completion, values: Mapping[str, float]) -> Score:
        words = WORD.findall(completion.text.lower())
        if not words and self.mean == "words":
            return missing(self.name, group, i, "it has no words")
        total = sum(values.get(word, 0.0) for word in words)
        return Score(total / len(words) if self.mean == "words" else total)


def read_lexicon(path: Path) -> dict[str, float]:
    """The values by lower-case word. Raises `ConfigError` for a file that cannot be read, naming its line."""
    values: dict[str, float] = {}
    for number, line in enumerate(_lines(path), 1):
        word, tab, rest = line.partition("\t")
        try:
            values[word.lower()] = float(rest.split("\t")[0])
        except ValueError:
            what = f"`{line[:40]}` is no word and value with a tab between" if tab else "no tab stands behind the word"
            raise ConfigError(what, where=f"{path}:{number}") from None
    return values


def _lines(path: Path) -> List[str]:
    try:
        if path.suffix != ".zip":
            return path.read_text("utf-8").splitlines()
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".txt")]
            if len(names) != 1:
                raise ConfigError(f"it holds {len(names)} text files, not one", where=str(path))
            return archive.read(names[0]).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the word list cannot be read: {error}", where=str(path)) from None
