"""Tokens: one beginning, one end, prompt and reply as the model would have read them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefopt.data.render import Renderer, Tokens, load_tokenizer
from prefopt.errors import ConfigError, DataError
from prefopt.rows import Completion, Message, Role, Sequence

WORDS = ["<pad>", "<s>", "</s>", "<u>", "<a>", "a", "b", "c", "ab", "\n"]
CHAT = (
    "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer(bos: bool = False, chat: str | None = None, **special) -> PreTrainedTokenizerFast:
    """Letters; `a` followed by `b` merges into one token."""
    raw = Tokenizer(models.BPE({w: i for i, w in enumerate(WORDS)}, [("a", "b")], unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=["<u>", "<a>"], **names)
    made.chat_template = chat
    return made


def ids(*words: str) -> tuple[int, ...]:
    return tuple(WORDS.index(w) for w in words)


def test_the_completion_ends_with_the_end_token():
    found = Renderer(tokenizer()).tokens("ac", Completion("ba"))
    assert found == Tokens(ids("a", "c"), ids("b", "a", "</s>"))


def test_a_completion_cut_short_has_no_end_token():
    found = Renderer(tokenizer()).tokens("ac", Completion("ba", finished=False))
    assert found.completion == ids("b", "a")


def test_an_end_token_in_the_text_is_not_doubled():
    assert Renderer(tokenizer()).tokens("c", Completion("a</s>")).completion == ids("a", "</s>")


def test_padding_may_be_the_end_token():
    found = Renderer(tokenizer(pad_token="</s>")).tokens("c", Completion("a"))
    assert found.completion == ids("a", "</s>")


def test_a_tokenizer_without_an_end_token_adds_none():
    assert Renderer(tokenizer(eos_token=None)).tokens("c", Completion("a")).completion == ids("a")


@pytest.mark.parametrize("prompt", ["c", ""])
def test_exactly_one_beginning_where_the_tokenizer_adds_it(prompt):
    renderer = Renderer(tokenizer(bos=True))
    found = renderer.tokens(prompt, Completion("a"))
    assert found == Tokens(ids("<s>", *prompt), ids("a", "</s>"))
    assert renderer.prompt_ids(prompt) == ids("<s>", *prompt)


def test_no_beginning_where_it_adds_none():
    assert Renderer(tokenizer(bos=False)).prompt_ids("c") == ids("c")


def test_prompt_and_reply_that_merge_are_read_as_the_model_would_and_counted():
    renderer = Renderer(tokenizer())
    assert renderer.tokens("ca", Completion("bc")) == Tokens(ids("c"), ids("ab", "c", "</s>"))
    assert renderer.tokens("ca", Completion("cb")) == Tokens(ids("c", "a"), ids("c", "b", "</s>"))
    assert renderer.counts["prompts/merged"] == 1


def test_without_a_prompt_the_first_token_is_read_and_not_scored():
    assert Renderer(tokenizer()).tokens("", Completion("ca")) == Tokens(ids("c"), ids("a", "</s>"))
    with pytest.raises(DataError, match="has no tokens"):
        Renderer(tokenizer(eos_token=None)).tokens("", Completion("c"))


def test_sampled_tokens_are_used_as_they_are():
    found = Renderer(tokenizer()).tokens("ca", Completion("whatever", ids=(6, 7)))
    assert found == Tokens(ids("c", "a"), (6, 7))


TALK = (Message("user", "c"),)


def test_a_conversation_goes_through_the_chat_template():
    renderer = Renderer(tokenizer(chat=CHAT))
    assert renderer.prompt_ids(TALK) == ids("<u>", "c", "</s>", "\n", "<a>")
    found = renderer.tokens(TALK, Completion("b"))
    assert found == Tokens(ids("<u>", "c", "</s>", "\n", "<a>"), ids("b", "</s>"))  # white space after the end is cut


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(DataError, match="no chat template"):
        Renderer(tokenizer()).tokens(TALK, Completion("b"))


def sequences(*lengths: int) -> list[Sequence]:
    return [
        Sequence("c" * 4, Completion("b" * n), Role.CHOSEN, group=i // 2) for i, n in enumerate(lengths)
    ]  # 4 + n + 1 tokens


def test_too_long_stops_with_the_numbers():
    with pytest.raises(DataError, match=r"have 10 tokens, more than data.max_length = 8"):
        Renderer(tokenizer(), max_length=8).render(sequences(5))


def test_too_long_drops_the_whole_group_and_counts_it():
    renderer = Renderer(tokenizer(), max_length=8, overflow="drop")
    kept, tokens = renderer.render(sequences(2, 9, 3, 1))
    assert [s.group for s in kept] == [1, 1]
    assert [len(t) for t in tokens] == [8, 6]
    assert renderer.counts["rows/dropped"] == 1


def test_truncation_cuts_the_prompt_s_start_then_the_completion_s_end_and_never_all_of_it():
    renderer = Renderer(tokenizer(), max_length=6, overflow="truncate")
    _, tokens = renderer.render(sequences(3, 9))
    assert tokens[0] == Tokens(ids("c", "c"), ids("b", "b", "b", "</s>"))
    assert tokens[1] == Tokens(ids("c"), ids(*"bbbbb"))
    assert renderer.counts["rows/truncated"] == 2


@pytest.mark.parametrize(("overflow", "opening"), [("truncate", ids(*"cccc")), ("drop", None)])
def test_replies_are_drawn_from_what_fits_of_a_prompt_and_scored_behind_it(overflow, opening):
    renderer = Renderer(tokenizer(), max_length=4, overflow=overflow)
    assert renderer.opening("acccc") == opening
    reply = Completion("bb", ids=ids("b", "b"))
    drawn = [Sequence(prompt, reply, Role.SAMPLE, group=i) for i, prompt in enumerate(("cccc", "acccc"))]
    _, tokens = renderer.render(drawn)
    assert tokens == [Tokens(ids(*"cccc"), reply.ids)] * (2 if opening else 1)  # a reply that was drawn is never cut


@pytest.mark.parametrize("overflow", ["stop", "drop"])
def test_a_probe_of_two_rows_that_fit_is_cut_and_never_stops_a_run_or_drops_its_row(overflow):
    renderer = Renderer(tokenizer(), max_length=8, overflow=overflow)
    own = Sequence("c" * 6, Completion("b"), Role.DESIRABLE, group=0)
    probe = Sequence("c" * 6, Completion("b" * 6), Role.PROBE, group=0)
    _, tokens = renderer.render([own, probe])
    assert [len(t) for t in tokens] == [8, 8]
    assert tokens[1].completion == ids(*"bbbbbb", "</s>")
    assert renderer.counts["rows/truncated"] == 0


def test_an_opening_of_one_token_has_nothing_to_score_and_is_left_out():
    own = Sequence("c", Completion("b"), Role.CHOSEN, group=0)
    openings = [Sequence("", Completion(text, finished=False), Role.OPENING, group=0) for text in ("c", "cc")]
    kept, tokens = Renderer(tokenizer()).render([own, *openings])
    assert [s.completion.text for s in kept] == ["b", "cc"]
    assert tokens[1] == Tokens(ids("c"), ids("c"))


def test_a_prompt_too_long_to_draw_from_stops_with_the_numbers():
    with pytest.raises(DataError, match=r"the prompt has 5 tokens, more than data.max_length = 4"):
        Renderer(tokenizer(), max_length=4).opening("acccc")


def test_what_is_counted_does_not_depend_on_what_was_seen_before():
    renderer = Renderer(tokenizer())
    for _ in range(3):
        renderer.tokens("ca", Completion("b"))
    assert renderer.counts["prompts/merged"] == 3


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


# --- several turns --------------------------------------------------------------------------------------------------

LONG = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
FORGETFUL = (
    "{% for m in messages %}{{ m.content if loop.last else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def demonstration(prompt, text: str, role: Role = Role.DEMONSTRATION) -> Sequence:
    return Sequence(prompt, Completion(text), role, group=0)


def test_all_assistant_turns_are_trained_on_each_with_its_end_token():
    renderer = Renderer(tokenizer(chat=CHAT), train_on="all")
    _, (found,) = renderer.render([demonstration(LONG, "ab")])
    assert found.prompt == ids("<u>", "a", "</s>", "\n", "<a>")
    assert found.completion == ids("b", "</s>", "\n", "<u>", "c", "</s>", "\n", "<a>", "ab", "</s>")
    assert found.trained == (True, True, *[False] * 6, True, True)
    _, (last,) = Renderer(tokenizer(chat=CHAT)).render([demonstration(LONG, "ab")])
    assert (last.prompt + last.completion, last.trained) == (found.prompt + found.completion, None)
    assert last.completion == ids("ab", "</s>")


def test_only_demonstrations_are_trained_on_in_several_turns():
    renderer = Renderer(tokenizer(chat=CHAT), train_on="all")
    _, (found,) = renderer.render([demonstration(LONG, "ab", Role.DESIRABLE)])
    assert (found.completion, found.trained) == (ids("ab", "</s>"), None)
    _, (short,) = renderer.render([demonstration(TALK, "b")])
    assert short.trained is None


def test_a_template_that_rewrites_earlier_turns_is_refused_and_not_masked_wrongly():
    renderer = Renderer(tokenizer(chat=FORGETFUL), train_on="all")
    with pytest.raises(DataError, match="writes turn 1 differently once more turns follow"):
        renderer.render([demonstration(LONG, "b")])


def test_truncation_leaves_a_trained_token_last():
    for most, trained in ((15, 4), (11, 4), (10, 3), (9, 2), (3, 2), (2, 1)):
        renderer = Renderer(tokenizer(chat=CHAT), max_length=most, overflow="truncate", train_on="all")
        _, (found,) = renderer.render([demonstration(LONG, "ab")])
        assert len(found) <= most
        assert len(found.completion) == len(found.trained)
        assert found.trained[-1]
        assert sum(found.trained) == trained, most


# --- what cannot be trained on --------------------------------------------------------------------------------------


def pair(chosen: str, rejected: str, **fields: float) -> list[Sequence]:
    sides = ((chosen, Role.CHOSEN), (rejected, Role.REJECTED))
    return [Sequence("c", Completion(text), role, 0, fields=fields) for text, role in sides]


def test_a_pair_whose_sides_have_the_same_tokens_is_refused_or_dropped():
    renderer = Renderer(tokenizer(), max_length=3, overflow="truncate")
    with pytest.raises(DataError, match="chosen and rejected have the same tokens"):
        renderer.render(pair("bbbc", "bbba"))
    assert renderer.render(pair("bbbc", "bbba"), drop=True) == ([], [])
    assert renderer.counts["rows/dropped"] == 1
    assert len(renderer.render(pair("bbbc", "bbba", preference=0.5))[0]) == 2  # a tie may be the same twice


def test_a_row_without_a_token_to_train_on_is_dropped_and_counted():
    renderer = Renderer(tokenizer(eos_token=None))
    kept, tokens = renderer.render([*pair("", "b"), Sequence("c", Completion("a"), Role.CHOSEN, 1)], drop=True)
    assert [s.group for s in kept] == [1]
    assert tokens == [Tokens(ids("c"), ids("a"))]
    assert renderer.counts["rows/dropped"] == 1


def test_an_empty_reply_is_its_end_token():
    assert Renderer(tokenizer()).tokens("c", Completion("")).completion == ids("</s>")


def test_a_beginning_in_the_text_is_not_doubled():
    found = Renderer(tokenizer(bos=True)).tokens("<s>c", Completion("a"))
    assert found == Tokens(ids("<s>", "c"), ids("a", "</s>"))


def test_a_template_that_refuses_a_conversation_is_a_data_error():
    strict = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(
        DataError, match="the chat template refuses the conversation: Conversation roles must alternate"
    ):
        Renderer(tokenizer(chat=strict)).prompt_ids(TALK)


def test_the_order_of_sequences_is_kept_whatever_their_groups():
    given = [Sequence("c", Completion("ab"[i % 2] * (i + 1)), Role.SAMPLE, group=i % 2) for i in range(4)]
    assert Renderer(tokenizer()).render(given)[0] == given
