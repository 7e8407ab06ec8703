"""Long-context questions and answers: written by a model through `api`, or without one from the documents alone.

Documents are read by any reader, filtered and drawn (`selection`), cut (`sections`), asked about (`asking`) with
versioned prompts (`templates`, prompts/, sets/); replies are parsed (`parsing`), checked (`items`, `filters`) and
become conversations at a length, with the evidence even over depth (`conversation`). `SynthJob` is the whole.
"""

from longspan.synth.claims import UsedDocuments
from longspan.synth.conversation import ConversationSpec
from longspan.synth.job import Student, SynthJob, SynthSettings, estimate_job, require_samples
from longspan.synth.spec import SetSpec, load_set, shipped_sets

__all__ = [
    "ConversationSpec",
    "SetSpec",
    "Student",
    "SynthJob",
    "SynthSettings",
    "UsedDocuments",
    "estimate_job",
    "load_set",
    "require_samples",
    "shipped_sets",
]
