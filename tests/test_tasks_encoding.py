"""Examples as token ids: what is trained, what generation starts from, what is left out, how batches are padded."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny_tokenizers import ALWAYS, REAL, SHARED, by_name, chatting, framing, merging
from tokenizers import normalizers

from loramux.support.errors import DataError
from loramux.tasks import (
    Encoded,
    Example,
    Limits,
    Task,
    as_written,
    collate,
    encode,
    encode_task,
    load_tasks,
    read_task_configs,
)

NAMES = [*ALWAYS, *REAL]
# Shows thoughts in the last answer only, as the templates of reasoning models do.
CHATML_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"text": "Is it so?", "label": "yes"},
    {"text": "Where is John?", "label": "no"},
    {"text": "Mia hid the red cup in the garden.", "label": "yes"},
]
ROWS_WITH_CHOICES = [{"input": "Is it so?", "target": "no", "choices": ["yes", "no"]}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Where is John?"},
    {"role": "assistant", "content": "bathroom"},
]


def example(row: dict[str, Any] | None = None, **options: Any) -> Example:
    """The first example of a task; more rows only add to the label set."""
    rows = [row] if row else ROWS
    return Task.from_rows("t", {"train": rows, "validation": rows}, **options).splits["train"][0]


def chat_example(messages: Any = CHAT, **options: Any) -> Example:
    return example({"messages": messages}, **options)


def encoded(one: Example, tokenizer: Any, **options: Any) -> Encoded:
    result = encode(one, tokenizer, max_length=512, **options)
    assert result is not None
    return result


def learnt(tokenizer: Any, one: Encoded) -> list[str]:
    """The trained stretches of an example, as text."""
    stretches: list[list[int]] = []
    for index, (token, trained) in enumerate(zip(one.input_ids, one.trained, strict=True)):
        if trained and (index == 0 or not one.trained[index - 1]):
            stretches.append([])
        if trained:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return by_name(request.param)


class TestPlain:
    def test_the_answer_and_its_end_are_trained_and_nothing_else(self, tokenizer: Any) -> None:
        one = encoded(example(), tokenizer, chat_template=False)
        answer = len(one.input_ids) - one.prompt_length
        assert one.trained == (False,) * one.prompt_length + (True,) * answer
        assert one.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(one.input_ids[one.prompt_length : -1]).strip() == "yes"

    @pytest.mark.parametrize("prompt", ["Is it so?\nAnswer:", "Is it so? ", "Mia hid the red cup.\n", "a:"])
    def test_the_prompt_has_the_same_ids_whatever_follows_it(self, tokenizer: Any, prompt: str) -> None:
        answers = ("yes", " yes", ": no", "\nno", "bathroom", "1", "s are x")
        ones = [encoded(example({"prompt": prompt, "completion": a}), tokenizer, chat_template=False) for a in answers]
        assert len({one.prompt.input_ids for one in ones}) == 1
        assert len({one.input_ids for one in ones}) >= len(answers) - 1

    def test_a_word_that_would_merge_into_the_prompt_is_kept_apart(self) -> None:
        tokenizer = merging()
        prompt, answer = "Is it so?\nAnswer:", " yes"
        assert len(tokenizer(prompt + answer).input_ids) == 1, "the tokenizer must merge across the border"
        one = encoded(example({"prompt": prompt, "completion": answer}), tokenizer)
        assert list(one.prompt.input_ids) == tokenizer(prompt).input_ids
        assert tokenizer.decode(one.input_ids) == prompt + answer + "<eos>"

    def test_an_answer_is_segmented_as_in_running_text_where_the_border_allows(self) -> None:
        tokenizer = chatting()
        one = encoded(example(), tokenizer, chat_template=False)
        text = "Is it so?\nAnswer: yes"
        assert list(one.input_ids[:-1]) == tokenizer(text).input_ids

    def test_spaces_at_the_end_of_a_prompt_move_to_the_answer(self) -> None:
        tokenizer = chatting()
        spaced = example({"prompt": "Answer: ", "completion": "yes"})
        plain = example({"prompt": "Answer:", "completion": "yes"})
        one, other = (encoded(e, tokenizer, chat_template=False) for e in (spaced, plain))
        assert one == other

    @pytest.mark.parametrize(
        ("prompt", "answer", "text"),
        [
            ("Answer:", "yes", "Answer: yes"),
            ("Answer:", " yes", "Answer: yes"),
            ("Answer: ", "yes", "Answer: yes"),
            ("Answer:\n", "yes", "Answer:\nyes"),
            ("Answer:", "\nyes", "Answer:\nyes"),
            ("def f():\n", "    return 1", "def f():\n    return 1"),
        ],
    )
    def test_one_space_stands_between_prompt_and_answer_unless_they_bring_their_own(
        self, prompt: str, answer: str, text: str
    ) -> None:
        tokenizer = chatting()
        one = encoded(example({"prompt": prompt, "completion": answer}), tokenizer, chat_template=False)
        assert tokenizer.decode(one.input_ids) == text + "<eos>"

    def test_the_delimiter_can_be_empty(self) -> None:
        tokenizer = chatting()
        one = encoded(example({"prompt": "Answer:", "completion": "yes"}, delimiter=""), tokenizer, chat_template=False)
        assert tokenizer.decode(one.input_ids) == "Answer:yes<eos>"

    def test_what_a_tokenizer_puts_before_a_text_is_kept_and_what_it_puts_after_is_not(self) -> None:
        tokenizer = framing()
        one = encoded(example(), tokenizer)
        assert tokenizer.decode(one.prompt.input_ids) == "[CLS] is it so? answer :"
        assert tokenizer.decode(one.input_ids) == "[CLS] is it so? answer : yes [SEP]"

    def test_train_on_all_covers_every_token_but_those_the_tokenizer_adds_in_front(self) -> None:
        one = encoded(example(train_on="all"), framing())
        assert one.trained == (False,) + (True,) * (len(one.input_ids) - 1)

    def test_options_continue_the_prompt_in_their_order_and_end(self, tokenizer: Any) -> None:
        one = encoded(example(), tokenizer, chat_template=False)
        assert one.choices is not None
        assert [tokenizer.decode(choice[:-1]).strip() for choice in one.choices] == ["no", "yes"]
        assert one.prompt.input_ids + one.choices[1] == one.input_ids
        no, yes = one.options()
        assert yes.input_ids == one.input_ids
        assert yes.trained == one.trained
        assert no.input_ids[-1] == tokenizer.eos_token_id

    def test_options_that_the_vocabulary_cannot_tell_apart_are_reported(self) -> None:
        row = {"input": "Is it so?", "target": "yes", "choices": ["yes", "YES"]}
        task = Task.from_rows("t", {"train": [row, *ROWS_WITH_CHOICES], "validation": ROWS_WITH_CHOICES})
        assert encode_task(task, framing(), max_length=99).notes[1:] == (
            "1 train examples have options that this tokenizer writes alike, so they cannot be told apart",
        )
        assert not any("alike" in note for note in encode_task(task, merging(), max_length=999).notes)

    def test_open_answers_have_no_options(self) -> None:
        one = encoded(example({"prompt": "a", "completion": "b"}), merging())
        assert one.choices is None
        assert one.options() == []

    def test_one_by_one_is_the_same_as_many_at_once(self, tokenizer: Any) -> None:
        task = Task.from_rows("t", {"train": ROWS, "validation": ROWS}, chat_template=False)
        batch = encode_task(task, tokenizer, max_length=512).splits["train"]
        assert batch == tuple(encoded(e, tokenizer, chat_template=False) for e in task.splits["train"])


class TestChat:
    def test_every_assistant_turn_is_trained_with_its_end(self) -> None:
        tokenizer = chatting()
        one = encoded(chat_example(), tokenizer)
        assert learnt(tokenizer, one) == ["yes<|im_end|>", "bathroom<|im_end|>"]

    def test_the_whole_is_what_the_chat_template_writes_up_to_the_last_end(self) -> None:
        tokenizer = chatting()
        one = encoded(chat_example(), tokenizer)
        whole = tokenizer.apply_chat_template(CHAT, tokenize=False).removesuffix("\n")
        assert tokenizer.decode(one.input_ids) == whole

    def test_generation_starts_from_what_others_get_from_the_template(self) -> None:
        tokenizer = chatting()
        one = encoded(chat_example(), tokenizer)
        theirs = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True)["input_ids"]
        assert list(one.prompt.input_ids) == theirs

    def test_templated_rows_become_a_user_and_an_assistant_turn(self) -> None:
        tokenizer = chatting()
        one = encoded(example(), tokenizer)
        messages = [{"role": "user", "content": "Is it so?\nAnswer:"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(one.prompt.input_ids) == text
        assert one.choices is not None
        assert [tokenizer.decode(choice) for choice in one.choices] == ["no<|im_end|>", "yes<|im_end|>"]

    def test_without_an_end_marker_the_end_of_sequence_is_added(self) -> None:
        tokenizer = chatting("{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}")
        one = encoded(chat_example(), tokenizer)
        assert tokenizer.decode(one.input_ids).endswith("bathroom<eos>")

    def test_a_template_that_shortens_earlier_answers_still_trains_what_it_shows(self) -> None:
        template = CHATML_THINKING
        tokenizer = chatting(template)
        one = encoded(chat_example(), tokenizer)
        assert learnt(tokenizer, one) == ["yes<|im_end|>", "<think></think>bathroom<|im_end|>"]

    def test_a_template_that_hides_an_answer_is_refused(self) -> None:
        template = "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}"
        with pytest.raises(DataError, match="rewrites earlier turns or the answer 'yes'"):
            encode(chat_example(), chatting(template), max_length=512)

    def test_a_template_that_refuses_the_roles_is_reported(self) -> None:
        template = "{{ raise_exception('System role not supported') }}"
        with pytest.raises(DataError, match=r"refuses turns of the roles system, user.*System role not supported"):
            encode(chat_example(), chatting(template), max_length=512)

    def test_a_chat_template_cannot_be_asked_of_a_tokenizer_that_has_none(self) -> None:
        with pytest.raises(DataError, match="the tokenizer has no chat template"):
            encode(example(), merging(), max_length=512, chat_template=True)

    def test_only_the_completion_of_conversational_prompt_and_completion_is_trained(self) -> None:
        tokenizer = chatting()
        one = encoded(example({"prompt": CHAT[:-1], "completion": CHAT[-1:]}), tokenizer)
        assert learnt(tokenizer, one) == ["bathroom<|im_end|>"]

    @pytest.mark.parametrize("name", ["merging", "framing", *REAL])
    def test_without_a_chat_template_roles_are_written_out_and_every_answer_ends(self, name: str) -> None:
        tokenizer = by_name(name)
        one = encoded(chat_example(), tokenizer)
        end = tokenizer.eos_token
        texts = [text.replace(" ", "") for text in learnt(tokenizer, one)]
        assert texts == [f"yes{end}", f"bathroom{end}"]

    def test_plain_chat_reads_well(self) -> None:
        text = "System: Be brief.\nUser: Is it so?\nAssistant: yesUser: Where is John?\nAssistant:"
        assert chat_example().prompt == text

    def test_train_on_all_covers_the_questions_too(self) -> None:
        for tokenizer in (chatting(), merging()):
            one = encoded(chat_example(train_on="all"), tokenizer)
            assert all(one.trained)


class TestTooLong:
    def task(self, **options: Any) -> Task:
        rows = [{"prompt": "Is it so?" * n, "completion": "yes"} for n in (1, 2, 3, 40)]
        return Task.from_rows("long", {"train": rows, "validation": rows[:1]}, **options)

    def test_it_is_left_out_counted_and_reported_never_cut(self) -> None:
        one = encode_task(self.task(), framing(), max_length=30)
        assert one.too_long == {"train": 1, "validation": 0}
        assert len(one.splits["train"]) == len(one.examples["train"]) == 3
        assert "1 of 4 train examples left out: longer than the model takes" in one.notes
        assert all(e.input_ids[-1] == framing().eos_token_id for e in one.splits["train"])

    def test_a_length_that_just_fits_is_kept(self) -> None:
        tokenizer = framing()
        one = encoded(example(), tokenizer)
        length = len(one.input_ids)
        assert encode(example(), tokenizer, max_length=length) == one
        assert encode(example(), tokenizer, max_length=length - 1) is None

    def test_an_example_whose_longest_option_does_not_fit_is_too_long(self) -> None:
        row = {"input": "Is it so?", "target": "no", "choices": ["no", "no " * 30]}
        assert encode(example(row), framing(), max_length=30) is None

    def test_a_split_with_nothing_left_is_an_error(self) -> None:
        with pytest.raises(DataError, match="task 'long': all 4 train examples are longer than 3 tokens"):
            encode_task(self.task(), framing(), max_length=3)

    def test_a_tokenizer_without_an_end_is_an_error_that_names_the_task(self) -> None:
        tokenizer = merging()
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="task 'long': the tokenizer has no end-of-sequence token"):
            encode_task(self.task(), tokenizer, max_length=99)

    def test_a_prompt_without_tokens_is_an_error(self) -> None:
        with pytest.raises(DataError, match="prompt has no tokens"):
            encode(example({"prompt": "\u200b", "completion": "yes"}), no_tokens(), max_length=9)

    def test_stop_ids_are_the_ends_of_the_answers(self) -> None:
        assert encode_task(self.task(), framing(), max_length=99).stop_ids == (framing().eos_token_id,)
        tokenizer = chatting()
        assert encode_task(self.task(), tokenizer, max_length=999).stop_ids == (
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )


def no_tokens() -> Any:
    """A tokenizer that drops what it does not print and adds no beginning."""
    tokenizer = merging()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    return tokenizer


def test_references_are_compared_as_the_tokenizer_writes_them() -> None:
    assert as_written(["Jack White"], framing()) == ["jack white"]
    assert as_written(["Jack White", "x"], merging()) == ["Jack White", "x"]
    assert as_written([], merging()) == []


class TestCollate:
    rows = ((1, Encoded((5, 6, 7), (False, True, True), 1)), (0, Encoded((8,), (True,), 0)))

    def test_right_padding(self) -> None:
        batch = collate(self.rows, pad_id=7)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 7, 7]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
        assert batch["tasks"].tolist() == [1, 0]
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())

    def test_left_padding_moves_everything_alike(self) -> None:
        batch = collate(self.rows, pad_id=0, side="left", examples=[4, 9])
        assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]
        assert batch["examples"].tolist() == [4, 9]


@pytest.mark.parametrize("name", REAL)
def test_every_real_task_survives_every_real_tokenizer(name: str) -> None:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"{SHARED / 'data'} is not here")
    tokenizer = by_name(name)
    configs = [
        dataclasses.replace(config, limit=Limits(train=60, validation=20, test=20))
        for config in read_task_configs(SHARED / "data")
    ]
    for task in load_tasks(configs):
        one = encode_task(task, tokenizer, max_length=512)
        for split, items in one.splits.items():
            for source, item in zip(one.examples[split], items, strict=True):
                answer = tokenizer.decode(item.input_ids[item.prompt_length :], skip_special_tokens=True)
                assert answer.strip() == as_written([source.target], tokenizer)[0]
                if item.choices:
                    assert item.prompt.input_ids + item.choices[source.choices.index(source.target)] == item.input_ids
