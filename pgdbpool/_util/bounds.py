"""Bounds of waits, in seconds, which no configuration key sets.

Read them as attributes of this module (`bounds.CLIENT_GRACE`): a test that sets one sets it everywhere.
"""

CLIENT_GRACE = 1.0
"""Time that the client waits beyond the server's own statement_timeout."""

MARGIN = 0.1
"""Maximum time by which the server's statement_timeout precedes the deadline of the request."""

MIN_TIMEOUT = 0.05
"""Minimum timeout of a connect, ping or probe, even if the caller's deadline is nearer."""

CUT_WITHIN = 0.5
"""Time that cancelling, and waiting for commits, may take if connections are closed during their blocks."""
