"""A thousand configurations with one wrong value each: refused in a line that names it, or used as given.

``python benchmarks/config_fuzz.py [--configs 1000] [--first-seed 1]`` runs tests/test_config_fuzz.py once per seed;
each seed draws other wrong values for every key of every config. Prints how many were refused or accepted, how many
ended in a traceback, and how many were accepted although invalid or changed to another value.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASE = "test_a_wrong_value_is_named_in_one_line"


class Draws:
    """A pytest plugin that draws cases with a seed and counts their outcomes."""

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
        message = report.longrepr.reprcrash.message.splitlines()[0]  # type: ignore[union-attr]
        silent = " is accepted" in message or " became " in message
        fault = "silent" if silent else "unclear" if message.startswith(("AssertionError", "assert")) else "traceback"
        self.outcomes[fault] += 1
        self.faults.append(f"seed {self.seed}, {fault}: {report.nodeid.partition('[')[2]} {message}"[:400])


def main() -> None:
    """Run seeds until there are enough configurations, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=1000, help="least number of configurations")
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
