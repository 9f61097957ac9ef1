"""The sub-commands of `pgdbpool` that look at a configuration: a module each, with `add` and what it runs."""
