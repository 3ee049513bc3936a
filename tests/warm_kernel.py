"""A Jupyter kernel that starts at once: a process imports the heavy libraries and forks it off.

What Jupyter starts is the client below. It asks that process for a kernel, passes signals on to it
and ends with it; a client that is killed takes its kernel along. `vcb_nb` is not preloaded."""
import contextlib, json, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path

LIBRARIES = ("accelerate", "datasets", "IPython", "ipykernel.kernelapp", "matplotlib.pyplot",
             "pandas", "safetensors.torch", "torch", "transformers.trainer",
             "transformers.models.gpt_neox.modeling_gpt_neox",
             "transformers.models.llama.modeling_llama")


@contextlib.contextmanager
def warm_kernel(folder:Path):
    "The name of a kernel, as long as this lasts."
    address, spec = folder/"socket", folder/"kernels"/"warm"/"kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-S", __file__, "start", str(address), "{connection_file}"]
    spec.write_text(json.dumps(dict(argv=argv, display_name="warm", language="python")))
    paths = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (str(folder), paths)))
    before = dict(MPLBACKEND="module://matplotlib_inline.backend_inline", HF_HUB_OFFLINE="1")
    server = subprocess.Popen([sys.executable, __file__, "serve", str(address)], cwd=folder,
                              env={**os.environ, **before})
    try:
        while not address.exists():
            if server.poll() is not None: raise RuntimeError("the warm kernel did not start")
            time.sleep(.05)
        yield "warm"
    finally:
        server.kill()
        server.wait()
        if paths is None: del os.environ["JUPYTER_PATH"]
        else: os.environ["JUPYTER_PATH"] = paths


def serve(address):
    import importlib
    for name in LIBRARIES: importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)   # nobody waits for the kernels
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen()
    os.rename(address + ".new", address)
    while True:
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        listener.close()
        become_kernel(client)
        os._exit(0)


def become_kernel(client):
    "With the client's folder and environment, as if Python had been started there."
    asked = json.loads(client.makefile().readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    client.sendall(b"%d\n" % os.getpid())
    def watch():
        client.recv(1)      # the client never sends again
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["ipykernel_launcher.py", "-f", asked["file"]]
    sys.path[:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    from ipykernel.kernelapp import launch_new_instance
    launch_new_instance(parent_handle=os.getppid())     # ends with that process


def start(address, file):
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    asked = dict(file=file, folder=os.getcwd(), environment=dict(os.environ))
    server.sendall(json.dumps(asked).encode() + b"\n")
    kernel = int(server.makefile().readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(kernel, number))
    server.recv(1)      # returns when the kernel has ended


if __name__ == "__main__": {"serve": serve, "start": start}[sys.argv[1]](*sys.argv[2:])
