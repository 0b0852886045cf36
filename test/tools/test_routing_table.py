"""scripts/routing_table.py: the table in the documentation is what the code makes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "routing_table.py"


def test_the_written_table_is_the_one_that_the_code_makes():
    subprocess.run([sys.executable, SCRIPT, "--check"], check=True)
