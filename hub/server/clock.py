"""Times as the Hub writes them: UTC with milliseconds, such as 2026-11-21T13:00:00.000Z, which sort as text."""

from datetime import UTC, datetime, timedelta


def now(ahead: timedelta = timedelta()) -> str:
    return (datetime.now(UTC) + ahead).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
