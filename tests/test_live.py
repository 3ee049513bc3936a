"""Watching a run: the record is the trainer's, the weights are untouched,
the stored output is one picture."""
import copy, math, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import nbformat, pytest, torch
from datasets import Dataset
from nbclient import NotebookClient

from vcb_nb import live
from vcb_nb.artifacts import InputError
from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer
from vcb_nb.live import LivePlot, draw_run, watched_ratios
from vcb_nb.logprobs import score_logps
from vcb_nb.models import new_policy
from vcb_nb.saving import save_model
from vcb_nb.training import curve

ROOT = Path(__file__).parent.parent
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 max_position_embeddings=64)
    return new_policy(tiny_tokenizer, seed=0, **sizes)


@pytest.fixture(scope="module")
def rows(model):
    "Six scored prompts of four candidates; the last prompt has equal rewards."
    rng = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(2, 250, (n,), generator=rng).tolist()
    out = [dict(prompt=str(p), prompt_ids=ids(3 + p), completions=list("abcd"),
                completion_ids=[ids(4 + k) + [0] for k in range(4)],
                rewards=torch.randn(4, generator=rng).tolist() if p < 5 else [1.] * 4)
                for p in range(6)]
    logps = score_logps(model, [r["prompt_ids"] for r in out], [r["completion_ids"] for r in out])
    return Dataset.from_list([row | {"ref_logps": ref} for row, ref in zip(out, logps)])


def trained(model, rows, tokenizer, folder, callbacks=(), **settings):
    "A trainer after six steps, with an evaluation in the middle."
    settings = dict(max_steps=6, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
                    eval_strategy="steps", eval_steps=3, learning_rate=1e-2, use_cpu=True,
                    disable_tqdm=True, report_to="none") | settings
    config = CalibrationConfig(str(folder), **settings)
    trainer = CalibrationTrainer(copy.deepcopy(model), config, rows, rows, tokenizer,
                                 callbacks=list(callbacks))
    trainer.train()
    return trainer


class Screen:
    "What `IPython.display.display` gives back, keeping what it is shown."
    def __init__(self): self.shown = []

    def __call__(self, bundle, raw, display_id):
        self.shown.append(bundle)
        return self

    def update(self, bundle, raw): self.shown.append(bundle)


def test_history_is_the_trainers_log(model, rows, tiny_tokenizer, tmp_path):
    watcher = LivePlot(rows)
    trainer = trained(model, rows, tiny_tokenizer, tmp_path, [watcher])
    assert watcher.history == trainer.state.log_history
    steps, losses = curve(watcher.history, "loss")
    assert steps == (1, 2, 3, 4, 5, 6) and losses[0] == pytest.approx(2., abs=1e-5)
    line = watcher.figure.axes[0].lines[0]
    assert tuple(line.get_xdata()) == steps and tuple(line.get_ydata()) == losses
    r2 = watcher.figure.axes[1].lines[0]
    assert tuple(r2.get_ydata()) == curve(watcher.history, "calibration/r2")[1]


@pytest.mark.parametrize("peft_config",
                         [None, {"r": 2, "target_modules": "all-linear", "lora_dropout": .1}])
def test_weights_are_the_same_to_the_bit(model, rows, tiny_tokenizer, tmp_path, monkeypatch,
                                         peft_config):
    """Drawing at every step and scoring the watched candidates changes no weight,
    LoRA dropout included."""
    screen = Screen()
    monkeypatch.setattr(live, "notebook_display", lambda: screen)
    watcher = LivePlot(rows, every=0, share=1.)
    with_plot = trained(model, rows, tiny_tokenizer, tmp_path/"a", [watcher],
                        peft_config=peft_config)
    without = trained(model, rows, tiny_tokenizer, tmp_path/"b", peft_config=peft_config)
    assert watcher.redraws >= 6 and len(screen.shown) == watcher.redraws
    ours, theirs = with_plot.model.state_dict(), without.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    key = lambda t: [row.get("loss") for row in t.state.log_history]
    assert key(with_plot) == key(without)


def test_redraws_are_rare(model, rows, tiny_tokenizer, tmp_path, monkeypatch):
    "With an hour between pictures: the first, and the one at the end."
    monkeypatch.setattr(live, "notebook_display", Screen)
    watcher = LivePlot(every=3600)
    trained(model, rows, tiny_tokenizer, tmp_path, [watcher])
    assert watcher.redraws == 2
    clock = iter([10., 13.])  # a picture that takes three seconds
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=clock.__next__))
    watcher.every = 0
    watcher._redraw(CalibrationConfig(str(tmp_path), use_cpu=True), None)
    assert watcher.due == pytest.approx(13 + 27)  # a tenth of the time, at most


