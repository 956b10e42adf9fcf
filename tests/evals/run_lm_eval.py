"""Runs the lm-evaluation-harness in a process that cannot import linearize: `python run_lm_eval.py DIR OUT.json`.

Reads `{name: arguments of simple_evaluate}` from its input; task files are in DIR.
"""

import json
import sys


class Absent:
    """Makes an import of the toolkit fail as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "linearize":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    evaluator.add_env_info = lambda results: None  # asks pip for all packages: seconds
    tasks, out = sys.argv[1:]
    runs = {}
    for name, options in json.load(sys.stdin).items():
        manager = TaskManager(include_path=tasks, include_defaults=False)
        found = simple_evaluate(**options, task_manager=manager, bootstrap_iters=0, log_samples=True)
        answers = {task: [s["filtered_resps"] for s in kept] for task, kept in found["samples"].items()}
        runs[name] = {"results": found["results"], "answers": answers}
    with open(out, "w") as file:
        json.dump(runs, file, default=str)
