"""The demo: a cluster, the example under gunicorn, and the tour that breaks things.

Only the command imports it.
"""
