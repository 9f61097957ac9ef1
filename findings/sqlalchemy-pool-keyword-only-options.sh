#!/usr/bin/env bash
# SQLAlchemy 2.0.58 and 2.1.9
#
# Expected: `create_engine(url, poolclass=P, flavour="mint")` passes `flavour` on to a pool class whose `__init__` declares
# it, as the documentation says of poolclass's arguments. Happens: the options of a pool class are read from the positional
# parameters of its `__init__` alone. One that is keyword-only, after a `*`, is refused with "Invalid argument(s)", as if
# the class did not have it. So a pool class for create_engine declares its options as ordinary parameters.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
for version in 2.0.58 2.1.9; do
    python3 -m venv "$room/$version"
    "$room/$version/bin/pip" install --quiet "sqlalchemy==$version"
    "$room/$version/bin/python" - <<'PYTHON'
import sys

import sqlalchemy
from sqlalchemy.pool import QueuePool


class Ordinary(QueuePool):
    def __init__(self, creator, flavour="plain", **options):
        self.flavour = flavour
        super().__init__(creator, **options)


class KeywordOnly(QueuePool):
    def __init__(self, creator, *, flavour="plain", **options):
        self.flavour = flavour
        super().__init__(creator, **options)


taken = sqlalchemy.create_engine("sqlite:///file.db", poolclass=Ordinary, flavour="mint").pool.flavour
try:
    sqlalchemy.create_engine("sqlite:///file.db", poolclass=KeywordOnly, flavour="mint")
    refused = ""
except TypeError as error:
    refused = str(error).split("\n")[0]
print("SQLAlchemy:", sqlalchemy.__version__)
print("an ordinary parameter:", taken)
print("a keyword-only one:", refused[:60] or "taken")
same = taken == "mint" and refused.startswith("Invalid argument(s) 'flavour'")
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
done
