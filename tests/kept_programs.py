"""Where the commands that tests start keep compiled programs: they are the same in most of them."""

import os

KEPT: dict[str, str] = {}
"""For the environment of a command; `conftest` fills it in."""


def keep(session) -> None:
    """session: the temporary folder of the session, of which each worker of xdist has a part."""
    shared = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    KEPT["JAX_COMPILATION_CACHE_DIR"] = str(shared / "compiled")
    KEPT["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
