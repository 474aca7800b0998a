"""The claims, a module each: `TITLE` says what is claimed, `measure` returns the rows of its table."""

from . import (
    constant_cost,
    long_context,
    memory_capacity,
    parallel_training,
    revising_storage,
    stabilisation,
    state_tracking,
)


CLAIMS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        state_tracking,
        revising_storage,
        memory_capacity,
        stabilisation,
        parallel_training,
        constant_cost,
        long_context,
    )
}
