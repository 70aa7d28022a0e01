"""The README says what the committed results say, and its example runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_made_from_the_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from table import tables
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    found = re.search(r"<!-- made by: python benchmarks/table.py (\S+) -->\n(.*?)\n<!-- end", README, re.DOTALL)
    assert found is not None
    assert found[2] == tables(json.loads((ROOT / found[1]).read_text()))


def test_the_example_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 4
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
