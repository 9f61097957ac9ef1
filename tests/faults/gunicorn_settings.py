"""gunicorn's settings for tests of process models; GUNICORN_PATCH, HOOKS and PARENT_LOG are the test's."""

import os

if os.environ.get("GUNICORN_PATCH"):
    from gevent import monkey

    monkey.patch_all()

wsgi_app = "token_app:application"
control_socket_disable = True
keepalive = 0

if os.environ.get("HOOKS"):
    import pgdbpool._util.bounds
    from pgdbpool.contrib.gunicorn import worker_abort, worker_exit, worker_int  # noqa: F401

    pgdbpool._util.bounds.CUT_WITHIN = 5  # that long on a machine that is busy


def child_exit(server, worker):  # type: ignore[no-untyped-def]
    """In the parent, when a child is gone: use all of its own connections, and note which they are."""
    if log := os.environ.get("PARENT_LOG"):
        import token_app

        with open(log, "a") as file:
            print(os.getpid(), *token_app.backends(), file=file)
