"""What grading puts into the kernel of a student's notebook: a time limit for cells, and the verdicts."""
import _thread
import json
import signal
import threading
from pathlib import Path


class TimeLimit:
    "Interrupts what the main thread runs, as the stop button does, when it takes too long."

    def __init__(self, seconds):
        self.seconds, self.timer = seconds, None

    def start(self, *_):
        self.stop()
        # a process that was started in the background may ignore interrupts, and would never stop
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.timer = threading.Timer(self.seconds, _thread.interrupt_main)
        self.timer.daemon = True
        self.timer.start()

    def stop(self, *_):
        if self.timer: self.timer.cancel()


class Watch:
    "Limits every cell of this kernel, and keeps a list of those that stopped with an error."

    def __init__(self, seconds, file):
        from IPython import get_ipython
        self.limit, self.file, self.errors = TimeLimit(seconds), Path(file), []
        self.events = get_ipython().events
        self.events.register('pre_run_cell', self.limit.start)
        self.events.register('post_run_cell', self.after)

    def after(self, result):
        self.limit.stop()
        error = result.error_before_exec or result.error_in_exec
        if error is None: return
        name = type(error).__name__
        if isinstance(error, KeyboardInterrupt): name = f'stopped after {self.limit.seconds} s'
        first = result.info.raw_cell.strip().split('\n')[0]
        self.errors.append(f'{name} in the cell "{first[:40]}"')
        self.file.write_text(json.dumps(self.errors), encoding='utf-8')

    def end(self):
        self.events.unregister('pre_run_cell', self.limit.start)
        self.events.unregister('post_run_cell', self.after)
        self.limit.stop()


def judged(id, expression, names, seconds):
    "(Is it right, what to say): an answer is an expression over the names of the student's notebook."
    limit = TimeLimit(seconds)
    limit.start()
    try:
        from scenimefy.labs import find_exercise, judge
        verdict = judge(find_exercise(id), eval(expression, dict(names)))
    except KeyboardInterrupt: return False, f'✗ {id}: stopped after {seconds} s'
    except Exception as e: return False, f'✗ {id}: {type(e).__name__}: {e}'
    finally: limit.stop()
    return bool(verdict.right), str(verdict)
