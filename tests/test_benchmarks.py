"""What ``make benchmark`` runs: benchmarks alone, all named on their page. What it does not run is named too."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOW = "shown: ; @echo $(BENCHMARKS)"


def test_make_benchmark_runs_the_benchmarks_of_the_page() -> None:
    shown = ["make", "--no-print-directory", f"--eval={SHOW}", "shown"]
    made = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    run = [Path(path).name for path in made]
    page = (ROOT / "docs/benchmarks.md").read_text()
    named = [set(re.findall(r"\b\w+\.py\b", part)) for part in page.split("\nBy hand: ")]
    assert len(run) > 10 and run == sorted(set(run))
    assert set(run) == named[0] - {"train.py"}
    sources = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    for name in run:
        assert "from measure import" in sources[name] and '__name__ == "__main__"' in sources[name], name
        assert not re.search(r"urllib|httpx|requests", sources[name]), f"{name} needs a network"
    started = {name for name, source in sources.items() if re.search(r"^def main\(", source, re.MULTILINE)}
    assert started - set(run) == named[1]
