"""The versions of Python that pyep runs on are those of setup.cfg: README, CI and the classifiers say the same."""
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_versions_of_python():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = re.findall(r"Python :: (3\.\d+)$", config["metadata"]["classifiers"], re.M)
    oldest = config["options"]["python_requires"].removeprefix(">=")
    assert named[0] == oldest and f"Python {oldest} or later" in (ROOT / "README.md").read_text()
    tried = re.search(r"^for version in (.*); do", (ROOT / ".ci" / "run").read_text(), re.M)[1].split()
    assert sorted({*tried, "3.11"}) == named                     # CI's own Python is 3.11


def test_short_set_is_there():
    """What CI runs on the other versions is still named so."""
    for line in (ROOT / ".ci" / "short").read_text().split():
        file, _, function = line.partition("::")
        assert not function or f"def {function}(" in (ROOT / file).read_text(), line
