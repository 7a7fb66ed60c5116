"""Put a trained base, instruct model and continually pre-trained base into the repository, with their digests.

python examples/continual/train.py FOLDER --world 0 --seed 0
python examples/continual/ship.py FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

SHIPPED = ("base", "instruct", "cpt")
FAMILY = Path(__file__).parent / "family"


def digests(family: Path) -> dict[str, str]:
    """SHA-256 of every file of the models, by its path below the family's folder."""
    files = [path for name in SHIPPED for path in sorted((family / name).iterdir())]
    return {f"{path.relative_to(family)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that train.py wrote")
    folder = parser.parse_args().folder
    shutil.rmtree(FAMILY, ignore_errors=True)
    for name in SHIPPED:
        shutil.copytree(folder / name, FAMILY / name)
    (FAMILY / "digests.json").write_text(json.dumps(digests(FAMILY), indent=1) + "\n")


if __name__ == "__main__":
    main()
