"""The training step of another commit beside this tree's, for speed.py --against=COMMIT.

Each tree is a process of its own (stepper.py), and both are started in the same way. It takes and
times its steps with its own files, train.py and config included, so that modules of the same name
cannot mix. The two take turns.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from prepare import UserError
from same import ROOT, export

WARM_UP = 3  # steps: they compile, and allocate what later ones use again


class Tree:
    """The files of one commit in a folder, and a process that takes steps of rows with them."""

    def __init__(self, name, folder, rows):
        self.name = name
        self.seconds = [[] for _ in rows]  # of a step of each row, one a round
        stepper = Path(__file__).parent / "stepper.py"
        asked = json.dumps([[row.variant, row.words, row.vocab_size] for row in rows])
        self.process = subprocess.Popen([sys.executable, stepper, Path(folder) / "bench", asked],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def time(self, number, steps):
        """Seconds that a step of this row takes, on average over these steps. Raises UserError."""
        try:
            print(number, steps, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, and so gives no answer either
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(f"the process that takes the steps of {self.name} has ended, see above")
        answer = json.loads(answer)
        if isinstance(answer, str):
            raise UserError(f"{self.name} cannot take these steps: {answer}")
        return answer


def times_of_both(rows, commit, rounds, steps):
    """Seconds of every row in every round, in this tree and at that commit: two lists of lists.

    Raises UserError where there is no such commit, or it cannot take these steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        export(commit, folder)
        with Tree("this tree", ROOT, rows) as here, Tree(commit, folder, rows) as there:
            order = [here, there]
            for number, row in enumerate(rows):
                for tree in order:
                    tree.time(number, WARM_UP)
                print(f"  {row.label()}: both are warm", file=sys.stderr, flush=True)
            for _ in range(rounds):
                for number in range(len(rows)):
                    for tree in order:
                        tree.seconds[number].append(tree.time(number, steps))
                order.reverse()  # neither is always the first
    return here.seconds, there.seconds
