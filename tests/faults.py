"""The fault harness: a run that is killed in every stage must end as one that nobody touched.

`make test-faults` kills each stage twenty times and prints the tally; tests/test_faults.py does one
round. Nothing is imitated: the kill is SIGKILL to the process group, the run is `vcb run`.
Starting Python and its libraries would take most of the time, so one process imports them and
forks a child for each call; it never computes, so the fork loses no thread."""
import json, os, random, re, resource, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter
from functools import partial
from pathlib import Path

RECIPE = Path(__file__).parent/"tiny.yaml"
SMALLER = ("--calibrate.methods", "{vcb: {}, dpo: {}}", "--evaluate.n_boot", "20")
STATE = re.compile(r"\d\d:\d\d:\d\d  (\S+) +(starts|resumes|altered|stale|done|took)\b")


def serve():
    "Fork a child for each line of JSON on stdin; answer with its process id, or its exit status."
    import matplotlib.pyplot, transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401
    from vcb_nb.stages import STAGES
    from vcb_nb.settings import load_object
    for stage in STAGES: load_object(stage.run)
    for line in sys.stdin:
        call = json.loads(line)
        if "wait" in call: said = os.waitstatus_to_exitcode(os.waitpid(call["wait"], 0)[1])
        else: said = os.fork() or child(**call)
        print(said, flush=True)


def child(args, log, file_limit=None, cwd=None, env=None):
    "Be `vcb ARGS` in a session of its own, so that a kill takes all its processes."
    os.setsid()
    os.environ.update(env or {}) # libraries have read theirs: those are for `Machine`
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2): os.dup2(out, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if cwd: os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler) # ignored below a shell's `&`
    if file_limit: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    from vcb_nb.cli import main
    sys.argv, status = ["vcb", *args], 1
    try: status = main()
    finally:
        if error := sys.exc_info()[0]: sys.excepthook(*sys.exc_info())
        sys.stdout.flush(), sys.stderr.flush(), os._exit(1 if error else status)


class Machine:
    "Calls of `vcb` that can be watched, killed and waited for."
    def __init__(self, env=None): self.env = env or {}

    def __enter__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "PYTHONPATH": os.pathsep.join([str(RECIPE.parents[1]), *sys.path]), **self.env}
        command = [sys.executable, "-W", "ignore", __file__, "serve"]
        self.server = subprocess.Popen(command, text=True, env=env, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE)
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.calls = 0
        return self

    def __exit__(self, *_): self.server.stdin.close(), self.server.wait()

    def ask(self, **call):
        print(json.dumps(call), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, *args, **limits):
        self.calls += 1
        log = self.folder/f"call-{self.calls}.log"
        log.touch()
        return Call(self, self.ask(args=list(map(str, args)), log=str(log), **limits), log)

    def vcb(self, *args, **limits):
        "Exit status and output of a call that is left alone."
        call = self.start(*args, **limits)
        return call.wait(), call.said()


class Call:
    "One call of `vcb` under way."
    def __init__(self, machine, pid, log): self.machine, self.pid, self.log = machine, pid, log

    def said(self): return self.log.read_text("utf-8", errors="replace")
    def states(self): return STATE.findall(self.said())
    def wait(self): return self.machine.ask(wait=self.pid)
    def runs(self): return not Path(f"/proc/{self.pid}/stat").read_text().split()[2] == "Z"

    def wait_for(self, job, words=("starts", "resumes", "altered", "stale")):
        "Wait until a job begins; False if the call ended before."
        while not any(name == job and word in words for name, word in self.states()):
            if not self.runs(): return False
            time.sleep(.004)
        return True

    def wait_for_file(self, folder, pattern):
        "Wait until the call has written such a file; False if it ended before."
        while not list(folder.glob(pattern)):
            if not self.runs(): return False
            time.sleep(.002)
        return True

    def kill(self, signum=signal.SIGKILL):
        "Send a signal to all processes of the call; the exit status."
        os.killpg(self.pid, signum)
        return self.wait()


def run_args(folder, *more): return "run", RECIPE, "--output_dir", folder, *SMALLER, *more


def undisturbed(machine, folder):
    "A run that is left alone: job → the seconds that it took."
    call, seen, going = machine.start(*run_args(folder)), {}, True
    while going:
        going = call.runs()
        for state in call.states(): seen.setdefault(state, time.time())
        time.sleep(.004)
    assert call.wait() == 0, call.said()
    return {job: seen[job, "took"] - at for (job, word), at in seen.items() if word == "starts"}


# ---- what is the same in two runs

RUNTIME = re.compile(r"seconds|runtime|per_second|_time$|versions|^outputs$|^html$|^markdown$")


def plain(value, *runs):
    "JSON without times, and with the folders of these runs called RUN."
    if isinstance(value, dict):
        return {k: plain(v, *runs) for k, v in value.items() if not RUNTIME.search(k)}
    if isinstance(value, list): return [plain(v, *runs) for v in value]
    if not isinstance(value, str): return value
    return re.sub("|".join(re.escape(str(run)) for run in runs), "RUN", value)


