"""What one process of ``in_processes`` does: not a test, run by path with ``TASK`` among its globals."""

import os
import runpy
import sys
import traceback
from pathlib import Path

import torch

if __name__ == "rank":
    task = globals()["TASK"]
    for name, value in task["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    log = Path(task["out"]).with_suffix(".log").open("w", buffering=1)
    sys.stdout = sys.stderr = log
    torch.set_num_threads(1)
    try:
        if task["joined"]:
            torch.distributed.init_process_group("gloo")
        result = runpy.run_path(task["file"], run_name="rank")[task["function"]](*task["arguments"])
        torch.save(result, task["out"])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc(file=log)
        log.flush()
        os._exit(1)
