"""Tasks as people keep them: which files, which shapes, which splits, and what is said when something is wrong."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from loramux.support.config import parse, to_data
from loramux.support.errors import ConfigError, DataError
from loramux.tasks import Task, TaskConfig, load_tasks, read_task_configs

ROWS = [{"input": f"question {i}", "target": ["yes", "no"][i % 2]} for i in range(20)]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def folder_of_splits(folder: Path, **changes: Any) -> Path:
    for split in ("train", "validation", "test"):
        write_lines(folder / f"{split}.jsonl", changes.get(split, ROWS))
    return folder


def task_file(folder: Path, *tasks: Any, **more: Any) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": list(tasks), **more}), encoding="utf-8")
    return path


def one_row(row: Mapping[str, Any], **options: Any) -> Task:
    return Task.from_rows("t", {"train": [row], "validation": [row]}, **options)


def prompt_and_target(row: Mapping[str, Any], **options: Any) -> tuple[str, str]:
    example = one_row(row, **options).splits["train"][0]
    return example.prompt, example.target


class TestShapes:
    @pytest.mark.parametrize(
        ("row", "prompt", "target"),
        [
            ({"prompt": "The sky is", "completion": " blue."}, "The sky is", "blue."),
            ({"prompt": "The sky is", "response": "blue."}, "The sky is", "blue."),
            ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2\nAnswer:", "3"),
            ({"instruction": "Add 1 and 2.", "input": "", "output": "3"}, "Add 1 and 2.\nAnswer:", "3"),
            ({"instruction": "Add 1 and 2.", "output": "3"}, "Add 1 and 2.\nAnswer:", "3"),
            ({"input": "1 2", "target": "3", "split": "train"}, "1 2\nAnswer:", "3"),
            ({"text": "Fine.", "label": "good"}, "Fine.\nAnswer:", "good"),
            ({"premise": "a", "hypothesis": "b", "label": "no"}, "a\nb\nAnswer:", "no"),
            ({"question": "Why?", "answer": "Because."}, "Why?\nAnswer:", "Because."),
        ],
    )
    def test_rows_are_read_as_they_are(self, row: dict[str, str], prompt: str, target: str) -> None:
        assert prompt_and_target(row) == (prompt, target)

    @pytest.mark.parametrize(
        "row",
        [
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "completion": [{"role": "assistant", "content": "Hello"}],
            },
        ],
    )
    def test_conversations_in_the_forms_of_openai_sharegpt_and_trl(self, row: dict[str, Any]) -> None:
        example = one_row(row).splits["train"][0]
        assert [(turn.role, turn.text, turn.trained) for turn in example.turns] == [
            ("user", "Hi", False),
            ("assistant", "Hello", True),
        ]
        assert example.target == "Hello"

    def test_a_question_nobody_answers_is_left_off_the_end(self) -> None:
        messages = [{"role": r, "content": r} for r in ("user", "assistant", "user")]
        example = one_row({"messages": messages}).splits["train"][0]
        assert [turn.role for turn in example.turns] == ["user", "assistant"]

    def test_templates_come_before_the_shape(self) -> None:
        row = {"text": "Fine.", "label": "good", "lang": "en"}
        assert prompt_and_target(row, prompt="[{lang}] {text} =>") == ("[en] Fine. =>", "good")
        assert prompt_and_target(row, target="It is {label}.", choices=[]) == ("Fine.\nAnswer:", "It is good.")

    def test_templates_look_into_nested_rows_and_write_braces(self) -> None:
        row = {"context": "c", "answers": {"text": ["first", "second"]}}
        assert prompt_and_target(row, prompt="{{x}} {context}:", target="{answers.text.1}") == ("{x} c:", "second")

    def test_numbers_and_booleans_are_text(self) -> None:
        assert prompt_and_target({"input": 3, "target": True}) == ("3\nAnswer:", "true")
        assert prompt_and_target({"input": 0.5, "target": 7}) == ("0.5\nAnswer:", "7")

    def test_a_template_cannot_reach_into_python(self) -> None:
        with pytest.raises(DataError, match=r"no field 'text\.__class__'"):
            prompt_and_target({"text": "a", "label": "b"}, prompt="{text.__class__}")


class TestChoices:
    def test_a_label_column_is_a_closed_answer_set(self) -> None:
        rows = [{"text": str(i), "label": label} for i, label in enumerate("bbca" * 5)]
        task = Task.from_rows("t", rows)
        assert task.closed
        assert task.splits["train"][0].choices == ("a", "b", "c")
        assert task.metrics == ("accuracy", "macro_f1")

    def test_rows_bring_their_own(self) -> None:
        rows = [
            {"input": "q", "target": "b", "choices": ["a", "b"]},
            {"input": "r", "target": "z", "choices": ["z", "y"]},
        ]
        task = Task.from_rows("t", {"train": rows, "validation": rows})
        assert [example.choices for example in task.splits["train"]] == [("a", "b"), ("z", "y")]
        assert task.metrics == ("accuracy",)

    def test_another_field_can_hold_them_and_the_target_can_be_an_index(self) -> None:
        row = {"ctx": "He", "endings": ["runs", "sleeps"], "label": 1}
        task = one_row(row, prompt="{ctx}", target="{label}", choices="endings")
        example = task.splits["train"][0]
        assert (example.target, example.choices) == ("sleeps", ("runs", "sleeps"))

    def test_a_numeric_answer_beside_textual_options_is_their_position(self) -> None:
        options = ["3", "1", "3", "0"]
        targets = [
            one_row(
                {"q": "?", "options": options, "answer": answer}, prompt="{q}", target="{answer}", choices="options"
            )
            for answer in (0, 1, 3, "3")
        ]
        assert [task.splits["train"][0].target for task in targets] == ["3", "1", "0", "3"]

    def test_numbers_that_are_the_answer_itself_stay_what_they_are(self) -> None:
        assert one_row({"input": "1+1", "target": 2, "choices": [0, 3, 2]}).splits["train"][0].target == "2"
        assert one_row({"text": "Fine.", "label": 2}, choices=["1", "2", "3"]).splits["train"][0].target == "2"

    def test_a_label_that_only_the_test_split_has_belongs_to_the_set(self) -> None:
        rows = {
            split: [{"text": "t", "label": label}]
            for split, label in zip(("train", "validation", "test"), "abc", strict=True)
        }
        assert Task.from_rows("t", rows).splits["train"][0].choices == ("a", "b", "c")

    def test_a_label_column_of_free_text_is_open(self) -> None:
        rows = [{"text": "t", "label": f"{i}"} for i in range(1001)]
        assert not Task.from_rows("t", {"train": rows, "validation": rows[:1]}).closed
        assert Task.from_rows("t", {"train": rows[:-1], "validation": rows[:1]}).closed

    def test_a_list_names_class_numbers(self) -> None:
        task = one_row({"text": "Fine.", "label": 1}, choices=["bad", "good"])
        assert task.splits["train"][0].target == "good"

    def test_labels_json_beside_the_files(self, tmp_path: Path) -> None:
        folder_of_splits(tmp_path / "mood")
        (tmp_path / "mood" / "labels.json").write_text('["yes", "no", "maybe"]')
        (task,) = load_tasks(tmp_path / "mood")
        assert task.splits["test"][0].choices == ("yes", "no", "maybe")

    def test_class_names_of_a_dataset(self) -> None:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        data = datasets.Dataset.from_dict(
            {"text": [f"t{i}" for i in range(10)], "label": [0, 1] * 5}, features=features
        )
        task = Task.from_rows("t", data)
        assert {example.target for example in task.splits["train"]} == {"no", "yes"}
        assert task.splits["train"][0].choices == ("no", "yes")

    def test_an_option_that_a_row_repeats_counts_once(self) -> None:
        task = one_row({"input": "q", "target": "sky", "choices": ["sky", "roots", "sky"]})
        assert task.splits["train"][0].choices == ("sky", "roots")

    def test_an_empty_list_opens_the_answers(self) -> None:
        task = one_row({"text": "a", "label": "b"}, choices=[])
        assert not task.closed
        assert task.metrics == ("exact_match", "rouge_l")


class TestFiles:
    def test_every_format_gives_the_same_examples(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "lines.jsonl")
        write_lines(tmp_path / "lines_called.json")
        marked = write_lines(tmp_path / "byte_order_mark.jsonl")
        marked.write_text(marked.read_text(), encoding="utf-8-sig")
        (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
        for name, delimiter in (("table.csv", ","), ("table.tsv", "\t")):
            with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, ["input", "target"], delimiter=delimiter)
                writer.writeheader()
                writer.writerows(ROWS)
        datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "table.parquet"))
        sources = [{"name": "t", "source": {"path": str(path)}} for path in sorted(tmp_path.iterdir())]
        splits = [load_tasks([source])[0].splits for source in sources]
        assert len(splits) == 7
        assert all(one == splits[0] for one in splits)

    def test_a_folder_that_save_to_disk_wrote(self, tmp_path: Path) -> None:
        data = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict({"train": data, "dev": data}).save_to_disk(str(tmp_path / "saved"))
        (task,) = load_tasks([{"name": "t", "source": {"path": str(tmp_path / "saved")}}])
        assert {split: len(items) for split, items in task.splits.items()} == {"train": 20, "validation": 20}

    def test_a_local_folder_as_a_datasets_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder_of_splits(tmp_path / "data")
        (task,) = load_tasks([{"name": "t", "source": {"dataset": str(tmp_path / "data")}}])
        assert [len(items) for items in task.splits.values()] == [20, 20, 20]

    def test_blank_lines_do_not_shift_line_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "train.jsonl"
        path.write_text('{"input": "a", "target": "b"}\n\n\n{"input": "a"}\n')
        with pytest.raises(DataError, match=r"train\.jsonl, line 4: no field 'target'"):
            load_tasks(path)

    def test_other_names_of_the_splits(self, tmp_path: Path) -> None:
        for name in ("train", "dev", "heldout"):
            write_lines(tmp_path / f"{name}.jsonl", ROWS[: {"train": 20, "dev": 3, "heldout": 4}[name]])
        source = {"path": str(tmp_path), "splits": {"test": "heldout"}}
        (task,) = load_tasks([{"name": "t", "source": source}])
        assert [len(items) for items in task.splits.values()] == [20, 3, 4]

    def test_a_folder_of_folders_is_a_task_each(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            folder_of_splits(tmp_path / name)
        (tmp_path / "notes").mkdir()
        assert [task.name for task in load_tasks(tmp_path)] == ["a", "b"]


class TestTaskFile:
    def test_several_tasks_with_shared_settings(self, tmp_path: Path) -> None:
        folder_of_splits(tmp_path / "a")
        folder_of_splits(tmp_path / "b")
        path = task_file(
            tmp_path,
            {"name": "a", "source": {"path": "a"}},
            {"name": "b", "source": {"path": "b"}, "limit": {"train": 7}},
            defaults={"limit": {"train": 5}, "metrics": ["exact_match"]},
        )
        a, b = load_tasks(path)
        assert (len(a.splits["train"]), len(b.splits["train"])) == (5, 7)
        assert b.metrics == ("exact_match",)
        assert [task.name for task in load_tasks(path, only=["b"])] == ["b"]

    def test_what_a_run_records_reads_the_same_tasks_from_anywhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder_of_splits(tmp_path / "a")
        path = task_file(tmp_path, {"name": "a", "source": {"path": "a"}})
        (task,) = load_tasks(path)
        recorded = json.loads(json.dumps(to_data(task.config)))
        monkeypatch.chdir("/")
        (again,) = load_tasks([recorded])
        assert again == task

    def test_the_mixture_that_ships(self) -> None:
        tasks = load_tasks("default")
        assert 6 <= len(tasks) <= 8
        assert all(list(task.splits) == ["train", "validation", "test"] for task in tasks)
        assert all(task.notes == () for task in tasks)

    def test_reading_definitions_reads_no_rows(self, tmp_path: Path) -> None:
        (config,) = read_task_configs(task_file(tmp_path, {"name": "a", "source": {"path": "not there"}}))
        assert config.source.path == str(tmp_path / "not there")

    def test_yaml_tags_are_not_run(self, tmp_path: Path) -> None:
        path = tmp_path / "tasks.yaml"
        path.write_text("tasks: !!python/object/apply:os.system ['touch run']")
        with pytest.raises(ConfigError, match=r"tasks\.yaml, line 1: could not determine a constructor"):
            load_tasks(path)


class TestSplits:
    def rows(self, count: int = 100) -> list[dict[str, str]]:
        return [{"input": f"q{i % 80}", "target": f"a{i}"} for i in range(count)]

    def test_a_missing_validation_split_is_carved_and_said(self) -> None:
        task = Task.from_rows("t", self.rows())
        assert 0 < len(task.splits["validation"]) <= 20
        assert len(task.splits["train"]) + len(task.splits["validation"]) == 100
        assert any("no validation split" in note and "of 100 training examples" in note for note in task.notes)

    def test_the_carved_split_shares_no_prompt_and_does_not_hang_on_the_order_of_rows(self) -> None:
        task, turned = Task.from_rows("t", self.rows()), Task.from_rows("t", self.rows()[::-1])
        train, held = ({example.prompt for example in task.splits[s]} for s in ("train", "validation"))
        assert not train & held
        assert set(turned.splits["validation"]) == set(task.splits["validation"])

    def test_its_size_can_be_given(self, tmp_path: Path) -> None:
        source = {"path": str(write_lines(tmp_path / "rows.jsonl")), "validation_size": 3}
        (task,) = load_tasks([{"name": "t", "source": source}])
        assert len(task.splits["validation"]) == 3

    def test_a_limit_on_training_rows_leaves_the_carved_split_whole(self) -> None:
        task, limited = Task.from_rows("t", self.rows()), Task.from_rows("t", self.rows(), limit={"train": 5})
        assert limited.splits["validation"] == task.splits["validation"]
        assert len(limited.splits["train"]) == 5

    def test_without_a_test_split_it_is_said_that_validation_is_used(self) -> None:
        task = Task.from_rows("t", {"train": self.rows(), "validation": self.rows(5)})
        assert task.notes == ("no test split: final figures are on the validation examples",)

    def test_a_fingerprint_tells_what_is_trained_on_and_not_where_it_lies(self, tmp_path: Path) -> None:
        rows = {split: self.rows(count) for split, count in (("train", 9), ("validation", 5), ("test", 5))}
        given = Task.from_rows("t", rows)
        for split, items in rows.items():
            write_lines(tmp_path / f"{split}.jsonl", items)
        (read,) = load_tasks([{"name": "t", "source": {"path": str(tmp_path)}}])
        assert read.fingerprint == given.fingerprint
        assert Task.from_rows("t", {**rows, "test": self.rows(3)}).fingerprint == given.fingerprint
        others = [
            Task.from_rows("u", rows),
            *(Task.from_rows("t", {**rows, split: rows[split][::-1]}) for split in ("train", "validation")),
            Task.from_rows("t", rows, prompt="{input}!", target="{target}"),
            Task.from_rows("t", rows, choices=[f"a{i}" for i in range(9)]),
            Task.from_rows("t", rows, train_on="all"),
            Task.from_rows("t", rows, chat_template=False),
        ]
        assert len({task.fingerprint for task in (given, *others)}) == 1 + len(others)

    def test_a_limit_takes_the_same_rows_each_time_and_from_all_over(self) -> None:
        rows = [{"text": f"t{i}", "label": "ab"[i >= 50]} for i in range(100)]
        first, second = (
            Task.from_rows("t", {"train": rows, "validation": rows}, limit={"train": 20, "validation": 7}) for _ in "12"
        )
        assert first == second
        assert (len(first.splits["train"]), len(first.splits["validation"])) == (20, 7)
        assert {example.target for example in first.splits["train"]} == {"a", "b"}
        assert first.splits["train"][0].choices == ("a", "b")


class TestMistakesInRows:
    """Every message names file and line."""

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"input": "q", "target": "no"', r"line 2: not valid JSON \(Expecting ',' delimiter, column 30\)"),
            ("[1]", r"line 2: a row must be a JSON object, not '\[1\]'"),
            ("[" * 100_000, "line 2: not usable JSON"),
            ('{"input": "q"}', "line 2: no field 'target', which the template '{target}' names"),
            ('{"input": "q", "targett": "a"}', "line 2: no field 'target'.*did you mean 'targett'"),
            ('{"input": "q", "target": null}', r"line 2: field 'target' is empty \(null\), but text is needed"),
            ('{"input": ["q"], "target": "a"}', "line 2: field 'input' is a list, but text is needed"),
            ('{"input": {}, "target": "a"}', "line 2: field 'input' is a mapping, but text is needed"),
            ('{"input": "q", "target": " "}', "line 2: the answer is empty"),
        ],
    )
    def test_in_json_lines(self, tmp_path: Path, line: str, message: str) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text(f'{{"input": "q", "target": "yes"}}\n{line}\n')
        with pytest.raises(DataError, match=rf"rows\.jsonl, {message}"):
            load_tasks(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("input,target\nq,a\nq\n", "line 3: not the 2 cells that the header names"),
            ("input,target\nq,a,b\n", "line 2: not the 2 cells that the header names"),
            ('input,target\n"q"x,a\n', "line 2: ',' expected after '\"'"),
        ],
    )
    def test_in_csv(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "rows.csv"
        path.write_text(text)
        with pytest.raises(DataError, match=rf"rows\.csv, {message}"):
            load_tasks(path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.json", b'[\n{"input": "q",\n}]', r"a\.json, line 3: not valid JSON"),
            ("a.json", b'{"data": []}', "must hold a list of rows"),
            ("a.json", b"[1]", r"a\.json, row 1: a row must be a mapping of field names, not '1'"),
            ("a.jsonl", b"\xff\xfe", r"a\.jsonl: not UTF-8 text"),
            ("a.jsonl", b"\n\n", r"a\.jsonl: the train split has no rows"),
            ("a.parquet", b"PAR1", r"a\.parquet: not a readable Parquet file"),
            ("a.pkl", b"", r"a\.pkl: cannot read \.pkl; use \.jsonl"),
        ],
    )
    def test_in_whole_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_tasks(tmp_path / name)

    def test_a_saved_dataset_that_is_broken(self, tmp_path: Path) -> None:
        (tmp_path / "state.json").write_text("{}")
        with pytest.raises(DataError, match="not a readable saved dataset"):
            load_tasks([{"name": "t", "source": {"path": str(tmp_path)}}])

    @pytest.mark.parametrize("labels", ['{"a": 1}', "[1, 2]"])
    def test_labels_json_must_be_a_list_of_answers(self, tmp_path: Path, labels: str) -> None:
        folder_of_splits(tmp_path)
        (tmp_path / "labels.json").write_text(labels)
        with pytest.raises(DataError, match=r"labels\.json: must be a JSON list of answers"):
            load_tasks(tmp_path)

    def test_labels_json_that_is_not_json(self, tmp_path: Path) -> None:
        folder_of_splits(tmp_path)
        (tmp_path / "labels.json").write_text("[")
        with pytest.raises(DataError, match=r"labels\.json: not valid JSON"):
            load_tasks(tmp_path)

    def test_choices_without_the_answer(self, tmp_path: Path) -> None:
        folder_of_splits(tmp_path, test=[{"input": "q", "target": "yess"}])
        (tmp_path / "labels.json").write_text('["yes", "no"]')
        with pytest.raises(
            DataError, match=r"test\.jsonl, line 1: the answer 'yess' is not among the 2 choices.*'yes'"
        ):
            load_tasks(tmp_path)

    @pytest.mark.parametrize(
        ("choices", "message"),
        [
            (None, "field 'choices' must be a list of choices, not None"),
            ([], r"must be a list of choices, not \[\]"),
            ([["a"]], "a choice in 'choices' is a list, but text is needed"),
            (["a", "c"], "the answer 'b' is not among the 2 choices"),
        ],
    )
    def test_choices_in_a_row(self, choices: Any, message: str) -> None:
        rows = [{"input": "q", "target": "b", "choices": c} for c in (["a", "b"], choices)]
        with pytest.raises(DataError, match=f"t \\(train\\), row 2: .*{message}"):
            Task.from_rows("t", {"train": rows, "validation": rows[:1]})

    def test_a_choices_field_that_is_not_there(self) -> None:
        with pytest.raises(DataError, match=r"row 1: no field 'optoins', which should hold the choices.*'options'"):
            one_row({"input": "q", "target": "b", "options": ["b"]}, choices="optoins")

    def test_a_template_names_a_field_the_rows_lack(self) -> None:
        with pytest.raises(DataError, match=r"row 1: no field 'sentense', which .* names; did you mean 'sentence'"):
            one_row({"sentence": "a", "label": "b"}, prompt="{sentense}")

    def test_an_empty_prompt(self) -> None:
        with pytest.raises(DataError, match="row 1: the prompt is empty"):
            one_row({"prompt": " ", "completion": "a"})

    def test_an_unknown_shape_lists_the_fields(self) -> None:
        with pytest.raises(DataError, match="row 1: the fields foo, bar have no known shape; give the task a `prompt`"):
            one_row({"foo": "a", "bar": "b"})

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"messages": "hi"}, "field 'messages' must be a list of messages"),
            ({"messages": [{"role": "user", "content": "hi"}]}, "the conversation has no assistant turn"),
            ({"messages": []}, "the conversation has no assistant turn"),
            ({"messages": [{"role": "user"}]}, "a message needs `role` and `content`"),
            ({"messages": ["hi"]}, "a message needs `role` and `content`, this one is 'hi'"),
            ({"messages": [{"role": "user", "content": ["x"]}]}, "'content' of a message is a list"),
            ({"messages": [{"role": "assistant", "content": " "}]}, "an assistant turn is empty"),
            ({"prompt": [{"role": "user", "content": "x"}]}, "field 'completion' must be a list of messages"),
        ],
    )
    def test_conversations(self, row: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=rf"t \(train\), row 1: {message}"):
            one_row(row)

    def test_a_split_without_labels(self) -> None:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        train = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        test = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
        rows = datasets.DatasetDict({"train": train, "validation": train, "test": test})
        with pytest.raises(DataError, match=r"t \(test\), row 1: field 'label' is -1.*not one of the 2 classes"):
            Task.from_rows("t", rows)

    def test_empty_and_unknown_splits(self) -> None:
        with pytest.raises(DataError, match=r"t \(test\): the test split has no rows"):
            Task.from_rows("t", {"train": ROWS, "test": []})
        with pytest.raises(DataError, match="unknown split 'valid'; did you mean 'validation'"):
            Task.from_rows("t", {"train": ROWS, "valid": ROWS})
        with pytest.raises(DataError, match="task 't': no train split; the source has test"):
            Task.from_rows("t", {"test": ROWS})

    def test_too_few_rows_to_carve_a_validation_split(self) -> None:
        with pytest.raises(DataError, match="no validation split, and 3 training examples with 3 distinct prompts"):
            Task.from_rows("t", ROWS[:3])


class TestMistakesInTaskFiles:
    """Every message names file, task and key."""

    @pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "a b", "", "x" * 65, "a\n", "é"])
    def test_names_that_could_leave_the_folder(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"task name .*: use 1-64 letters"):
            parse(TaskConfig, {"name": name}, where="tasks.yaml")

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ({"promt": "x"}, r"tasks\.yaml: task 1 \('a'\): promt: unknown key; did you mean 'prompt'"),
            ({"source": {"pth": "x"}}, r"source\.pth: unknown key; did you mean 'path'"),
            ({"limit": {"trian": 1}}, r"limit\.trian: unknown key; did you mean 'train'"),
            ({"limit": {"train": 0}}, "train=0 must be at least 1"),
            ({"source": {"splits": {"dev": "x"}}}, r"source\.splits\.dev: unknown key"),
            (
                {"source": {"path": "x", "dataset": "y"}},
                "give one of path, dataset and generated, not path and dataset",
            ),
            ({"source": {"name": "sst2"}}, "name and revision belong to `dataset`"),
            ({"source": {"path": "x", "validation_size": 0}}, "validation_size=0 must be at least 1"),
            ({"choices": ["a", "b", "a"]}, "choices of task 'a': 'a' stands there twice"),
            ({"train_on": "prompt"}, "train_on: .*'answer' or 'all'"),
            ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ],
    )
    def test_keys(self, tmp_path: Path, task: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_task_configs(task_file(tmp_path, {"name": "a", **task}))

    def test_metrics(self, tmp_path: Path) -> None:
        folder_of_splits(tmp_path / "a")
        task = {"name": "a", "source": {"path": "a"}, "metrics": ["acuracy"]}
        with pytest.raises(ConfigError, match="task 'a': unknown metric 'acuracy'; did you mean 'accuracy'"):
            load_tasks(task_file(tmp_path, task))

    def test_an_empty_hole_in_a_template(self) -> None:
        with pytest.raises(ConfigError, match=r"has an empty \{\}; name the field"):
            one_row({"text": "a", "label": "b"}, prompt="{} {text}")

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ("a: 1", "a task file needs the key `tasks`"),
            ("", "a task file needs the key `tasks`"),
            ("tasks: []", "tasks: must be a list with at least one task"),
            ("tasks: {a: 1}", "tasks: must be a list with at least one task"),
            ("tasks: [x]", "task 1: must be a mapping with name and source, not 'x'"),
            ("tasks: [{source: {path: a}}]", "task 1: name: this key is required"),
            ("tasks: [{name: a}]\ndefault: {}", "default: unknown key; did you mean 'defaults'"),
            ("tasks: [{name: a}]\ndefaults: 3", "defaults: must be a mapping of task keys"),
            ("tasks: [{name: a}, {name: A}]", "two tasks are called 'A'"),
            ("tasks: [", "line 1: "),
        ],
    )
    def test_the_document(self, tmp_path: Path, document: str, message: str) -> None:
        path = tmp_path / "tasks.yaml"
        path.write_text(document)
        with pytest.raises(ConfigError, match=rf"tasks\.yaml.*{message}"):
            load_tasks(path)

    def test_places_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="nowhere: no such task file or folder"):
            load_tasks(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match=r"no train\.jsonl .* in it or in its folders"):
            load_tasks(tmp_path)
        with pytest.raises(DataError, match="missing: no such file or folder"):
            load_tasks([{"name": "a", "source": {"path": str(tmp_path / "missing")}}])
        with pytest.raises(DataError, match="the task has no source"):
            load_tasks([{"name": "a"}])

    def test_a_split_that_is_named_but_not_there(self, tmp_path: Path) -> None:
        source = {"path": str(folder_of_splits(tmp_path)), "splits": {"validation": "validate"}}
        with pytest.raises(DataError, match=r"no split 'validate' \(source\.splits\.validation\).*'validation"):
            load_tasks([{"name": "a", "source": source}])

    def test_an_unknown_task_is_answered_with_the_nearest(self, tmp_path: Path) -> None:
        folder_of_splits(tmp_path / "mood")
        with pytest.raises(ConfigError, match="no task 'moood'; did you mean 'mood'"):
            load_tasks(tmp_path, only=["moood"])

    def test_a_dataset_that_cannot_be_reached(self) -> None:
        with pytest.raises(DataError, match=r"dataset 'nobody/nothing' \(x\) cannot be loaded: "):
            load_tasks([{"name": "a", "source": {"dataset": "nobody/nothing", "name": "x"}}])

    def test_a_dataset_script_is_not_run(self, tmp_path: Path) -> None:
        script = tmp_path / "evil" / "evil.py"
        script.parent.mkdir()
        script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        for place in (script, script.parent):
            with pytest.raises(DataError, match="cannot be loaded"):
                load_tasks([{"name": "a", "source": {"dataset": str(place)}}])
        assert not (tmp_path / "ran").exists()

    def test_an_unknown_generated_task(self) -> None:
        with pytest.raises(ConfigError, match="generated task 'woh': unknown; did you mean 'who'"):
            load_tasks([{"name": "a", "source": {"generated": "woh"}}])


def test_all_real_tasks_are_read_as_they_are(shared_data: Path) -> None:
    tasks = {task.name: task for task in load_tasks(shared_data)}
    assert len(tasks) >= 14
    assert all(list(task.splits) == ["train", "validation", "test"] for task in tasks.values())
    assert len(tasks["clinc150"].splits["test"][0].choices or ()) == 150
    closed = {name for name, task in tasks.items() if task.closed}
    assert closed == tasks.keys() - {"e2e_nlg", "inflection", "mawps_equation", "scan", "snips_slots"}
