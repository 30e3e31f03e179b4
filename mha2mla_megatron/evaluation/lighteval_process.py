"""lighteval's own command in one of several processes, each with a file of its own for the model's arguments.

    torchrun --nproc-per-node N -m mha2mla_megatron.evaluation.lighteval_process accelerate FOLDER TASKS ...

Each takes FOLDER/RANK.yaml. They cannot share one: at its end every process writes all answers into the files of
`cache_dir` and reads them back, at the same time as the others.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv[2] = os.path.join(sys.argv[2], f"{os.environ['RANK']}.yaml")
    runpy.run_module("lighteval", run_name="__main__", alter_sys=True)
