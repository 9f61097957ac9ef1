"""What exists once per process: the pools, the background thread, forks, signals, reloads.

Nothing here is called by an application.
"""
