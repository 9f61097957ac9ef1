"""Tools for every other room: background calls, scoped values, greenlets, histograms, the log's events.

Nothing here knows of pools, servers or requests.
"""
