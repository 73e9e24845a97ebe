"""Flower's grid in one process: what lets the apps of a federation run without network, daemons or Ray."""

import copy
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from coloss.errors import InputError

if TYPE_CHECKING:
    from flwr.app import Context, Message


def require_flower() -> None:
    """Refuse to go on without Flower.

    Raises:
        InputError: if it is not installed; says how to install it.

    Examples:
        >>> require_flower()
    """
    if importlib.util.find_spec("flwr") is None:
        raise InputError("a federation needs Flower: pip install 'coloss[federated]'")


class InProcessGrid:
    """Flower's `Grid` in one process: each message is answered by the client app at once, in the order of sending.

    Every node has a context of its own, whose state stays from message to message. What a client app raises is raised here.

    Args:
        client_app: a Flower `ClientApp`, or any `(message, context) -> message`.
        nodes: configuration of each node, told to the client app as `context.node_config`.
        run_config: told to it as `context.run_config`.

    Attributes:
        contexts: of the nodes, by node id.

    Raises:
        InputError: for no node, or if Flower is not installed.

    Examples:
        >>> from flwr.app import Message, RecordDict
        >>> grid = InProcessGrid(lambda message, context: Message(RecordDict(), reply_to=message), [{}, {}])
        >>> def server(grid, context):
        ...     messages = [
        ...         Message(RecordDict(), dst_node_id=node, message_type="train")
        ...         for node in grid.get_node_ids()
        ...     ]
        ...     print([reply.metadata.src_node_id for reply in grid.send_and_receive(messages)])
        >>> _ = grid.run_server(server)
        [1, 2]
    """

    def __init__(
        self,
        client_app: Callable[["Message", "Context"], "Message"],
        nodes: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        require_flower()
        from flwr.app import Context, RecordDict
        from flwr.serverapp import Grid

        if not nodes:
            raise InputError("nodes must be one at least, got none")
        # A base class would need Flower when this module is imported.
        Grid.register(type(self))
        self.client_app = client_app
        self.run_config = dict(run_config or {})
        self.contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(self.run_config),
            )
            for node, config in enumerate(nodes, 1)
        }
        self._run: Any = None
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def run_server(self, server_app: Callable[[Any, "Context"], None]) -> "Context":
        """Run a server app on this grid; gives its context, with what the app left in its state.

        Args:
            server_app: a Flower `ServerApp`, or any `(grid, context) -> None`.
        """
        from flwr.app import Context, RecordDict

        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=self.run_config)
        with _identity():
            server_app(self, context)
        return context

    def set_run(self, run: Any) -> None:
        """Remember what Flower tells of the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given."""
        return self._run

    def create_message(
        self,
        content: Any,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> "Message":
        """A message to a node."""
        from flwr.app import Message

        return Message(
            content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl
        )

    def get_node_ids(self) -> list[int]:
        """Numbers of the nodes, from 1."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable["Message"]) -> list[str]:
        """Have each message answered; gives the numbers under which replies are pulled.

        Raises:
            InputError: for a node that is not there.
        """
        numbers = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.contexts:
                raise InputError(f"dst_node_id must be in [1, {len(self.contexts)}], got {node}")
            self._sent += 1
            own = _copied(message)
            own.metadata.__dict__["_message_id"] = str(self._sent)
            self._replies[str(self._sent)] = self.client_app(own, self.contexts[node])
            numbers.append(str(self._sent))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list["Message"]:
        """Replies to messages, each once."""
        return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(
        self, messages: Iterable["Message"], *, timeout: float | None = None
    ) -> list["Message"]:
        """Replies to all messages, in their order; there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))


def _copied(message: "Message") -> "Message":
    """A message of its own, as over a network: what one client does to it is not seen by others. Arrays are bytes, which nobody can change."""
    from flwr.app import ArrayRecord, RecordDict

    own = copy.copy(message)
    content = RecordDict()
    for name, record in message.content.items():
        content[name] = (
            ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else copy.deepcopy(record)
        )
    own.__dict__["_content"], own.__dict__["_metadata"] = content, copy.copy(message.metadata)
    return own


@contextmanager
def _identity() -> Iterator[None]:
    """Newer releases of Flower let only a process that has a part in a run make messages."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        yield
        return
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    try:
        for name in names:
            setattr(TaskIdentity, name, 1)
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
