"""What is asked in a thread of its own has a bound, whatever becomes of the thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import wait_for

from pgdbpool import CredentialError
from pgdbpool._config.load import load
from pgdbpool._servers.host_names import Name, UnresolvedError
from pgdbpool._util import background_call as asking
from pgdbpool._util.background_call import BackgroundCall, SingleFlight


@pytest.fixture
def released() -> Any:
    """An event for which questions wait; set after the test."""
    event = threading.Event()
    yield event
    event.set()


def question(ask: Callable[[], str]) -> BackgroundCall[str]:
    return BackgroundCall(ask, "a word", CredentialError)


def endpoint(**entry: Any) -> Any:
    return load({"db": entry, "groups": {"g": {"connection_count": 1}}}).endpoints[0]


def test_a_thread_that_ends_before_it_runs_is_a_question_without_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As does one that an asynchronous exception hits which was meant for the thread that started it."""
    monkeypatch.setattr(asking._thread, "start_new_thread", lambda *_: 1)
    monkeypatch.setattr(asking, "BORN_WITHIN", 0.1)
    asked = question(lambda: "said")
    assert asked.under_way
    asked.wait(time.monotonic() + 5)
    assert asked.over
    with pytest.raises(CredentialError, match="a word: no answer"):
        asked.answer()


def test_without_a_thread_it_is_called_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asking._thread, "start_new_thread", refuse)
    assert question(lambda: "said").answer() == "said"


def test_one_that_hangs_is_asked_again_after_a_while_a_few_times(
    monkeypatch: pytest.MonkeyPatch, released: Any
) -> None:
    one: SingleFlight[BackgroundCall[str]] = SingleFlight()

    def asked() -> BackgroundCall[str]:
        return one.asking(lambda: question(lambda: str(released.wait(20))))

    first = asked()
    assert asked() is first
    monkeypatch.setattr(asking, "AGAIN_AFTER", 0.0)
    others = {id(asked()) for _ in range(20)}
    assert len(others) == asking.AT_MOST - 1
    released.set()
    wait_for(lambda: first.over)
    assert first.answer() == "True"


def test_a_removed_name_stands_for_nothing_at_once(monkeypatch: pytest.MonkeyPatch, released: Any) -> None:
    """Where there were no addresses, libpq would take a server on this machine."""
    name = Name("db.test", "5432", "db", ("127.0.0.9",))

    def gone(*_: Any, **__: Any) -> Any:
        released.wait(20)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", gone)
    resolving = name.asking()
    resolving.wait(time.monotonic() + 0.1)
    assert resolving.answer() == ("127.0.0.9",)
    released.set()
    wait_for(lambda: resolving.over)
    assert name.known == ()
    with pytest.raises(UnresolvedError, match=r"failed to resolve host 'db\.test'"):
        resolving.answer()


def test_a_callable_that_was_late_once_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, released: Any
) -> None:
    name = Name("db.test", "5432", "db", ("127.0.0.9",))
    answer: list[Any] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.8", 5432))]

    def late(*_: Any, **__: Any) -> Any:
        released.wait(20)
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", late)
    for _ in range(2):
        resolving = name.asking()
        resolving.wait(time.monotonic() + 20)
        assert resolving.answer() == ("127.0.0.9",)
    released.set()
    wait_for(lambda: resolving.over)
    assert name.known == ("127.0.0.8",)
    assert name.late, "it took more than its time"
    following = name.asking()
    assert not following.under_way
    wait_for(lambda: following.over)
    assert not name.late


def test_a_service_file_may_name_another_server_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    services = tmp_path / "services.conf"
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    config = endpoint(conninfo="service=mine")
    services.write_text("[mine]\nhost=one.test\nport=5433\n")
    first = Name.of(config)
    assert first is not None
    assert (first.host, first.port) == ("one.test", "5433")
    assert Name.of(config, first) is first
    services.write_text("[mine]\nhost=two.test\nport=5433\n")
    second = Name.of(config, first)
    assert second is not None
    assert second.host == "two.test"


@pytest.mark.parametrize(
    ("entry", "environment"),
    [
        ({"host": "127.0.0.1"}, {}),
        ({"host": "::1"}, {}),
        ({"host": "/tmp"}, {}),
        ({"host": "db.test"}, {"PGHOSTADDR": "127.0.0.1"}),
        ({"conninfo": "host=db.test hostaddr=127.0.0.1"}, {}),
        ({"name": "shop"}, {"PGHOST": "/tmp"}),
        ({"name": "shop"}, {"PGHOST": ""}),
    ],
)
def test_an_address_and_a_socket_are_not_resolved(
    monkeypatch: pytest.MonkeyPatch, entry: Any, environment: dict[str, str]
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert Name.of(endpoint(**entry)) is None


def test_unrelated_variables_may_be_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGAPPNAME", "b\udce4r")
    name = Name.of(endpoint(host="db.test"))
    assert name is not None
    assert name.host == "db.test"
