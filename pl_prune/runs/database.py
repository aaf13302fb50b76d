"""The database that the processes of a study share: Optuna's, a file or a server."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pl_prune.core.types import PruneError
from pl_prune.runs.lock import locked

HEARTBEAT = 60  # seconds; a run elsewhere whose process is silent for twice as long is given to another


def open_database(name: str, direction: Literal["maximize", "minimize"], folder: Path, storage: str | None) -> Any:
    """Open the Optuna study of a study, or make it.

    Args:
        name: Its name in the database.
        direction: "maximize" or "minimize".
        folder: The study's folder.
        storage: URL of the database; None: the file study.db in the folder.

    Returns:
        The Optuna study.

    Raises:
        PruneError: If Optuna is missing, or the database cannot be reached.
    """
    try:
        import optuna
    except ImportError as error:
        raise PruneError(
            "Expected Optuna, which studies stand on; found it missing. Run `pip install 'pl_prune[study]'`."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = storage or f"sqlite:///{folder.resolve() / 'study.db'}"
    try:
        with heartbeats(), locked(folder / "sharing", wait=True):
            database = optuna.storages.RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT,
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
            )
        return optuna.create_study(
            storage=database,
            study_name=name,
            direction=direction,
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
        )
    except Exception as error:
        raise PruneError(
            f"Expected a database at {url!r}; found that it cannot be reached ({type(error).__name__}: {error}). "
            "Look at --storage; leave it out for a file."
        ) from error


@contextmanager
def heartbeats() -> Iterator[None]:
    """Use Optuna's heartbeats without its word that they may change.

    Yields:
        None.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*experimental")
        yield
