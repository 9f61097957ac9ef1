"""What a process publishes of its pools in the `runtime_dir`, for other processes.

Nothing here changes a pool, and no pool needs it.
"""
