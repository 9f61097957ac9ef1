"""SQLAlchemy over the pool: the engine's pool is a group."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, text
from sqlalchemy.dialects.postgresql import ARRAY, HSTORE, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool
from support import closed_port, config, in_child, kill_backends, server

import pgdbpool
from pgdbpool import Connection
from pgdbpool.contrib.sqlalchemy import GroupPool, RoutingSession, engine

SHOWN = text("SELECT current_setting('app.tenant', true)")
PID = text("SELECT pg_backend_pid()")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
def start(known_cluster: Any, mode: str, proxy_to: Any) -> Iterator[Callable[..., Any]]:
    """Initialise groups of two connections behind a proxy, and return that."""
    proxy = proxy_to(known_cluster.primary)

    def init(**changes: Any) -> Any:
        plain = {"connection_count": 2, "timeout": 2, "autocommit": False, **changes}
        tenant = {**plain, "tenant": {"setting": "app.tenant", "verify": "off", "required": False}}
        read = {**plain, "autocommit": True, "target": "any"}
        entry = server(known_cluster.primary, port=proxy.port)
        Connection.init(config([entry], mode, write=plain, tenants=tenant, read=read))
        return proxy

    yield init
    Connection.reset()


def ready(group: str = "write", **options: Any) -> sa.Engine:
    """Return an engine that has had its first connection."""
    made = engine(group, **options)
    with made.connect():
        pass
    return made


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("group", ["write", "tenants"])
def test_a_transaction_of_n_statements_of_core_takes_n_and_one(start: Any, group: str, n: int) -> None:
    proxy = start()
    with_tenant = ready(group)
    with pgdbpool.tenant("a" if group == "tenants" else None):
        for _ in range(3):
            proxy.reset_counts()
            with with_tenant.begin() as conn:
                for number in range(n):
                    conn.execute(text("SELECT :n"), {"n": number}).all()
            assert proxy.syncs == n + 1


def test_a_read_of_an_autocommit_group_takes_one(start: Any) -> None:
    proxy = start()
    reading = ready("read")
    proxy.reset_counts()
    with reading.connect() as conn:
        assert conn.execute(text("SELECT 1")).scalar_one() == 1
    assert proxy.syncs == 1


@pytest.mark.parametrize("url", ["postgresql+pgdbpool://write", "postgresql+pgdbpool://write/"])
def test_a_url_names_the_group(start: Any, url: str) -> None:
    start()
    for made in (sa.create_engine(url), sa.engine_from_config({"sqlalchemy.url": url})):
        assert isinstance(made.pool, GroupPool)
        with made.connect() as conn:
            assert conn.execute(text("SELECT 1")).scalar_one() == 1
            assert made.pool.checkedout() == 1
            assert made.pool.size() == 2
        assert made.pool.checkedout() == 0
        assert "'write': 0 in use, 2 idle" in made.pool.status()


def test_the_package_declares_the_dialect() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    module = "pgdbpool.contrib.sqlalchemy"
    assert f'"postgresql.pgdbpool" = "{module}:PgDbPoolDialect"' in declared
    assert sa.make_url("postgresql+pgdbpool://write").get_dialect().__module__.startswith(module)


def test_a_url_opens_the_pools_from_a_file_if_none_are_open(
    known_cluster: Any, mode: str, tmp_path: Path
) -> None:
    file = tmp_path / "pgdbpool.yaml"
    file.write_text(json.dumps(config([server(known_cluster.primary)], mode, write={"connection_count": 1})))
    try:
        made = sa.create_engine(f"postgresql+pgdbpool://write?config={file}")
        for _ in range(2):
            with made.connect() as conn:
                conn.execute(text("SELECT 1"))
    finally:
        Connection.reset()


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("pool_size", 5, "connection_count"),
        ("max_overflow", 5, "connection_count"),
        ("pool_timeout", 5, "timeout"),
        ("pool_recycle", 60, "max_lifetime"),
        ("pool_pre_ping", True, "ping_after"),
        ("pool_use_lifo", True, "pool_use_lifo"),
        ("poolclass", QueuePool, "QueuePool"),
    ],
)
def test_an_option_that_is_the_groups_is_refused_with_its_key(option: str, value: Any, key: str) -> None:
    with pytest.raises(exc.ArgumentError, match=key):
        engine("write", **{option: value})


@pytest.mark.parametrize("rest", ["u:secret@write", "write:5432", "write/db", "write?sslmode=require"])
def test_server_options_are_refused_in_a_url(rest: str) -> None:
    with pytest.raises(exc.ArgumentError, match="configuration of the pools") as caught:
        sa.create_engine(f"postgresql+pgdbpool://{rest}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"client_encoding": "latin1"}, {"connect_args": {"keepalives": 1}}])
def test_what_is_the_servers_is_refused_in_an_engine(start: Any, options: Any) -> None:
    start()
    with pytest.raises(exc.ArgumentError, match="set it in the"):
        engine("write", **options).connect()
    assert Connection.status().groups["write"].in_use == 0


def test_a_second_configuration_in_a_url_is_refused() -> None:
    with pytest.raises(exc.ArgumentError, match="keep one"):
        sa.create_engine("postgresql+pgdbpool://write?config=a.yaml&config=b.yaml")


def test_connect_args_are_those_of_a_block(start: Any) -> None:
    start()
    with engine("tenants", connect_args={"tenant": "a", "timeout": 1}).connect() as conn:
        assert conn.execute(SHOWN).scalar() == "a"


def test_a_forked_child_closes_what_its_parent_has_open_and_goes_on(start: Any) -> None:
    start()
    made = ready()
    with made.connect() as conn:
        pid = conn.execute(PID).scalar()

        def child() -> None:
            with made.connect() as own:
                assert own.execute(PID).scalar() != pid
            conn.close()

        in_child(child)
        assert conn.execute(PID).scalar() == pid


def test_options_that_contradict_nothing_are_taken(start: Any) -> None:
    start()
    taken = {"pool_pre_ping": False, "pool_recycle": -1, "pool_reset_on_return": "rollback", "echo": False}
    for options in (taken, {"poolclass": NullPool}):
        with engine("write", **options).connect() as conn:
            assert conn.scalar(text("SELECT 1")) == 1


def test_errors_are_sqlalchemys_with_the_pools_as_their_origin(start: Any) -> None:
    start()
    made = ready()
    Base.metadata.create_all(made)
    with pytest.raises(exc.IntegrityError) as caught, made.begin() as conn:
        conn.execute(sa.insert(Account), [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}])
    assert isinstance(caught.value.orig, pgdbpool.DBQueryError)
    one, two = made.connect(), made.connect()
    with pytest.raises(exc.OperationalError) as full:
        made.connect()
    assert isinstance(full.value.orig, pgdbpool.PoolTimeout)
    assert "test_sqlalchemy.py" in str(full.value)
    one.close()
    two.close()


def test_no_server_is_an_operational_error(mode: str) -> None:
    try:
        Connection.init(config([{"host": "127.0.0.1", "port": closed_port(), "user": "x", "name": "x"}], mode,
                               write={"connection_count": 1, "timeout": 0.5}), wait=False)  # fmt: skip
        with pytest.raises(exc.OperationalError) as caught:
            engine("write").connect()
        assert isinstance(caught.value.orig, pgdbpool.DBConnectionError)
    finally:
        Connection.reset()


def test_a_lost_connection_invalidates_itself_and_no_other(start: Any, known_cluster: Any) -> None:
    start()
    made = ready()
    with known_cluster.primary.connect() as admin, made.connect() as other, made.connect() as conn:
        pid = other.execute(PID).scalar()
        conn.execute(text("SELECT 1"))
        kill_backends(admin, conn.execute(PID).scalar_one())
        with pytest.raises(exc.OperationalError) as caught:
            conn.execute(text("SELECT 1"))
        assert caught.value.connection_invalidated
        assert isinstance(caught.value.orig, pgdbpool.ConnectionLostError)
        assert conn.invalidated
        conn.rollback()
        assert conn.execute(text("SELECT 1")).scalar() == 1
        assert other.execute(PID).scalar() == pid


def test_a_first_statement_that_is_lost_is_sent_again_under_sqlalchemy(start: Any) -> None:
    proxy = start()
    made = ready()
    with made.begin() as conn:
        proxy.cut_before(b"fortytwo")
        assert conn.execute(text("SELECT 42 AS fortytwo")).scalar() == 42
    assert proxy.cuts == 1


def test_a_lost_commit_says_that_it_may_have_committed(start: Any) -> None:
    proxy = start()
    made = ready()
    with pytest.raises(exc.OperationalError) as caught:
        with made.begin() as conn:
            conn.execute(text("CREATE TABLE t (i int)"))
            proxy.cut_after(b"COMMIT")
    assert caught.value.orig.maybe_committed  # type: ignore[union-attr]


def test_a_session_that_was_cut_rolls_back_in_silence(start: Any) -> None:
    start()
    session = sessionmaker(ready())()
    with pytest.raises(ZeroDivisionError), session.begin():
        session.execute(text("SELECT 1"))
        Connection.terminate()
        raise ZeroDivisionError


def test_invalidate_and_detach(start: Any) -> None:
    start()
    made = ready()
    with made.connect() as conn:
        pid = conn.execute(PID).scalar()
        conn.invalidate()
        conn.rollback()
        assert conn.execute(PID).scalar() != pid
    with made.connect() as conn:
        conn.detach()
        assert conn.execute(text("SELECT 1")).scalar() == 1
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    with made.connect() as one, made.connect() as two:
        pids = {one.execute(PID).scalar(), two.execute(PID).scalar()}
    made.dispose()
    with made.connect() as conn:
        assert conn.execute(PID).scalar() not in pids


@pytest.mark.parametrize("way", ["raw", "connection", "driver's"])
def test_a_detached_connection_that_is_dropped_is_replaced_and_its_place_named(start: Any, way: str) -> None:
    start(connection_count=1)
    made = ready()
    held: list[Any] = [made.raw_connection() if way == "raw" else made.connect()]
    held[0].detach()
    if way == "driver's":
        held = [held[0].connection.dbapi_connection]
    gc.collect()
    cursor = held[0].exec_driver_sql("SELECT 1") if way == "connection" else held[0].cursor()
    assert made.pool.checkedout() == 1  # type: ignore[attr-defined]
    assert "test_sqlalchemy.py" in Connection.status().groups["write"].holders[0]
    del cursor
    held.clear()
    with pytest.warns(ResourceWarning, match=r"taken at .*test_sqlalchemy\.py"):
        gc.collect()
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    with made.connect() as conn:
        assert conn.execute(text("SELECT 1")).scalar() == 1


def test_a_detached_connection_that_was_lost_goes_on_and_comes_back(start: Any, known_cluster: Any) -> None:
    start(connection_count=1)
    made = ready()
    raw = made.raw_connection()
    raw.detach()
    with known_cluster.primary.connect() as admin:
        kill_backends(admin)
    cursor = raw.cursor()
    cursor.execute("SELECT 1")
    assert cursor.fetchone() == (1,)
    raw.close()
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    with made.connect() as conn:
        assert conn.execute(text("SELECT 1")).scalar() == 1


def test_events_of_pool_and_engine_are_heard(start: Any) -> None:
    start()
    made = engine("write")
    heard: list[str] = []
    for name in ("connect", "checkout", "checkin", "reset", "close"):
        event.listen(made, name, lambda *arguments, name=name, **more: heard.append(name))
    with made.begin() as conn:
        conn.execute(text("SELECT 1"))
    assert heard == ["connect", "checkout", "reset", "checkin", "close"]


@pytest.mark.parametrize(
    "level", ["READ COMMITTED", "READ UNCOMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]
)
def test_every_isolation_level_holds_and_is_reset(start: Any, level: str) -> None:
    start()
    made = ready()
    with made.connect().execution_options(isolation_level=level) as conn:
        shown = conn.execute(text("SHOW transaction_isolation")).scalar_one().upper()
        assert shown == ("READ COMMITTED" if level == "AUTOCOMMIT" else level)
        assert conn.get_isolation_level() == ("READ COMMITTED" if level == "AUTOCOMMIT" else level)
        assert conn.connection.driver_connection.autocommit is (level == "AUTOCOMMIT")  # type: ignore[union-attr]
    for _ in range(2):
        with made.connect() as conn:
            assert conn.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
            assert not conn.connection.driver_connection.autocommit  # type: ignore[union-attr]
    with ready(isolation_level=level).connect() as conn:
        assert conn.connection.driver_connection.autocommit is (level == "AUTOCOMMIT")  # type: ignore[union-attr]
        assert conn.execute(text("SHOW transaction_isolation")).scalar_one().upper() == shown


def test_savepoints_two_phase_and_server_side_cursors(start: Any) -> None:
    start()
    made = ready()
    Base.metadata.create_all(made)
    with made.begin() as conn:
        with conn.begin_nested() as inner:
            conn.execute(sa.insert(Account).values(id=1, name="a"))
            inner.rollback()
        conn.execute(sa.insert(Account).values(id=2, name="b"))
    with made.connect().execution_options(stream_results=True, yield_per=10) as conn:
        assert conn.execute(text("SELECT generate_series(1, 100)")).scalars().all() == list(range(1, 101))
    with made.connect() as conn:
        assert conn.execute(sa.select(Account.id)).scalars().all() == [2]
        conn.rollback()
        transaction = conn.begin_twophase()
        conn.execute(sa.insert(Account).values(id=3, name="c"))
        transaction.rollback()
        assert conn.execute(sa.select(sa.func.count(Account.id))).scalar() == 1


def test_a_two_phase_transaction_has_the_tenant_of_the_options_after_a_loss_too(start: Any) -> None:
    start()
    with ready("tenants").connect().execution_options(tenant="a") as conn:
        for _ in range(2):
            transaction = conn.begin_twophase()
            assert conn.execute(SHOWN).scalar() == "a"
            transaction.rollback()
            conn.invalidate()


def test_types_that_need_the_driver_go_there_and_back(start: Any) -> None:
    start()
    with ready().begin() as conn:
        found = conn.execute(text("SELECT true FROM pg_available_extensions WHERE name = 'hstore'")).scalar()
        if found:
            conn.execute(text("CREATE EXTENSION hstore"))
    made = engine("write", json_serializer=lambda value: json.dumps({"was": value}))
    kind, value = (HSTORE, {"a": "1"}) if found else (ARRAY(sa.Integer), [1, 2])
    table = sa.Table("t", sa.MetaData(), sa.Column("h", kind), sa.Column("j", JSONB))
    with made.begin() as conn:
        table.create(conn)
        conn.execute(table.insert().values(h=value, j=[1]))
    with made.begin() as conn:
        assert conn.execute(table.select()).one() == (value, {"was": [1]})


@pytest.mark.parametrize("of_engine", [True, False])
def test_a_connection_has_its_tenant_after_a_loss_too(
    start: Any, known_cluster: Any, of_engine: bool
) -> None:
    start()
    made = ready("tenants")
    chosen = made.execution_options(tenant="a") if of_engine else made
    with chosen.connect() as conn, known_cluster.primary.connect() as admin:
        if not of_engine:
            conn.execution_options(tenant="a")
        assert conn.scalar(SHOWN) == "a"
        kill_backends(admin)
        with pytest.raises(exc.OperationalError):
            conn.execute(SHOWN)
        conn.rollback()
        assert conn.scalar(SHOWN) == "a"
        conn.commit()
        with pgdbpool.tenant("b"), pytest.raises(pgdbpool.TenantConflictError):
            conn.scalar(SHOWN)
        conn.rollback()
        conn.invalidate()
        assert conn.scalar(SHOWN) == "a"
    with made.connect() as conn:
        assert conn.scalar(SHOWN) in (None, "")


def test_tenants_by_context_and_by_option(start: Any) -> None:
    start()
    made = ready("tenants")
    with made.connect() as conn:
        for tenant in ("a", "b"):
            with pgdbpool.tenant(tenant):
                assert conn.execute(SHOWN).scalar() == tenant
                conn.rollback()
        with pgdbpool.tenant("a"):
            conn.execute(SHOWN)
        with pgdbpool.tenant("b"), pytest.raises(pgdbpool.TenantConflictError):
            conn.execute(SHOWN)
    with made.connect().execution_options(tenant="c") as conn:
        assert conn.execute(SHOWN).scalar() == "c"
        with pytest.raises(exc.InvalidRequestError, match="tenant may not be altered"):
            conn.execution_options(tenant="d")
    of_c = made.execution_options(tenant="c")
    for using, expected in ((of_c, "c"), (made, ""), (of_c, "c")):
        with using.connect() as conn:
            assert conn.execute(SHOWN).scalar() == expected


def test_a_session_reads_and_writes_through_one_engine(start: Any) -> None:
    start()
    made = ready("tenants")
    Base.metadata.create_all(made)
    make = sessionmaker(made)
    with pgdbpool.tenant("a"), make.begin() as session:
        session.add(Account(id=1, name="x"))
    with make() as session:
        account = session.get_one(Account, 1, with_for_update=True)
        account.name = "y"
        session.commit()
        assert account.name == "y"


def test_a_routing_session_reads_elsewhere_until_it_writes(start: Any) -> None:
    start()
    writing, reading = ready(), ready("read")
    Base.metadata.create_all(writing)
    with_insert = sa.select(sa.insert(Account).values(id=4, name="q").returning(Account.id).cte())
    make = sessionmaker(class_=RoutingSession, writing=writing, reading=reading)
    used: list[str] = []
    for one in (writing, reading):
        event.listen(one, "before_cursor_execute", lambda conn, *rest: used.append(conn.engine.url.host))

    def through(action: Callable[[], Any]) -> set[str]:
        used.clear()
        action()
        return set(used)

    with make() as session:
        read = sa.select(Account)
        assert through(lambda: session.execute(read).all()) == {"read"}
        assert through(lambda: session.execute(text("SELECT 1"))) == {"read"}
        with session.primary():
            assert through(lambda: session.execute(read).all()) == {"write"}
        assert through(lambda: session.execute(read.with_for_update()).all()) == {"write"}
        assert through(lambda: session.execute(read).all()) == {"write"}
        with session.replica():
            assert through(lambda: session.execute(read).all()) == {"read"}
        session.rollback()
        for write in (
            lambda: (session.add(Account(id=1, name="x")), session.flush()),
            lambda: session.execute(sa.insert(Account).values(id=2, name="y")),
            lambda: session.execute(sa.update(Account).values(name="z")),
            lambda: session.execute(sa.delete(Account)),
            lambda: session.execute(text("UPDATE accounts SET name = 'w'")),
            lambda: session.execute(text("SELECT * FROM accounts FOR NO KEY UPDATE")),
            lambda: session.execute(text("SELECT 1; DELETE FROM accounts")),
            lambda: session.execute(with_insert),
        ):  # fmt: skip
            assert through(lambda: session.execute(read).all()) == {"read"}
            assert through(write) == {"write"}
            assert through(lambda: session.execute(read).all()) == {"write"}
            session.rollback()


def test_a_read_that_flushes_first_sees_what_it_flushed(start: Any) -> None:
    start()
    writing, reading = ready(), ready("read")
    Base.metadata.create_all(writing)
    with RoutingSession(writing=writing, reading=reading) as session:
        session.add(Account(id=1, name="x"))
        assert session.scalars(sa.select(Account.name)).all() == ["x"]
        assert session.get_bind(clause=sa.select(Account)) is writing
        session.rollback()
        assert session.get_bind(clause=sa.select(Account)) is reading


def test_savepoints_of_a_routing_session_are_where_it_writes(start: Any) -> None:
    start()
    writing, reading = ready(), ready("read")
    Base.metadata.create_all(writing)
    with RoutingSession(writing=writing, reading=reading) as session:
        assert session.get_bind(Account, clause=sa.select(Account)) is reading
        with session.begin_nested():
            assert session.execute(sa.select(Account)).all() == []
            session.add(Account(id=1, name="x"))
        session.commit()
        assert session.get_one(Account, 1).name == "x"


def test_a_routing_session_with_two_phase_transactions_has_no_replica(start: Any) -> None:
    start()
    writing, reading = ready("write"), ready("read")
    with RoutingSession(writing=writing, reading=reading, twophase=True) as session:
        assert session.get_bind(clause=sa.select(1)) is writing
        assert session.scalar(sa.select(1)) == 1
        with pytest.raises(exc.InvalidRequestError, match="two-phase"), session.replica():
            pass


def test_a_class_with_an_engine_of_its_own_keeps_it_in_a_routing_session(start: Any) -> None:
    start()
    writing, reading, own = ready(), ready("read"), ready("tenants")
    with RoutingSession(writing=writing, reading=reading, binds={Account: own}) as session:
        for clause in (sa.select(Account), sa.delete(Account)):
            assert session.get_bind(sa.inspect(Account), clause=clause) is own
        assert session.get_bind(clause=sa.select(sa.literal(1))) is reading
        with own.connect() as conn:
            assert RoutingSession(conn, writing=writing, reading=reading).get_bind() is conn


def test_alembic_creates_an_index_concurrently(start: Any) -> None:
    pytest.importorskip("alembic")
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    start()
    made = sa.create_engine("postgresql+pgdbpool://write", poolclass=NullPool)  # as alembic's env.py has it
    with made.connect() as conn:
        context = MigrationContext.configure(conn)
        with context.begin_transaction():
            operations = Operations(context)
            operations.create_table("t", sa.Column("i", sa.Integer))
            with context.autocommit_block():
                operations.create_index("ti", "t", ["i"], postgresql_concurrently=True)
            operations.add_column("t", sa.Column("j", sa.Integer))
    assert [column["name"] for column in sa.inspect(made).get_columns("t")] == ["i", "j"]
    assert [index["name"] for index in sa.inspect(made).get_indexes("t")] == ["ti"]


def test_flask_sqlalchemy_works_with_urls_of_groups(start: Any) -> None:
    flask = pytest.importorskip("flask")
    pytest.importorskip("flask_sqlalchemy")
    start()
    from flask_sqlalchemy import SQLAlchemy

    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+pgdbpool://write"
    app.config["SQLALCHEMY_BINDS"] = {"read": "postgresql+pgdbpool://read"}
    db = SQLAlchemy(app)

    @app.get("/")
    def index() -> str:
        db.session.execute(text("SELECT 1"))
        with db.engines["read"].connect() as conn:
            return str(conn.execute(text("SELECT 2")).scalar())

    for _ in range(5):
        assert app.test_client().get("/").text == "2"
    assert Connection.status().groups["write"].in_use == 0


def test_a_session_of_flask_sqlalchemy_reads_and_writes_through_its_binds(start: Any) -> None:
    flask = pytest.importorskip("flask")
    pytest.importorskip("flask_sqlalchemy")
    start()
    from flask_sqlalchemy import SQLAlchemy

    from pgdbpool.contrib.flask_sqlalchemy import RoutingSession as Routing

    db = SQLAlchemy(session_options={"class_": Routing})

    class Apart(db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "tenants"
        id = db.Column(db.Integer, primary_key=True)

    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+pgdbpool://write"
    app.config["SQLALCHEMY_BINDS"] = {name: f"postgresql+pgdbpool://{name}" for name in ("read", "tenants")}
    db.init_app(app)
    with app.app_context():
        bind = db.session.get_bind
        assert bind(clause=text("SELECT 1")) is db.engines["read"]
        assert bind(clause=text("DELETE FROM accounts")) is db.engine
        assert bind(clause=text("SELECT 1")) is db.engine
        assert bind(Apart, clause=sa.select(Apart)) is db.engines["tenants"]
    other = flask.Flask("other")
    other.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+pgdbpool://write"
    db.init_app(other)
    with other.app_context(), pytest.raises(exc.UnboundExecutionError, match="'read'"):
        db.session.execute(text("SELECT 1"))
