"""Whether the Hugging Face hub can be reached: asked once in a process, before names are looked up there."""

from __future__ import annotations

from functools import lru_cache

from longspan.core.log import get_logger

SECONDS = 5.0
TRIES = 2


@lru_cache
def look_for_hub() -> None:
    """Leave this process to the hub's cache here where the hub cannot be reached, with a line in the log.

    Without this each file that is not in the cache is asked for six times, over 23 seconds.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    problem: Exception | None = None
    for _ in range(TRIES):
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except Exception as error:  # noqa: BLE001  of whichever package talks to the hub in this version
            problem = error
        else:
            return
    constants.HF_HUB_OFFLINE = True
    get_logger("core.hub").warning(
        "the hub cannot be reached (%s): names are looked up in its cache here alone", problem
    )
