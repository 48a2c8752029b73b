"""What the engine is made of: timelines of keys and values, gathered adapters, queues, samplers, text."""

from collections import Counter

import pytest
import torch
from engine_cases import tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import framing, merging

from loramux.adapters import LowRank
from loramux.serving.factors import FactorLayout, Group, combine
from loramux.serving.fair_queue import FairQueue
from loramux.serving.kv_timeline import KvTimeline
from loramux.serving.prefixes import Prefixes
from loramux.serving.request import Route, Sampling
from loramux.serving.sampling import RowSampler, choose
from loramux.serving.slots import RowAdapters
from loramux.serving.text import Speller, TextStream

LAYOUT = FactorLayout((Group(("q", "k"), 6, (5, 3)), Group(("o",), 5, (6,))))
SIZES = {"q": (6, 5), "k": (6, 3), "o": (5, 6)}


def random_pair(name: str, rank: int) -> LowRank:
    into, out = SIZES[name]
    return LowRank(torch.randn(rank, into), torch.randn(out, rank))


def deltas(vector: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    return {
        name: ups[index].T @ downs[index]
        for group, downs, ups in LAYOUT.views(vector, rank)
        for index, name in enumerate(group.names)
    }


# ---------------------------------------------------------------------- adapters in memory


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3), shares=st.lists(st.floats(-2, 2), min_size=3))
@settings(deadline=None, max_examples=30)
def test_a_combined_vector_is_the_weighted_sum_of_its_adapters(ranks, shares):
    factors = [{name: random_pair(name, max(1, rank - i)) for i, name in enumerate("qo")} for rank in ranks]
    parts = [(LAYOUT.pack(f, torch.float32), share) for f, share in zip(factors, shares, strict=False)]
    room = sum(lora.rank for lora, _ in parts) + 2
    vector = torch.full((room * LAYOUT.width,), torch.nan)
    combine(LAYOUT, parts, room, vector)
    found = deltas(vector, room)
    for name in "qo":
        wanted = sum(share * f[name].delta() for f, (_, share) in zip(factors, parts, strict=True))
        assert torch.allclose(found[name], wanted, atol=1e-5)
    assert (found["k"] == 0).all()


def test_an_adapter_knows_which_linears_it_changes():
    assert LAYOUT.pack({"o": random_pair("o", 2)}, torch.float32).groups == {1}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=25))
@settings(deadline=None, max_examples=40)
def test_gathered_rows_keep_step_with_joins_and_leaves(moves):
    torch.manual_seed(0)
    loras = [
        LAYOUT.pack({n: random_pair(n, 1 + i) for n in names}, torch.float32)
        for i, names in enumerate(["qko", "o", "q"])
    ]
    routes = [Route(f"r{i}", f"r{i}", ((lora, 1.0),)) for i, lora in enumerate(loras)]
    routes += [Route("mix", "mix", ((loras[0], 0.5), (loras[2], -1.0))), Route("base", "base"), Route("base", "base")]
    rows, expected = RowAdapters(LAYOUT, torch.float32, torch.device("cpu")), []
    for kind, leaves in moves:
        if leaves and expected:
            at = kind % len(expected)
            rows.remove(at)
            last = expected.pop()
            if at < len(expected):
                expected[at] = last
        else:
            rows.add(routes[kind])
            expected.append(routes[kind])
        if not expected:
            continue
        x = torch.randn(len(expected), 2, 6)
        operands = rows.operands()[0]
        for index, (name, out) in enumerate((("q", 5), ("k", 3))):
            output = torch.zeros(len(expected), 2, out)
            if operands is not None:
                operands.add_to(output, x, index)
            for row, route in enumerate(expected):
                alone = torch.zeros(max(1, route.rank) * LAYOUT.width)
                combine(LAYOUT, route.parts, max(1, route.rank), alone)
                wanted = x[row] @ deltas(alone, max(1, route.rank))[name].T
                assert torch.allclose(output[row], wanted, atol=1e-4)


def test_a_wide_adapter_that_left_costs_the_others_nothing():
    def route(name: str, rank: int) -> Route:
        return Route(name, name, ((LAYOUT.pack({"q": random_pair("q", rank)}, torch.float32), 1.0),))

    rows = RowAdapters(LAYOUT, torch.float32, torch.device("cpu"))
    for name, rank in (("a", 2), ("wide", 64), ("b", 2)):
        rows.add(route(name, rank))
    rows.operands()
    assert rows.rank == 64
    rows.remove(1)
    rows.operands()
    assert rows.rank == 2


