"""volvelle: reinforcement-learning methods as recipes of interchangeable parts.

    import volvelle
    volvelle.train("grpo", task="gcd-easy", model="smollm2", steps=20)

The verbs live here; the wings are `volvelle.language`, `volvelle.control`, …; their recipes are called and changed like functions:
`from volvelle.language.methods.grpo import grpo; volvelle.train(grpo(advantage="ngrpo"), …)`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin: on shared cores they slow each other down tenfold
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from .core.errors import RunStopped, UserError  # noqa: E402
from .core.verbs import compare, evaluate, load, methods, report, reproduce, tasks, train  # noqa: E402

__version__ = "0.1.0"
__all__ = ["RunStopped", "UserError", "compare", "evaluate", "load", "methods", "report", "reproduce", "tasks", "train"]
