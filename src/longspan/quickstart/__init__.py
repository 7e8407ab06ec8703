"""The whole story on this machine: a model with a short context, a longer one, a report.

Read it from `run_quickstart` downwards; every step is a public piece that works the same at full size:

    base        a small Llama from scratch, or a pretrained model                (base.py)
    corpus      real texts, split by document                                    (texts.py)
    recall      texts with planted facts, for a model that is trained from scratch
    questions   texts with questions in a chat, for a pretrained one
    pretrain    a Llama at 256 tokens                                            (run.py)
    extend      longer rows, in stages
    evaluate    needles and perplexity: before, after, zero-shot methods         (measure.py)
    report      one page, and results.json for machines

The recipes are data (`recipes/quickstart*.yaml`, `config.py`). Killed at any point and run again, a run goes on from
where it was.
"""

from longspan.quickstart.config import Preset, QuickstartConfig, load_config
from longspan.quickstart.run import run_quickstart
from longspan.quickstart.variants import Control, controls

__all__ = ["Control", "Preset", "QuickstartConfig", "controls", "load_config", "run_quickstart"]
