"""Django's own test suite, over its backend of PostgreSQL and over the pool's."""
