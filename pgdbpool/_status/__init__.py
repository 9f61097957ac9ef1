"""The status that a process publishes in the `runtime_dir`, for other processes.

Nothing here changes a pool, and no pool needs it.
"""
