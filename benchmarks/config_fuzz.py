"""A thousand configurations with one value made wrong: refused in a line that names it, or kept as it was given.

``python benchmarks/config_fuzz.py [--configs 1000] [--first-seed 1]`` runs tests/test_config_fuzz.py once for every
seed, each of which draws another wrong value for every key of every config, and prints how many were refused and
accepted, how many ended in a traceback, and how many were accepted though they cannot be or became something else.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASE = "test_a_wrong_value_is_named_in_one_line"


class Draws:
    """A pytest plugin: draws with a seed, and counts what came of it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Draw the cases with this seed."""
        for item in items:
            item.module.SEED = self.seed  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a case."""
        if report.when != "call":
            return
        if report.passed:
            self.outcomes[str(dict(report.user_properties)["outcome"])] += 1
            return
        said = report.longrepr.reprcrash.message.splitlines()[0]  # type: ignore[union-attr]
        silent = " is accepted" in said or " became " in said
        fault = "silent" if silent else "unclear" if said.startswith(("AssertionError", "assert")) else "traceback"
        self.outcomes[fault] += 1
        self.faults.append(f"seed {self.seed}, {fault}: {report.nodeid.partition('[')[2]} {said}"[:400])


def main() -> None:
    """Draw until there are enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=1000, help="at least so many")
    parser.add_argument("--first-seed", type=int, default=1, help="0 is the test suite's own")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    seed = options.first_seed
    while outcomes.total() < options.configs:
        draws = Draws(seed)
        arguments = [
            str(ROOT / "tests" / "test_config_fuzz.py"),
            "-k",
            CASE,
            "-n",
            "0",
            "-q",
            "--tb=short",
            "--no-header",
        ]
        pytest.main([*arguments, "-p", "no:warnings", "--show-capture=no", "-o", f"pythonpath={ROOT}"], plugins=[draws])
        if not draws.outcomes:
            sys.exit("no configurations were drawn")
        outcomes += draws.outcomes
        print("\n".join(draws.faults), flush=True)
        print(f"seed {seed}: {dict(draws.outcomes)}", flush=True)
        seed += 1
    print(f"{outcomes.total()} configurations: {dict(outcomes)}")


if __name__ == "__main__":
    main()
