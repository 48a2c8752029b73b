"""Frees what deleted repos, deleted branches, forgotten history and given-up uploads left."""

from dataclasses import dataclass
from datetime import timedelta

from .clock import now
from .storage import Storage


@dataclass(frozen=True)
class Cleaned:
    """What is gone: files from the disk and from the database, and the bytes of both."""

    files: int
    size: int


def clean(storage: Storage, older_than: timedelta) -> Cleaned:
    """Remove commits that no branch and no tag leads to, and trees, small and large files that no commit names, if
    nobody sent them within `older_than`.

    It may run beside a serving hub: what is being uploaded is younger, and whatever takes long goes on beside it.
    """
    before, seconds = now(-older_than), older_than.total_seconds()
    with storage.database.read() as connection:
        keys = [row["key"] for row in connection.execute("SELECT key FROM repos")]
    for key in keys:
        storage.history.forget_unreached(key)
    old = storage.files.all_older_than(seconds)
    with storage.database.write() as connection:
        connection.execute("DELETE FROM trees WHERE digest NOT IN (SELECT tree FROM commits)")
        unused = "FROM contents WHERE at < ? AND sha256 NOT IN (SELECT sha256 FROM repo_files)"
        count, size = connection.execute(f"SELECT count(*), total(length(data)) {unused}", (before,)).fetchone()
        connection.execute(f"DELETE {unused}", (before,))
        connection.execute("DELETE FROM uploads WHERE at < ?", (before,))
        used = {
            row["sha256"]
            for row in connection.execute("SELECT sha256 FROM repo_files UNION SELECT sha256 FROM uploads")
        }
        for sha256 in set(old) - used:
            if storage.files.is_older_than(seconds, sha256):  # still: it may have been asked for since
                count, size = count + 1, size + (storage.files.size(sha256) or 0)
                storage.files.remove(sha256)
    return Cleaned(count, int(size))
