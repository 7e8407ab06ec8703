"""Long-context questions and answers: written by a model through `api`, or without one from the documents alone.

Documents are read by any reader, filtered and drawn (`selection`), cut (`sections`), asked about (`asking`) with
versioned prompts (`templates`, prompts/, sets/); replies are parsed (`parsing`), checked (`items`, `filters`) and
become conversations at a length, with the evidence even over depth (`conversation`). `SynthJob` is the whole.
"""

from longspan.synth.claims import UsedDocuments
from longspan.synth.config import ConversationConfig, SetConfig, load_set, shipped_sets
from longspan.synth.estimates import estimate_job
from longspan.synth.job import SynthJob, require_samples
from longspan.synth.job_config import Student, SynthConfig

__all__ = [
    "ConversationConfig",
    "SetConfig",
    "Student",
    "SynthConfig",
    "SynthJob",
    "UsedDocuments",
    "estimate_job",
    "load_set",
    "require_samples",
    "shipped_sets",
]
