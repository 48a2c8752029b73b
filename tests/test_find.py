"""Finding adapters on a hub, telling what a repository holds, and comparing two."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_cases import RunningHub
from huggingface_hub import CommitOperationAdd
from safetensors.torch import load_file, save_file

from loramux.adapters import LowRank
from loramux.cli import main
from loramux.hub.checks import AdapterConfig
from loramux.hub.diff import diff, layer_distance
from loramux.hub.find import describe, search
from loramux.hub.publish import PublishConfig, plan_publication, publish
from loramux.hub.remote import Remote
from loramux.support.errors import ConfigError, RemoteError

BASE = "somebody/tiny-base"

pytestmark = pytest.mark.usefixtures("beside_the_base")


@pytest.fixture(scope="module")
def remote(local_hub: RunningHub, finished_job: Path) -> Remote:
    """A hub with all three tasks in one repository and one of them in another."""
    remote = Remote(local_hub.url)
    for place, name in ((finished_job, "mia/three"), (finished_job / "exports" / "home", "tom/home")):
        for change in plan_publication(place, name, PublishConfig(licence="mit"), remote):
            publish(change, remote)
    local_hub.client().create_repo("mia/no-adapters")
    return remote


def test_adapters_are_found_by_name_base_method_and_owner(remote: Remote) -> None:
    assert {found.repository for found in search(remote)} == {"mia/three", "tom/home"}
    assert [found.repository for found in search(remote, owner="tom")] == ["tom/home"]
    assert [found.repository for found in search(remote, "three", base=BASE, method="moa")] == ["mia/three"]
    assert search(remote, base="somebody/else") == search(remote, method="smora") == []
    assert len(search(remote, limit=1)) == 1
    (found,) = search(remote, "three")
    assert (found.base, found.method) == (BASE, "moa")


def test_a_repository_is_described_from_its_small_files(remote: Remote) -> None:
    found = describe("mia/three", remote)
    assert (found.licence, found.private, found.is_signed, found.found.base) == ("mit", False, False, BASE)
    assert [held.folder for held in found.adapters] == ["colour", "home", "mixture", "sound"]
    home = found.adapters[1]
    assert (home.config.kind, home.config.facts["rank"]) == ("LORA", "8")
    assert "exact_match, exported" in home.scores
    assert found.adapters[2].config.facts["method"] == "moa"


def test_without_a_manifest_the_card_tells_the_scores(remote: Remote, local_hub: RunningHub) -> None:
    local_hub.client().delete_file("loramux.json", "tom/home")
    (held,) = describe("tom/home", remote).adapters
    assert held.scores["home: exact_match (task named)"] == pytest.approx(
        describe("mia/three", remote).adapters[1].scores["exact_match, task named"], abs=1e-5
    )


def test_a_repository_without_adapters(remote: Remote) -> None:
    with pytest.raises(RemoteError, match="mia/no-adapters: holds no PEFT adapter"):
        describe("mia/no-adapters", remote)


def test_texts_that_are_none_are_not_read(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.hub.remote.LARGEST_TEXT", 100)
    with pytest.raises(
        RemoteError, match=r"mia/three/loramux.json: \d+ bytes; 100 are the most that is read of a text"
    ):
        describe("mia/three", remote)


@pytest.mark.parametrize("name", ["loramux.json", "adapter_config.json"])
def test_nothing_large_is_fetched_to_describe_it(
    name: str, remote: Remote, local_hub: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = local_hub.client()
    api.create_repo("eve/huge", exist_ok=True)
    files = {"adapter_config.json": b'{"peft_type": "LORA"}', name: b" " * 200}
    api.create_commit("eve/huge", [CommitOperationAdd(*file) for file in files.items()], commit_message="huge")
    monkeypatch.setattr("loramux.hub.remote.LARGEST_TEXT", 100)
    with pytest.raises(RemoteError, match=f"eve/huge/{name}: 200 bytes; 100 are the most"):
        describe("eve/huge", remote)
    api.delete_repo("eve/huge")


@pytest.mark.parametrize("options", [None, [], "rank", {}])
def test_a_config_with_odd_options_has_facts_all_the_same(options: object) -> None:
    facts = AdapterConfig("LORAMUX", None, None, {"options": options, "target_modules": "all-linear"}).facts
    assert facts == {"kind": "LORAMUX", "base": "none", "revision": "none", "targets": "all-linear"}


def test_the_commands_print_it(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    end = ["--endpoint", remote.endpoint]
    assert main(["search", "three", "--base", BASE, *end]) == 0
    assert "mia/three" in capsys.readouterr().out
    assert main(["search", "nowhere", *end]) == 0
    assert "has no such adapters" in capsys.readouterr().out
    assert main(["info", "mia/three", *end]) == 0
    told = capsys.readouterr().out
    assert all(text in told for text in (f"base: {BASE}", "licence: mit", "signed: no", "mixture", "task named"))
    assert main(["diff", "mia/three", "mia/three@main", *end]) == 0
    assert "colour: same settings and scores\nweights: 0 apart on average" in capsys.readouterr().out


def test_adapters_are_compared_setting_by_setting_and_layer_by_layer(
    remote: Remote, finished_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(finished_job / "exports" / "home", tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({n: 2 * t if "lora_B" in n else t for n, t in tensors.items()}, other / "adapter_model.safetensors")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    (pair,) = diff(str(finished_job / "exports" / "home"), str(other), remote).pairs  # twice B at half the scale
    assert pair.settings == {"alpha": ("8", "4")}
    assert pair.layers
    assert max(layer.apart for layer in pair.layers) < 1e-6
    (other / "adapter_config.json").write_text(json.dumps(config))
    (pair,) = diff("tom/home", str(other), remote).pairs
    assert pair.layers
    assert all(layer.apart == pytest.approx(0.5) and layer.cosine == pytest.approx(1) for layer in pair.layers)
    assert main(["diff", "tom/home", str(other), "--endpoint", remote.endpoint]) == 0
    told = capsys.readouterr().out
    assert "updates by layer" in told
    assert "home / other: same settings and scores" in told
    mixture = str(finished_job / "mixture")
    assert main(["diff", mixture, str(other), "--endpoint", remote.endpoint]) == 0
    assert "mixture / other: what differs (scores in %)" in capsys.readouterr().out


def test_places_with_several_adapters_are_matched_by_name(remote: Remote, finished_job: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_job / "exports" / "home", tmp_path / "mine" / "home")
    shutil.copytree(finished_job / "exports" / "home", tmp_path / "mine" / "new")
    found = diff("mia/three", str(tmp_path / "mine"), remote)
    assert [pair.folder for pair in found.pairs] == ["home"]
    assert (found.only_first, found.only_second) == (["colour", "mixture", "sound"], ["new"])


def test_mixtures_are_compared_by_settings_alone(remote: Remote, finished_job: Path, capsys) -> None:
    mixture = str(finished_job / "mixture")
    assert main(["diff", mixture, str(finished_job / "exports" / "home"), "--endpoint", remote.endpoint]) == 0
    assert "weights: only plain LoRAs of one base are compared" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds no adapters"):
        diff(str(finished_job / "checkpoints"), mixture, remote)


def test_distances_are_those_of_the_whole_matrices() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(rank: int) -> LowRank:
        return LowRank(torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator))

    first, second = drawn(2), drawn(3)
    found = layer_distance("x", first, second)
    a, b = first.delta(), second.delta()
    assert (found.first, found.second) == (pytest.approx(a.norm().item()), pytest.approx(b.norm().item()))
    assert found.apart == pytest.approx(((a - b).norm() / max(a.norm(), b.norm())).item())
    assert found.cosine == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
    assert (layer_distance("x", first, None).apart, layer_distance("x", first, None).cosine) == (1, None)
    assert layer_distance("x", None, None).apart == 0
