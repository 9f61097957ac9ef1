"""psycopg's own test-suite over a lent connection: `python -m tests.psycopg_suite CHECKOUT`."""
