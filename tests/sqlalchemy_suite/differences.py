"""Tests of SQLAlchemy that pass with its own pool alone, each with its reason.

They are among its tests of engines and of the ORM; the compliance suite has none. They are
in doc/sqlalchemy-suite.rst too.
"""

_PING = "It sets ``pool_pre_ping``, which is refused."
_QUEUE = "It sets ``poolclass=QueuePool``, which is refused."
_RECORD = "It looks into a record of ``QueuePool`` that keeps its connection; here that is the group's again."
_DRIVER = "It puts its own ``connect`` in psycopg's place, to close its connections; the group opens others."
_POOL = "It gives the engine a ``QueuePool`` of its own, which is refused."
_RESULT = "It reads a result after its session has given the connection back; a cursor ends with that."

DIFFERENCES: dict[str, str] = {
    "EngineEventsTest::test_close_parameter": _QUEUE,
    "HandleErrorTest::test_alter_invalidate_pool_to_false": _RECORD,
    "InvalidateDuringResultTest::test_invalidate_on_results": _DRIVER,
    "IsolationLevelTest::test_per_connection": _QUEUE,
    "NewStyleExecutionTest::test_unbuffered_result_session_is_closed": _RESULT,
    "PrePingRealTest::test_pre_ping_db_is_restarted": _PING,
    "PrePingRealTest::test_pre_ping_db_stays_shutdown": _PING,
    "QueuePoolTest::test_recycle_pool_no_race": _POOL,
    "RealPrePingEventHandlerTest::test_control": _PING,
    "RealPrePingEventHandlerTest::test_downgrade_control": _PING,
    "RealPrePingEventHandlerTest::test_event_handler_can_downgrade_disconnect": _PING,
    "RealPrePingEventHandlerTest::test_event_handler_can_upgrade_disconnect": _PING,
    "RealPrePingEventHandlerTest::test_event_handler_didnt_downgrade_disconnect": _PING,
    "RealPrePingEventHandlerTest::test_event_handler_didnt_upgrade_disconnect": _PING,
    "RealReconnectTest::test_close": _DRIVER,
    "RealReconnectTest::test_ensure_is_disconnect_gets_connection": _DRIVER,
    "RealReconnectTest::test_multiple_invalidate": _DRIVER,
    "RealReconnectTest::test_null_pool": _DRIVER,
    "RealReconnectTest::test_reconnect": _DRIVER,
    "RealReconnectTest::test_with_transaction": _DRIVER,
    "TransactionTest::test_reset_rollback_two_phase_no_rollback": _RECORD,
}
"""By class and function."""
