"""The doors measured beside the frameworks' own pools: `python -m tests.doors`."""
