"""Take and time the training steps of one tree on request: against.py starts this once a tree.

    python bench/stepper.py FOLDER '[["local", ["config/demo.py"], 580]]'

FOLDER is the bench/ of the tree. Its speed.py imports that tree's train.py, model.py, prepare.py
and config, and nothing is imported from the tree that this file lies in. The second word lists the
rows as JSON: variant, knobs, vocabulary. A line "ROW STEPS" on stdin is answered by a line of JSON
on stdout: the seconds of one step of that row, on average over these steps, or a text that says why
they cannot be taken. A row is built when it is asked for first.
"""

import json
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this
sys.path[0] = sys.argv[1]  # in place of this file's own folder
import speed


def seconds_of(rows, number, steps):
    row = rows[number]
    if isinstance(row, list):
        row = rows[number] = speed.Row(*row).build()
    row.time(steps)
    return row.seconds[-1]


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    rows = json.loads(sys.argv[2])
    for line in sys.stdin:
        number, steps = map(int, line.split())
        try:
            answer = seconds_of(rows, number, steps)
        except ValueError as error:  # a knob that this commit does not know
            answer = " ".join(str(error).split())
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
