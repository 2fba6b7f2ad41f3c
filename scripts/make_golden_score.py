"""Write tests/golden/score.json: NLLs of tiny LLaMAs in both directions, by Transformers on PyTorch.

    python scripts/make_golden_score.py            # needs torch; the tests only read the file

The file carries the tokenizer and the texts; the weights come from integer arithmetic
(tests/score_reference.py), another forward than reverse model, templates `none` and `plain`.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from score_reference import ROWS, TEMPLATES, make_pair, reference  # noqa: E402  # ty: ignore


def main() -> None:
    """Compute the sums of every row and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        forward, reverse = make_pair(Path(folder))
        golden = {
            "tokenizer": json.loads((forward / "tokenizer.json").read_text()),
            "rows": ROWS,
            "expected": {t: reference(forward, reverse, t, ROWS) for t in TEMPLATES},
        }
    file = ROOT / "tests" / "golden" / "score.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
