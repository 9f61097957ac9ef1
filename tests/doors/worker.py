"""The process of one way: it repeats operations as it is told, line by line in JSON."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from time import perf_counter_ns

from tests.doors.ways import own


def main() -> None:
    """Answer each line: the nanoseconds of so many operations, or the operations there are."""
    site = importlib.import_module(f"tests.doors.{own()[0].site}")
    site.warm()
    for line in sys.stdin:
        asked = json.loads(line)
        if "operation" not in asked:
            answer: object = list(site.OPERATIONS)
        else:
            do, times = site.OPERATIONS[asked["operation"]], []
            gc.collect()
            for _ in range(asked["count"]):
                begun = perf_counter_ns()
                do()
                times.append(perf_counter_ns() - begun)
            answer = times
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
