"""A database backend for Django whose connections come from the pools.

    DATABASES = {
        "default": {
            "ENGINE": "pgdbpool.contrib.django",
            "OPTIONS": {"config": BASE_DIR / "pgdbpool.yaml", "group": "write"},
        },
    }

It needs the extra `django`. Modules: `base` is the backend, `middleware` the tenant of a request, `routers`
the reads from standbys.
"""