def test_watched_candidates(model, rows):
    "At the start every log-ratio is 0; the prompt without a signal is left out."
    across, up = watched_ratios(model, rows)
    assert len(across) == len(up) == 5 * 4
    assert max(map(abs, up)) < 1e-5
    close(torch.tensor(across).view(5, 4).std(1), torch.ones(5))
    watched = ([-1., 0., 1.], [-5., 0., 5.])
    axes = draw_run([], "vcb", .2, watched).axes
    assert list(axes[2].lines[0].get_ydata()) == watched[1]
    assert list(axes[2].lines[1].get_ydata()) == [-5., 5.]  # slope 1/gamma


def test_log_ratios_move_with_the_policy(model, rows, tiny_tokenizer, tmp_path):
    "After training on the watched prompts their log-ratios correlate with the rewards."
    watcher = LivePlot(rows)
    trained(model, rows, tiny_tokenizer, tmp_path, [watcher], max_steps=30, eval_strategy="no")
    across, up = (torch.tensor(line) for line in watcher.figure.axes[2].lines[0].get_data())
    assert torch.corrcoef(torch.stack([across, up]))[0, 1] > .3


@pytest.mark.parametrize("loss", ["dpo", "slic"])
def test_a_loss_without_r2_shows_the_correlation(model, rows, tiny_tokenizer, tmp_path, loss):
    watcher = LivePlot(rows)
    trained(model, rows, tiny_tokenizer, tmp_path, [watcher], loss=loss)
    labels = [line.get_label() for line in watcher.figure.axes[1].lines]
    assert "correlation, training" in labels and len(watcher.figure.axes[2].lines) == 1
    steps, values = curve(watcher.history, "calibration/correlation")
    assert steps and all(map(math.isfinite, values))


def test_bad_settings_are_refused(rows):
    for settings in (dict(every=-1), dict(share=0), dict(share=2)):
        with pytest.raises(InputError, match="share above 0"): LivePlot(**settings)
    with pytest.raises(InputError, match="ref_logps.*vcb score"):
        LivePlot(rows.remove_columns("ref_logps"))


def test_silent_without_ipython():
    """A process where IPython cannot be imported: the callback is made, draws to itself,
    shows nothing."""
    code = ("import sys; sys.modules['IPython'] = None\n"
            "from types import SimpleNamespace as N\n"
            "from vcb_nb.live import LivePlot, notebook_display\n"
            "p, state = LivePlot(), N(is_world_process_zero=True, "
            "log_history=[{'step': 1, 'loss': 2.}])\n"
            "p.on_log(None, state, None); p.on_train_end(None, state, None)\n"
            "assert notebook_display() is None and p.history == state.log_history and p.figure")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr


@pytest.mark.slow
def test_a_kernel_stores_one_static_picture(model, rows, tiny_tokenizer, tmp_path, monkeypatch):
    """In a real Jupyter kernel the picture is replaced in place: the notebook keeps the last,
    as PNG."""
    save_model(model, tiny_tokenizer, tmp_path/"model")
    rows.to_json(tmp_path/"rows.jsonl")
    code = ("from vcb_nb.data import load_candidates\n"
            "from vcb_nb.live import LivePlot\n"
            "from vcb_nb.calibrate import CalibrationConfig, CalibrationTrainer\n"
            "rows = load_candidates('rows.jsonl', need=('rewards', 'ref_logps'))\n"
            "config = CalibrationConfig('out', model='model', "
            "max_steps=4, logging_steps=1, use_cpu=True,\n"
            "                           save_strategy='no', disable_tqdm=True, report_to='none')\n"
            "live = LivePlot(rows, every=0, share=1.)\n"
            "trainer = CalibrationTrainer('model', config, rows, callbacks=[live])\n"
            "trainer.train(); live.redraws")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = notebook.cells[0].outputs
    pictures = [o for o in outputs if "<img " in o.get("data", {}).get("text/html", "")]
    assert len(pictures) == 1 and pictures[0]["data"].keys() == {"text/html", "text/plain"}
    assert int(outputs[-1]["data"]["text/plain"]) >= 5
