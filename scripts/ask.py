#!/usr/bin/env python3
"""Ask the model that a server serves, and print its answer.

    ask.py [--url URL] QUESTION

Needs the .venv that ./scripts/setup.sh makes, and a running server, as ./scripts/serve.sh
starts one. Exits with 1 and one line on stderr where the server cannot answer.
"""

import argparse
import sys

from in_venv import run_in_venv


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()
    run_in_venv()
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none", max_retries=0)
    try:
        completion = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": args.question}],
            temperature=0,
            max_tokens=256,
        )
    except OpenAIError as error:
        sys.exit(f"ask.py: {args.url}: {error}")
    print(completion.choices[0].message.content)


if __name__ == "__main__":
    main()
