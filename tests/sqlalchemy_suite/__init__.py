"""SQLAlchemy's dialect compliance suite over the pool's dialect: `python -m tests.sqlalchemy_suite`."""
