"""A run of which one rank meets something in a given update: a signal, an error, a wait, a flipped bit."""

DRIVER = """
import os, signal, sys, time
from pathlib import Path
import torch
from fastdistil import train
from fastdistil.errors import FastdistilError
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe
how, at, on, resume = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] or None
place = find_rank_info(os.environ)
step = train.train_step
def counted(run, window, counts, waited_s):
    if run.update + 1 == at and place.rank in (on, on if how != "KILL-ALL" else place.rank):
        if how.startswith("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "STOP":
            time.sleep(1.5)  # longer than between two words to the others: they know where this is
        if how in ("TERM", "INT", "STOP", "ELSEWHERE"):
            os.kill(os.getpid(), getattr(signal, "SIG" + how, signal.SIGTERM))
        if how == "RAISE":
            raise RuntimeError("planted")
        if how == "SLEEP":
            time.sleep(600)
        if how == "PAUSE":
            (run.directory / "PAUSE").touch()
        if how == "FLIP":
            happened = step(run, window, counts, waited_s)
            run.parameters[-1].detach().view(-1).view(torch.int32)[3] ^= 1
            return happened
    return step(run, window, counts, waited_s)
train.train_step = counted
if how == "ELSEWHERE" and place.rank == on:
    os.chdir(Path(sys.argv[1]).parent / "elsewhere")
if how == "LATE":  # rank 0 signals the other, which waits for it to leave, while it writes the student
    from fastdistil.distributed import coordinator
    leaving, leave, export = Path(sys.argv[1]).parent / "leaving", coordinator._leave, train.export_student
    def left(*given):
        if place.rank == on:
            leaving.with_suffix(".part").write_text(str(os.getpid()))
            leaving.with_suffix(".part").rename(leaving)
        leave(*given)
    def exported(*given, **named):
        while not leaving.exists():
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(int(leaving.read_text()), number)
        export(*given, **named)
    coordinator._leave, train.export_student = left, exported
code = 0
try:
    train.train(load_recipe(sys.argv[1]), resume=resume, place=place)
except FastdistilError as error:
    print(f"fastdistil: {error}", file=sys.stderr)
    code = error.exit_code
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as the command line does when a rank was lost: threads may hang in a collective
"""


Ended = tuple[int, str]


def all_well(ended: list[Ended]) -> None:
    for code, err in ended:
        assert code == 0, err
