"""The status that a process publishes in the `runtime_dir`, and the orders that it finds there.

Nothing here changes a pool itself, and no pool needs it.
"""
