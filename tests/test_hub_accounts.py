"""Who may do what on a hub with tokens; `loramux hub` on the command line."""

import os
import re
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hub_cases import RunningHub, running_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from loramux.cli import main
from loramux.hub.server import HubError, Storage, serve
from loramux.hub.server.accounts import Accounts
from loramux.hub.server.clean import clean
from loramux.hub.server.database import Database
from loramux.support.errors import ConfigError


class Team:
    """A hub with mia (also a reading token) and bob of the organisation `team`, and eve, who is a stranger to it."""

    def __init__(self, hub: RunningHub) -> None:
        self.hub, accounts = hub, hub.storage.accounts
        self.mia, self.bob, self.eve = (hub.client(accounts.create_token(name)) for name in ("mia", "bob", "eve"))
        self.reader = hub.client(accounts.create_token("mia", read_only=True))
        self.nobody = hub.client(None)
        accounts.add_members("team", ["mia", "bob"])
        self.mia.create_repo("mia/open")
        self.mia.create_repo("mia/secret", private=True)
        self.bob.create_repo("team/ours", private=True)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with running_hub(tmp_path_factory.mktemp("team")) as hub:
        yield Team(hub)


def put(client: HfApi, repo: str, name: str = "a.txt") -> None:
    client.upload_file(repo_id=repo, path_or_fileobj=name.encode(), path_in_repo=name)


def test_everybody_sees_what_is_open_and_members_what_is_theirs(team: Team) -> None:
    def visible(client: HfApi) -> set[str]:
        return {model.id for model in client.list_models()}

    assert visible(team.nobody) == visible(team.eve) == {"mia/open"}
    assert visible(team.mia) == visible(team.reader) == {"mia/open", "mia/secret", "team/ours"}
    assert visible(team.bob) == {"mia/open", "team/ours"}
    assert team.mia.whoami()["orgs"][0]["name"] == "team"
    assert {member.username for member in team.bob.list_organization_members("team")} == {"mia", "bob"}


def test_private_repos_look_like_missing_ones(team: Team) -> None:
    put(team.mia, "mia/secret")
    for client in (team.nobody, team.eve, team.bob):
        for ask in (client.model_info, client.list_repo_files, client.list_repo_refs, client.list_repo_commits):
            with pytest.raises(RepositoryNotFoundError):
                list(ask("mia/secret"))
        with pytest.raises(RepositoryNotFoundError):
            client.hf_hub_download("mia/secret", "a.txt")
    assert team.reader.list_repo_files("mia/secret") == ["a.txt"]
    put(team.mia, "team/ours")


@pytest.mark.parametrize(
    ("who", "status", "message"),
    [
        ("nobody", 401, "log in with a token"),
        ("reader", 403, "only reads"),
        ("eve", 403, "'eve' may not write in 'mia'"),
    ],
)
def test_only_writers_of_a_namespace_write_there(team: Team, who: str, status: int, message: str) -> None:
    client = getattr(team, who)
    for change in (
        lambda: put(client, "mia/open"),
        lambda: client.create_repo("mia/new"),
        lambda: client.delete_repo("mia/open"),
        lambda: client.create_tag("mia/open", tag="v1"),
        lambda: client.update_repo_settings("mia/open", private=True),
        lambda: client.move_repo("mia/open", "mia/moved"),
    ):
        with pytest.raises(HfHubHTTPError, match=message) as caught:
            change()
        assert caught.value.response.status_code == status


def test_repos_do_not_move_into_foreign_namespaces(team: Team) -> None:
    team.eve.create_repo("eve/one")
    with pytest.raises(HfHubHTTPError, match="may not write in 'mia'"):
        team.eve.move_repo("eve/one", "mia/one")
    with pytest.raises(HfHubHTTPError, match="already created this model repo: mia/OPEN"):
        team.mia.create_repo("mia/OPEN")


def test_visibility_changes_and_odd_settings_are_refused(team: Team) -> None:
    team.bob.create_repo("bob/turning")
    team.bob.update_repo_settings("bob/turning", private=True)
    assert not team.nobody.repo_exists("bob/turning")
    team.bob.update_repo_settings("bob/turning", private=False)
    assert team.nobody.repo_exists("bob/turning")
    with pytest.raises(HfHubHTTPError, match="has no setting"):
        team.bob.update_repo_settings("bob/turning", gated="auto")


@pytest.mark.parametrize("token", ["hf_", "hf_0123", "nonsense", "hf_" + "0" * 40])
def test_unknown_tokens_are_refused_even_for_what_is_open(team: Team, token: str) -> None:
    with team.hub.web(token) as web:
        answer = web.get("/api/models")
    assert (answer.status_code, "unknown, revoked or expired" in answer.text) == (401, True)


