#!/usr/bin/env python3
"""Ask the model that a local server serves, and print its answer.

ask.py [--port PORT] QUESTION
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument("--port", type=int, default=30000)
    args = parser.parse_args()
    client = OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none")
    completion = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.question}],
        temperature=0,
        max_tokens=256,
    )
    print(completion.choices[0].message.content)


if __name__ == "__main__":
    main()
