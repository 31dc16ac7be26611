"""Every error that the project raises on purpose, in one tree.

    LoscarError
    ├── ConfigError              an option or a configuration value is wrong
    │   ├── UnknownTaskError     --task names nothing that can be loaded
    │   ├── DataMissingError     a data file is not where the task looks for it
    │   └── PortInUseError       the server's address is taken
    ├── ConnectError             no server answered in time
    ├── AuthenticationError      missing or wrong token, or certificate
    ├── ProtocolError            a message breaks the protocol's rules
    │   ├── VersionMismatchError
    │   ├── WrongRunError
    │   ├── WrongModelError      the peer's model differs; names the first tensor that does
    │   ├── WrongRoundError
    │   ├── WrongSelectionError
    │   ├── MalformedError       counts, indices, sizes, order
    │   └── NonFiniteError       NaN or infinity among the values
    ├── RefusedError             the server refuses a member: full, slot taken, too many peers
    ├── SupersededError          a newer incarnation of the same name has joined
    ├── ReplicaDivergedError     the anchor's digest left the server's chain twice in a row
    ├── ModelChangedError        the model's storage was replaced after joining
    ├── SessionFailedError       the background task died; raised by the next step()
    ├── ServerLostError          the server stayed away longer than allowed
    ├── NoModelError             the server has no model to give away yet
    ├── WorkerFailedError        a worker process of a run ended with an error
    ├── SystemRefusedError       the operating system refused: disk full, no permission, too many open files
    └── InterruptedRunError      the user forced the end

`summary` says in a few words what happened, `exit_code` is the process's exit status, `grpc_status` the name of the
gRPC status code under which the error travels, `retriable` whether the same call may succeed later without anybody
changing anything, and `hint` one line that says what to do, unless `with_hint` gave one error a better one.
"""

from __future__ import annotations

from typing import ClassVar, Self


class LoscarError(Exception):
    """Base of all errors raised on purpose; `str(error)` is one readable line."""

    summary: ClassVar[str] = "an error inside loscar"
    exit_code: ClassVar[int] = 1
    grpc_status: ClassVar[str] = "INTERNAL"
    retriable: ClassVar[bool] = False
    hint: str = "this is a bug in loscar: please report it with the log"

    def with_hint(self, hint: str) -> Self:
        """This error, with a next step of its own in place of its class's."""
        self.hint = hint
        return self


class ConfigError(LoscarError):
    summary = "an option or a setting is wrong"
    exit_code = 3
    grpc_status = "INVALID_ARGUMENT"
    hint = "correct the option named above; `loscar COMMAND --help` lists the accepted values"


class UnknownTaskError(ConfigError):
    summary = "the task cannot be loaded"
    exit_code = 8
    hint = "give a built-in task's name or package.module:factory"


class DataMissingError(ConfigError):
    summary = "a data file is missing"
    exit_code = 9
    hint = "put the file where the message says, name its folder with --data-dir, or try --download"


class PortInUseError(ConfigError):
    summary = "the port is taken"
    exit_code = 10
    hint = "choose another port, or stop the process that holds this one"


class ConnectError(LoscarError):
    summary = "no server answered in time"
    exit_code = 4
    grpc_status = "UNAVAILABLE"
    retriable = True
    hint = "check that the server runs and that its address and port are reachable from here"


class AuthenticationError(LoscarError):
    summary = "wrong token or certificate"
    exit_code = 11
    grpc_status = "UNAUTHENTICATED"
    hint = "give the run's token with --token or LOSCAR_TOKEN, and check the certificates"


class ProtocolError(LoscarError):
    summary = "a message broke the protocol"
    exit_code = 12
    grpc_status = "INVALID_ARGUMENT"
    hint = "worker and server disagree: run the same loscar version on both sides"


class VersionMismatchError(ProtocolError):
    summary = "the two sides speak different protocol versions"
    exit_code = 6
    grpc_status = "FAILED_PRECONDITION"
    hint = "install the same loscar version on the worker and the server"


class WrongRunError(ProtocolError):
    summary = "the server holds another run"
    exit_code = 7
    grpc_status = "FAILED_PRECONDITION"
    hint = (
        "join the run that this server holds, its shards in their order, or leave --run-id out to take whichever it is"
    )


class WrongModelError(ProtocolError):
    summary = "the worker's model is not the run's"
    exit_code = 5
    grpc_status = "FAILED_PRECONDITION"
    hint = "every worker of a run must build the same model: names, shapes, dtypes and frozen values"


class WrongRoundError(ProtocolError):
    grpc_status = "FAILED_PRECONDITION"


class WrongSelectionError(ProtocolError):
    grpc_status = "FAILED_PRECONDITION"


class MalformedError(ProtocolError):
    pass


class NonFiniteError(ProtocolError):
    summary = "the model holds NaN or infinity"
    exit_code = 13
    hint = "the training diverged: lower the learning rate, or clip gradients"


class RefusedError(LoscarError):
    summary = "the server is full, or the slot is taken"
    exit_code = 14
    grpc_status = "RESOURCE_EXHAUSTED"
    retriable = True
    hint = "wait for a member to leave, or raise the server's limit"


class SupersededError(LoscarError):
    summary = "a newer worker took over the name"
    exit_code = 15
    grpc_status = "ABORTED"
    hint = "another process joined under the same --name: give each worker its own"


class ReplicaDivergedError(LoscarError):
    summary = "this machine's replica differs from the server's"
    exit_code = 16
    grpc_status = "DATA_LOSS"
    hint = "this machine computes different sums: check its memory, and that nothing sets flush-to-zero"


class ModelChangedError(LoscarError):
    summary = "the model was moved or cast after joining"
    exit_code = 17
    hint = "move or cast the model before joining, never after"


class SessionFailedError(LoscarError):
    summary = "the background task died"
    exit_code = 18
    hint = "the cause is shown above"


class ServerLostError(LoscarError):
    summary = "the server stayed away too long"
    exit_code = 19
    grpc_status = "UNAVAILABLE"
    retriable = True
    hint = "restart the server with the same --run-id; workers hold the state and hand it back"


class NoModelError(LoscarError):
    summary = "the server has no model yet"
    exit_code = 22
    grpc_status = "UNAVAILABLE"
    retriable = True
    hint = "wait until the run has begun: `loscar status` shows its phase"


class WorkerFailedError(LoscarError):
    summary = "a process of the run failed"
    exit_code = 20
    hint = "what the processes said themselves is in the folder logs of the run folder"


class SystemRefusedError(LoscarError):
    summary = "the operating system refused something"
    exit_code = 21
    hint = "check the free space, the permissions and the limits (ulimit -a) of this machine"


class InterruptedRunError(LoscarError):
    summary = "the run was forced to end"
    exit_code = 130
    hint = "a signal asked for it; what was written until then is kept"


def all_errors() -> list[type[LoscarError]]:
    """Every class of the tree, parents first."""
    found: list[type[LoscarError]] = []
    todo: list[type[LoscarError]] = [LoscarError]
    while todo:
        cls = todo.pop(0)
        found.append(cls)
        todo.extend(cls.__subclasses__())
    return found