def test_tokens_expire_and_can_be_revoked_and_their_secrets_are_not_kept(tmp_path: Path) -> None:
    accounts = Accounts(Database(tmp_path / "hub.sqlite"))
    assert accounts.is_open()
    token, short = accounts.create_token("mia"), accounts.create_token("mia", lifetime=timedelta(seconds=-1))
    assert accounts.caller(token).name == "mia"
    for wrong in (short, token[:-1], token[:-1] + "~", token[:11]):
        with pytest.raises(HubError, match="unknown, revoked or expired"):
            accounts.caller(wrong)
    accounts.revoke(accounts.tokens()[0].id)
    with pytest.raises(HubError, match="unknown, revoked or expired"):
        accounts.caller(token)
    with pytest.raises(ConfigError, match="no valid token has the id"):
        accounts.revoke(accounts.tokens()[0].id)
    assert not accounts.is_open(), "a hub whose last token is gone must not be everybody's"
    dump = "\n".join(sqlite3.connect(tmp_path / "hub.sqlite").iterdump())
    assert token[11:] not in dump


def test_users_and_organisations_do_not_share_names(tmp_path: Path) -> None:
    accounts = Accounts(Database(tmp_path / "hub.sqlite"))
    accounts.create_token("mia")
    accounts.add_members("team", ["mia"])
    with pytest.raises(ConfigError, match="'team' is the name of an organisation already"):
        accounts.create_token("team")
    with pytest.raises(ConfigError, match="'mia' is the name of a user already"):
        accounts.add_members("mia", [])
    with pytest.raises(ConfigError, match="'bob' is no member of 'team'"):
        accounts.remove_member("team", "bob")
    accounts.remove_member("team", "mia")
    assert accounts.organizations() == {"team": []}


def test_a_hub_without_tokens_stays_on_its_machine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0: other machines would reach this hub"):
        serve(tmp_path, host="0.0.0.0")


def test_tokens_and_organisations_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str, fails: bool = False) -> str:
        assert (main(["hub", *arguments, "--root", str(tmp_path)]) == 2) is fails
        out, err = capsys.readouterr()
        return err if fails else out

    token = run("token", "create", "mia", "--days", "9", "--note", "laptop").splitlines()[0]
    assert Storage(tmp_path).accounts.caller(token).role == "write"
    assert "laptop" in run("token", "list")
    assert "bob, mia" in run("org", "add", "team", "mia", "bob")
    assert "bob" not in run("org", "remove", "team", "bob")
    assert "team" in run("org", "list")
    assert "invalid from now on" in run("token", "revoke", token[3:11])
    assert "revoked" in run("token", "list")
    assert "no valid token has the id" in run("token", "revoke", token[3:11], fails=True)
    assert re.search(r"0 files removed, 0.0 MiB freed", run("clean"))


@pytest.mark.parametrize("days", ["0", "-1", "1.5"])
def test_a_token_is_never_made_valid_for_ever_by_mistake(days: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["hub", "token", "create", "mia", "--days", days, "--root", str(tmp_path)])
    accounts = Accounts(Database(tmp_path / "hub.sqlite"))
    token = accounts.create_token("mia", lifetime=timedelta(0))
    assert accounts.tokens()[0].expires is not None
    assert token


@pytest.mark.parametrize("command", ["token list", "token revoke 01234567", "org list", "org remove team mia", "clean"])
def test_a_folder_that_is_no_hub_is_told_and_not_made_one(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hub", *command.split(), "--root", str(tmp_path / "hbu")]) == 2
    assert "hbu: no hub there; " in capsys.readouterr().err
    assert not (tmp_path / "hbu").exists()


def test_cleaning_frees_what_no_commit_names(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        client = hub.client()
        for repo in ("a/stays", "a/goes"):
            client.create_repo(repo)
            client.upload_file(repo_id=repo, path_or_fileobj=os.urandom(1_200_000), path_in_repo="large.bin")
            client.upload_file(repo_id=repo, path_or_fileobj=repo.encode(), path_in_repo="small.txt")
        client.delete_repo("a/goes")
        assert clean(hub.storage, timedelta(hours=1)).files == 0, "what is young may be about to be committed"
        cleaned = clean(hub.storage, timedelta(seconds=-1))
        assert (cleaned.files, cleaned.size) == (2, 1_200_006)
        kept = Path(client.snapshot_download("a/stays", cache_dir=tmp_path / "cache"))
        assert {path.name for path in kept.iterdir()} == {"large.bin", "small.txt"}
