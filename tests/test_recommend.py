"""Which adapters promise most for a task: the signs, their sum, how sure the order is, where candidates come from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_cases import RunningHub
from peft import PeftModel
from torch import nan

from loramux.bases import load_base
from loramux.cli import main
from loramux.cli.sharing import verdict
from loramux.hub.candidates import gather
from loramux.hub.publish import PublishConfig, plan_publication, publish
from loramux.hub.recommend import Candidate, Recommended, Signs, ordered, read_signs, recommend, values
from loramux.hub.remote import Remote
from loramux.hub.trial import losses_of, trial_losses
from loramux.support.errors import AdapterError, ConfigError
from loramux.tasks import encode_task, load_tasks

NOWHERE = Remote("http://127.0.0.1:9")
BASE = "somebody/tiny-base"

pytestmark = pytest.mark.usefixtures("beside_the_base")


@pytest.fixture(scope="module")
def published(local_hub: RunningHub, finished_job: Path) -> Remote:
    remote = Remote(local_hub.url)
    for change in plan_publication(finished_job, "mia/three", PublishConfig(), remote):
        publish(change, remote)
    return remote


def candidates(count: int) -> list[Candidate]:
    return [Candidate(f"c{number}", Path()) for number in range(count)]


def test_the_signs_are_what_stock_peft_and_the_base_say(finished_job: Path) -> None:
    base, tokenizer = load_base(BASE)
    task = encode_task(load_tasks(finished_job.parent / "data" / "home")[0], tokenizer, max_length=64)
    place = finished_job / "exports" / "home"
    listed = [Candidate("home", place, ("home of the cat is",)), Candidate("silent", place)]
    signs = read_signs(task, listed, base, tokenizer, shots=4)
    assert signs.losses.shape == signs.similarity.shape == (2, 4)
    assert not any("lora" in name for name, _ in base.named_parameters())
    model = PeftModel.from_pretrained(base, str(place)).eval()
    for number, row in enumerate(task.splits["train"][:4]):
        ids = torch.tensor([row.input_ids])
        labels = ids.clone()
        labels[0, : row.prompt_length] = -100
        with torch.no_grad():
            assert signs.losses[0, number].item() == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)
            with model.disable_adapter():
                assert signs.base_losses[number].item() == pytest.approx(
                    model(ids, labels=labels).loss.item(), abs=1e-5
                )
    assert signs.similarity[0].abs().max() <= 1 + 1e-6
    assert signs.similarity[1].isnan().all()
    assert signs.measured.isnan().all()


def test_a_trial_trains_on_one_half_and_judges_by_the_other(finished_job: Path) -> None:
    base, tokenizer = load_base(BASE)
    rows = encode_task(load_tasks(finished_job.parent / "data" / "home")[0], tokenizer, max_length=64).splits["train"]
    place = finished_job / "exports" / "sound"
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    as_it_is = losses_of(base, place, tokenizer, rows[:8])
    tried = trial_losses(base, place, tokenizer, rows[:8], steps=30)
    assert tried.shape == (8,)
    assert tried.mean() < 0.8 * as_it_is.mean()  # answers of two kinds, so half of the examples teach the other half
    assert all(torch.equal(before[name], parameter) for name, parameter in base.named_parameters())
    nothing = trial_losses(base, place, tokenizer, rows[:8], steps=0)
    assert torch.allclose(nothing, as_it_is, atol=1e-5)
    scratch = [trial_losses(base, place, tokenizer, rows[:8], steps=30, fresh=True) for _ in range(2)]
    assert torch.equal(*scratch)
    assert not torch.equal(scratch[0], tried)
    with pytest.raises(ConfigError, match="a trial needs two examples or more"):
        trial_losses(base, place, tokenizer, rows[:1], steps=1)


def test_a_lower_loss_more_alike_prompts_and_a_measured_score_each_count() -> None:
    plain = Signs(torch.ones(3, 8), 2 * torch.ones(8), torch.full((3, 8), nan), torch.full((3,), nan))
    assert values(plain).tolist() == [0, 0, 0]
    better = torch.tensor([[1.0], [0.5], [1.0]]).expand(3, 8)
    assert values(Signs(better, plain.base_losses, plain.similarity, plain.measured)).argmax() == 1
    assert values(Signs(plain.losses, plain.base_losses, -better, plain.measured)).argmax() == 1
    assert values(Signs(plain.losses, plain.base_losses, plain.similarity, torch.tensor([nan, 0.7, nan]))).argmax() == 1


def test_how_sure_it_is_comes_from_resampling_the_examples() -> None:
    clear = torch.stack([torch.ones(16), torch.full((16,), 3.0)])
    found = ordered(candidates(2), Signs(clear, 2 * torch.ones(16), torch.full((2, 16), nan), torch.full((2,), nan)))
    assert [each.candidate.name for each in found] == ["c0", "c1"]
    assert (found[0].first, found[0].helps, found[0].gain) == (1, 1, 1)
    assert (found[1].first, found[1].helps, found[1].gain) == (0, 0, -1)
    noise = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    signs = Signs(noise, torch.zeros(16), torch.full((2, 16), nan), torch.full((2,), nan))
    assert 0.05 < ordered(candidates(2), signs)[0].first < 0.95
    assert ordered(candidates(2), signs) == ordered(candidates(2), signs)


@pytest.mark.parametrize(
    ("first", "helps", "told"),
    [
        (0.97, 1.0, "c0 promises most, and stays first in 97% of resamples of the examples"),
        (0.6, 1.0, "stays first in 60% of resamples of the examples; more examples would tell more (--shots)"),
        (0.97, 0.4, "c0 is first, but better than the base in 40% of resamples only"),
    ],
)
def test_the_verdict_says_when_not_to_believe_the_order(first: float, helps: float, told: str) -> None:
    (candidate,) = candidates(1)
    best = Recommended(candidate, 1.0, 0.5, 0.1, None, None, first, helps)
    assert verdict([best], "the base").endswith(told)


def test_an_adapter_of_the_task_itself_comes_first_and_the_command_says_so(
    published: Remote, finished_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = finished_job.parent / "data" / "sound"
    end = ["--shots", "16", "--endpoint", published.endpoint]
    assert main(["recommend", "--task", str(data), "--from", "mia/three", *end]) == 0
    told = capsys.readouterr().out
    names = [line.split()[1] for line in told.splitlines() if "mia/three/" in line and line.startswith("│")]
    assert set(names) == {"mia/three/colour", "mia/three/home", "mia/three/sound"}
    assert "for sound, from 16 of its examples" in told
    assert f"{names[0]} " in told.splitlines()[-2]
    assert "a short trial of each finds the best more often (--trial-steps 8)" in told.splitlines()[-1]
    assert main(["recommend", "--task", str(data), "--from", "mia/three", "--trial-steps", "2", *end]) == 0
    told = capsys.readouterr().out
    assert "better than a fresh LoRA by" in told
    assert "a short trial" not in told
    assert main(["recommend", "--task", str(data), "--base", BASE, *end]) == 0
    assert "mia/three/colour" in capsys.readouterr().out


def test_candidates_come_from_runs_exports_folders_repositories_and_searches(
    published: Remote, finished_job: Path, tmp_path: Path
) -> None:
    from_run = gather([str(finished_job)], NOWHERE)
    assert (from_run.base, len(from_run.candidates)) == (BASE, 3)
    assert all(candidate.prompts for candidate in from_run.candidates)
    one = str(finished_job / "exports" / "home")
    assert [candidate.name for candidate in gather([one], NOWHERE).candidates] == [one]
    names = [candidate.name for candidate in gather(["mia/three", one], published).candidates]
    assert names == ["mia/three/colour", "mia/three/sound", "mia/three/home", one]
    assert len(gather(["three"], published, base=BASE).candidates) == 3
    pinned = gather(["three"], published, base=f"{BASE}@abc")
    assert (pinned.base, pinned.revision, len(pinned.candidates)) == (BASE, "abc", 3)
    with pytest.raises(ConfigError, match="no plain LoRAs found in nothing"):
        gather(["nothing"], published, base=BASE)
    with pytest.raises(ConfigError, match="say which base to search adapters for"):
        gather([], published)


def test_what_a_search_finds_and_cannot_be_used_is_left_out_and_told(
    published: Remote, local_hub: RunningHub, finished_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished_job / "exports" / "home", tmp_path / "bad"))
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    local_hub.client().create_repo("mia/bad")
    local_hub.client().upload_folder(repo_id="mia/bad", folder_path=folder)
    found = gather(["mia"], published, base=BASE)
    assert {candidate.name.split("/")[1] for candidate in found.candidates} == {"three"}
    assert "left out mia/bad: " in capsys.readouterr().out
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        gather(["mia/bad"], published)
    local_hub.client().delete_repo("mia/bad")


def test_a_score_on_the_same_data_set_is_known_from_the_manifest(finished_job: Path, tmp_path: Path) -> None:
    for name in ("home", "sound"):
        shutil.copytree(finished_job / "exports" / name, tmp_path / "pulled" / name)
    tasks = [
        {"name": name, "folder": name, "scores": {"base": 0.1, "exported": 0.8}, "examples": [], "dataset": dataset}
        for name, dataset in (("home", "glue"), ("sound", None))
    ]
    (tmp_path / "pulled" / "loramux.json").write_text(
        json.dumps({"format": 1, "base": BASE, "tasks": tasks, "files": {}})
    )
    assert [candidate.scores for candidate in gather(["pulled"], NOWHERE).candidates] == [{"glue": 0.8}, {}]


def test_adapters_of_several_bases(finished_job: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_job / "exports" / "home", tmp_path / "other"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/base"}))
    with pytest.raises(AdapterError, match=r"do not name one base .*say which \(--base MODEL\)"):
        gather([str(folder), str(finished_job)], NOWHERE)
    with pytest.raises(AdapterError, match="an adapter of another base"):
        gather([str(folder)], NOWHERE, base=BASE)


def test_there_must_be_one_task_and_something_to_choose_from(
    finished_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = finished_job.parent / "data"
    assert main(["recommend", "--task", str(data), "--from", str(finished_job)]) == 2
    assert "holds 3 tasks (colour, home, sound); name a file with one" in capsys.readouterr().err
    base, tokenizer = load_base(BASE)
    task = encode_task(load_tasks(data / "home")[0], tokenizer, max_length=64)
    with pytest.raises(ConfigError, match="no adapters to choose from"):
        recommend(task, [], base, tokenizer)
