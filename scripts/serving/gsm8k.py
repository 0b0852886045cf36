"""Ask a server with sglang's own few-shot GSM8K runner; a program of its own.

    gsm8k.py PORT FILE QUESTIONS SHOTS TOKENS OUTPUT

The runner leaves all answers in tmp_output_gsm8k.txt in the working directory. As it
does everywhere, it also asks the questions that it shows as examples.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from sglang.test.few_shot_gsm8k import run_eval


def main() -> None:
    port, data, questions, shots, tokens, output = sys.argv[1:]
    result = run_eval(
        SimpleNamespace(
            host="http://127.0.0.1",
            port=int(port),
            data_path=data,
            num_questions=int(questions),
            num_shots=int(shots),
            max_new_tokens=int(tokens),
            parallel=128,
            temperature=0.0,
        )
    )
    share = {name: float(result[name]) for name in ("accuracy", "invalid")}
    correct, invalid = (round(value * int(questions)) for value in share.values())
    summary = {
        "questions": int(questions),
        "correct": correct,
        "invalid": invalid,
        "accuracy": share["accuracy"],
        "seconds": float(result["latency"]),
    }
    Path(output).write_text(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
