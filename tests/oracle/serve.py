"""Runs scripts of this folder, one after the other.

Each line of standard input is a JSON list of a script's name and its arguments. One line answers it: the
error as a JSON string, empty where there is none.
"""

import gc
import json
import runpy
import sys
import traceback
from pathlib import Path

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    script, *arguments = json.loads(line)
    sys.argv = [script, *arguments]
    error = ""
    try:
        runpy.run_path(str(Path(__file__).with_name(script)), run_name="__main__")
    except BaseException:  # SystemExit of argparse also
        error = traceback.format_exc()
    print(json.dumps(error), file=answers, flush=True)
    gc.collect()