def content(path, *runs):
    "The content of a file as far as it must not depend on kills; it fails where a file is half."
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return {name: tensor.tolist() for name, tensor in load_file(path).items()}
    if path.suffix == ".json": return plain(json.loads(path.read_text("utf-8")), *runs)
    if path.suffix != ".jsonl": return path.read_bytes()
    lines = path.read_text("utf-8").splitlines(keepends=True)
    assert not lines or lines[-1].endswith("\n"), f"{path} ends within a line"
    return [plain(json.loads(line), *runs) for line in lines]


def artefacts(run, job=""):
    "The files of a run or a job that readers may see, without bookkeeping and checkpoints."
    files = (p.relative_to(run) for p in (Path(run)/job).rglob("*") if p.is_file())
    return {p.as_posix() for p in files if not any(part.startswith(".") for part in p.parts)
            and "checkpoints" not in p.parts and p.name not in ("pending.json", "recipe.yaml")
            and p.suffix not in (".html", ".md")}


def differences(run, reference, names):
    "Those of the files that only one run has, or whose content differs."
    return sorted(n for n in names if not (reference/n).exists() or not (run/n).exists()
                  or content(run/n, run, reference) != content(reference/n, reference))


# ---- killing

def kill_in(machine, job, run, seconds, rng):
    "Kill a run at a random moment of a job: the call, and whether it had ended before."
    call = machine.start(*run_args(run))
    if call.wait_for(job): time.sleep(rng.uniform(0, seconds[job]))
    status = call.kill() # 0: it came to its end before the signal did, if by a hair
    assert status in (0, -signal.SIGKILL), call.said()
    return call, status == 0


def settled(run, job):
    "The files of a job that must be right as soon as they are there."
    return artefacts(run, job) - {f"{job}/manifest.json"}


def round_of_kills(machine, run, reference, seconds, rng, jobs):
    """Kill a run once in each of these jobs, start it again each time, and let it end:
    (job, did the next call take it up?, the files that differ in the end) of each kill.

    After every kill, each file that a reader could see must be that of the reference."""
    killed, taken_up, before = [], [], None
    for job in [*jobs, None]:
        if job and (run/job/"manifest.json").exists(): continue # the last kill came after it
        if job: call, ended = kill_in(machine, job, run, seconds, rng)
        else:
            call, ended = machine.start(*run_args(run)), True
            assert call.wait() == 0, call.said()
        if before: taken_up.append(before in dict(call.states()))
        before = None if ended else at_work(call)
        if not before: continue
        killed.append(before)
        wrong = differences(run, reference, settled(run, before))
        assert not wrong, f"half-written after a kill in {before}: {wrong}"
    return [(job, up, differences(run, reference, artefacts(reference, job)))
            for job, up in zip(killed, taken_up, strict=True)]


def at_work(call):
    "The job that a killed call was at."
    return next((name for name, _ in reversed(call.states())), None)


def leftovers(run):
    "What no finished run should hold."
    return [p for p in run.rglob("*") if p.name in ("pending.json", "checkpoints")
            or p.name.endswith((".partial", ".old"))]


def tally(machine, folder, reference, seconds, kills, say=print):
    "Kill each job so many times: job → Counter(killed, resumed, identical)."
    rng, found = random.Random(0), {job: Counter() for job in seconds}
    for number in range(2*kills): # a kill may miss a short job by a hair: the next round makes up
        jobs = [job for job in seconds if found[job]["killed"] < kills]
        if not jobs: break
        run = folder/f"run-{number}"
        for job, up, wrong in round_of_kills(machine, run, reference, seconds, rng, jobs):
            found[job].update(killed=1, resumed=up, identical=not wrong)
            if wrong: say(f"after a kill in {job} these differ: {', '.join(wrong)}")
        assert not leftovers(run), leftovers(run)
        assert artefacts(run) == artefacts(reference)
        say(f"round {number + 1}: {sum(c['killed'] for c in found.values())} kills so far")
        shutil.rmtree(run)
    return found


def show(found):
    "The tally as a table."
    total = sum(found.values(), Counter())
    rows = [("stage", "killed", "resumed", "identical"),
            *((job, *map(c.__getitem__, ("killed", "resumed", "identical")))
              for job, c in [*found.items(), ("all", total)])]
    return "\n".join(f"{job:<20}{a:>9}{b:>9}{c:>11}" for job, a, b, c in rows)


def main(kills):
    "Print the tally; the exit status is 0 if every kill was survived."
    with tempfile.TemporaryDirectory() as folder, Machine() as machine:
        seconds = undisturbed(machine, Path(folder)/"reference")
        found = tally(machine, Path(folder), Path(folder)/"reference", seconds, kills,
                      partial(print, flush=True))
    print(show(found))
    return sum(found.values(), Counter())["killed"] != min(
        sum(c[key] for c in found.values()) for key in ("resumed", "identical"))


if __name__ == "__main__": sys.exit(serve() if sys.argv[1] == "serve" else main(int(sys.argv[1])))
