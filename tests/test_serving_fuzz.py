"""Whatever the published schema allows, and what it does not: never an internal error, always the published shape."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_cases import Live, live_server, write_loras


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    loras = write_loras(tmp_path_factory.mktemp("loras"), "red")
    limits = {"answer_tokens": 8, "deadline_s": 5.0}
    with live_server(adapters=[str(loras)], limits=limits) as running:
        yield running


def fuzz(live: Live, examples: int) -> None:
    """Ask every route what its schema allows, and what it does not; every answer must be of the published kind.

    That all a schema allows is accepted is not asked for: no schema tells which models and tokens there are.
    """
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 16
    limits = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    problems: list[str] = []
    for operation in operations:
        for mode in GenerationMode:

            @limits
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            try:
                ask()
            except Unsatisfiable:
                continue  # a route without parameters cannot be asked wrongly
            except FailureGroup as error:
                problems.append(f"{operation.label}, {mode.value}: {error}")
    assert not problems, "\n\n".join(problems)
    assert live.call("GET", "/health").status_code == 200


def test_a_few_requests_to_every_route(live):
    fuzz(live, 4)


@pytest.mark.slow
def test_many_requests_to_every_route(live):
    fuzz(live, 100)
