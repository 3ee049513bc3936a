"""Value-based Calibration: align a language model to the values of its rewards.

The names below are loaded when they are first used; `import vcb_nb` alone imports nothing else."""
__version__ = "0.1.0"

_HOME = {"CalibrationTrainer": "calibrate", "CalibrationConfig": "calibrate", "LOSSES": "losses",
         "preference_loss": "losses", "candidate_logps": "logprobs", "reward_scores": "judges",
         "sample_candidates": "sample", "diagnose": "diagnosis", "load_recipe": "recipes",
         "run_recipe": "pipeline"}  # name → its module

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    "Import a name of the list from its module."
    if name not in _HOME: raise AttributeError(f"module 'vcb_nb' has no attribute '{name}'")
    from importlib import import_module
    return getattr(import_module(f"vcb_nb.{_HOME[name]}"), name)


def __dir__(): return sorted({*globals(), *_HOME})