# ---------------------------------------------------------------------- keys and values


def run(timeline: KvTimeline, tokens: list[list[float]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write tokens as keys and values; returns what each row may look at, by the mask."""
    new = len(tokens[0])
    inputs = timeline.inputs(new)
    states = torch.tensor(tokens).reshape(len(tokens), 1, new, 1)
    keys, values = inputs["past_key_values"].update(states, -states, 0)
    timeline.advance(new)
    assert keys.isfinite().all()
    return [(k[0, mask, 0], v[0, mask, 0]) for k, v, mask in zip(keys, values, inputs["attention_mask"], strict=True)]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_every_row_sees_its_own_tokens_in_order_whatever_others_do(data):
    timeline, rows, counter = KvTimeline(layers=1), [], 1.0
    for _ in range(data.draw(st.integers(1, 12))):
        if rows and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(rows) - 1))
            timeline.remove(at)
            last = rows.pop()
            if at < len(rows):
                rows[at] = last
        else:
            length = data.draw(st.sampled_from([1, 3, 90, 200]))
            tokens = [counter + i for i in range(length)]
            counter += length
            other = KvTimeline(1, [2], 2, columns=2 + length)
            run(other, [tokens])
            timeline.join(other, 0)
            rows.append(tokens)
        for _ in range(data.draw(st.integers(0, 40)) if rows else 0):
            new = [[counter + i] for i in range(len(rows))]
            counter += len(rows)
            seen = run(timeline, new)
            for row, (token,) in zip(rows, new, strict=True):
                row.append(token)
            for row, (keys, values) in zip(rows, seen, strict=True):
                assert keys.tolist() == row
                assert values.tolist() == [-token for token in row]


def test_what_a_row_leaves_behind_never_reaches_another():
    timeline = KvTimeline(layers=1)
    for values in ([torch.nan] * 50, [1.0] * 3):
        other = KvTimeline(1, [0], 0, columns=len(values))
        other.inputs(len(values))["past_key_values"].update(
            torch.tensor(values).reshape(1, 1, -1, 1), torch.zeros(1, 1, len(values), 1), 0
        )
        other.advance(len(values))
        timeline.join(other, 0)
    timeline.remove(0)
    keys, _ = timeline.inputs(1)["past_key_values"].update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    assert keys.isfinite().all()


def test_positions_count_from_each_rows_own_start():
    timeline = KvTimeline(1, [0, 3], 0, columns=5)
    assert timeline.inputs(5)["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert timeline.inputs(5)["attention_mask"].tolist()[1] == [False, False, False, True, True]


def test_prefixes_keep_the_longest_and_forget_the_oldest():
    def pairs(count):
        return [(torch.arange(count).float().reshape(1, count, 1), torch.zeros(1, count, 1))]

    kept = Prefixes(limit_bytes=3 * 8 * 20)
    kept.keep("w", list(range(20)), pairs(20))
    kept.keep("w", list(range(10)), pairs(10))
    assert kept.find("other", list(range(20))) is None
    found = kept.find("w", [*range(12), 99, 98])
    assert found is not None
    assert found[0][0].flatten().tolist() == list(range(12))
    assert kept.find("w", [5, 6]) is None
    for start in (100, 200, 300):
        kept.keep("w", list(range(start, start + 20)), pairs(20))
    assert kept.find("w", list(range(20))) is None
    assert kept.nbytes <= 3 * 8 * 20


# ---------------------------------------------------------------------- queue, samplers, text


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=30))
def test_a_queue_gives_everything_once_and_each_name_in_order(items):
    queue: FairQueue[int] = FairQueue()
    for number, (name, cost) in enumerate(items):
        queue.push(name, cost, number)
    assert queue.waiting == Counter(name for name, _ in items)
    order = [queue.pop() for _ in items]
    assert sorted(order) == list(range(len(items)))
    for name in "abc":
        mine = [number for number in order if items[number][0] == name]
        assert mine == sorted(mine)
    assert not queue.waiting
    assert len(queue) == 0


def test_a_late_name_goes_before_a_crowd_and_cannot_save_up_its_share():
    queue: FairQueue[str] = FairQueue()
    for number in range(10):
        queue.push("crowd", 10, f"crowd{number}")
    assert [queue.pop() for _ in range(3)] == ["crowd0", "crowd1", "crowd2"]
    for number in range(3):
        queue.push("late", 10, f"late{number}")
    order = [queue.pop() for _ in range(6)]
    assert order.index("late0") <= 1
    assert order.index("late2") > 3


def test_what_a_longer_prefix_says_is_not_kept_again():
    pairs = [(torch.zeros(1, 20, 1), torch.zeros(1, 20, 1))]
    kept = Prefixes(limit_bytes=10_000)
    kept.keep("w", list(range(20)), pairs)
    before = kept.nbytes
    kept.keep("w", list(range(12)), [(keys[:, :12], values[:, :12]) for keys, values in pairs])
    assert kept.nbytes == before


def test_removed_items_do_not_come_out():
    queue: FairQueue[int] = FairQueue()
    for number in range(6):
        queue.push("ab"[number % 2], 1, number)
    queue.remove({0, 3})
    assert sorted(queue) == [1, 2, 4, 5]
    assert queue.waiting == {"a": 2, "b": 2}


def sampled(logits: list[float], count: int = 300, **settings: object) -> Counter[int]:
    sampler = RowSampler(Sampling(seed=0, **settings), None, torch.device("cpu"))
    return Counter(choose(torch.tensor([logits]), [sampler]).tokens[0] for _ in range(count))


def test_sampling_follows_the_probabilities():
    drawn = sampled([2.0, 1.0, 0.0, -20.0], count=4000)
    shares = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    for token, share in enumerate(shares.tolist()):
        assert drawn[token] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "possible"),
    [({"temperature": 0.0}, {0}), ({"top_k": 2}, {0, 1}), ({"top_p": 0.3}, {0}), ({"top_p": 0.85}, {0, 1}),
     ({"logit_bias": {2: 100.0}}, {2}), ({"temperature": 0.01}, {0}),
     ({"temperature": 1e-38}, {0}), ({"temperature": 1e-60}, {0}), ({"temperature": 1e-38, "top_p": 0.5}, {0})],
)  # fmt: skip
def test_what_can_be_drawn(settings, possible):
    assert set(sampled([2.0, 1.5, 0.0], **settings)) == possible


def test_penalties_count_what_was_made():
    sampler = RowSampler(Sampling(temperature=0, frequency_penalty=1.0), None, torch.device("cpu"))
    made = []
    for _ in range(4):
        made.append(choose(torch.tensor([[2.0, 1.5]]), [sampler]).tokens[0])
        sampler.note(made[-1])
    assert made == [0, 1, 0, 1]


def test_rows_with_values_that_are_not_finite_are_told():
    rows = [RowSampler(Sampling(seed=0), None, torch.device("cpu")) for _ in range(2)]
    found = choose(torch.tensor([[torch.nan, 1.0], [0.0, 5.0]]), rows)
    assert found.broken == {0}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_base()[1]


@pytest.mark.parametrize("make", [lambda: tiny_base()[1], framing, merging])
def test_tokens_are_spelled_as_they_stand_within_a_text(make):
    tokenizer = make()
    ids = tokenizer("mia hid the red cup in the garden.", add_special_tokens=False)["input_ids"]
    spelled = "".join(map(Speller(tokenizer).spell, ids))
    assert spelled.strip() == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    assert " red" in spelled


def test_a_part_of_a_character_has_no_spelling(tokenizer):
    parts = [Speller(tokenizer).spell(token) for token in tokenizer("漢", add_special_tokens=False)["input_ids"]]
    assert "\ufffd" in "".join(parts)


@given(text=st.text(alphabet="abc é漢🙂\n.", max_size=40))
@settings(deadline=None, max_examples=40)
def test_streamed_text_adds_up_to_the_text_of_all_tokens(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer, (), streams=True)
    pieces = [stream.add(token) for token in tokens]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text(alphabet="ab ", max_size=30), stop=st.text(alphabet="ab ", min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_nothing_of_a_stop_string_is_ever_given(tokenizer, text, stop):
    tokens = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    stream, given = TextStream(tokenizer, (stop,), streams=True), ""
    for token in tokens:
        given += stream.add(token)
        if stream.is_stopped:
            break
    given += stream.finish()
    assert given == (whole[: whole.index(stop)] if stop in whole else whole)
    assert stream.is_stopped == (stop in whole)
