"""Everything that exists once per process: the pools, the background thread, forks, signals, reloads.

Applications call nothing here.
"""
