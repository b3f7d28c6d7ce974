"""Codistillation between processes: each learns from copies of the others that are some steps old."""

import copy
import os
import pickle
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast.ops import check
from kdfast.procedures.generations import frozen


class PeerWarning(UserWarning):
    """A peer has not been heard from for a while."""


class PeerExchange:
    """Codistillation - Large Scale Distributed Neural Network Training through Online Distillation (Anil et al., 2018).

    Every process trains its own `network`, and every `every` steps writes its weights to a folder that all can reach,
    and reads what the others have written there, as in the paper. Nobody waits for anybody: a process that is slower,
    stopped or dead only leaves the others with its last weights, of which a :class:`PeerWarning` tells after `timeout`
    seconds; one that comes back is listened to again::

        exchange = PeerExchange(network, "/shared/run-7/weights")  # on every rank, after init_process_group
        codistillation = kdfast.Codistillation(burn_in=5)
        for inputs, labels in batches:
            logits, peers = network(inputs), exchange.logits(inputs)
            loss = cross_entropy(logits, labels)
            if peers:
                loss = loss + codistillation(logits, peers, epoch)
            ...
            exchange.step()

    Args:
        network: inputs -> logits (B, C), not its DDP wrapper; the peers' networks are copies of it, on its device.
        folder: new for each run, or the peers start from the weights of an old one.
        every: steps between two exchanges; the paper finds 50 hardly worse than 1.
        timeout: seconds without new weights after which a peer is warned of, by this process's clock.
        peer, peers: this process's number and how many there are, by default the rank and the world size of
            torch.distributed. Ranks that train one network together (DDP) share a number.

    Raises: TypeError, ValueError naming the argument; ValueError where a peer's weights do not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        folder: str | os.PathLike[str],
        *,
        every: int = 50,
        timeout: float = 600.0,
        peer: int | None = None,
        peers: int | None = None,
    ) -> None:
        check.count("every", every)
        check.positive("timeout", timeout)
        if peer is None or peers is None:
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError("peer and peers are required without torch.distributed, got None")
            peer, peers = dist.get_rank(), dist.get_world_size()
        check.count("peers", peers)
        if not 0 <= peer < peers:
            raise ValueError(f"peer must be from 0 to {peers - 1}, got {peer}")
        self.network: nn.Module = network
        self.folder: Path = Path(folder)
        self.every = every
        self.timeout = timeout
        self.peer = peer
        self.steps = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._others = [_Peer(i, self._path(i)) for i in range(peers) if i != peer]

    def step(self) -> None:
        """To be called after each optimizer step."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.exchange()

    def exchange(self) -> None:
        """Write this network's weights and read those of the peers that have new ones."""
        self._write()
        for other in self._others:
            other.read(self.network)
            other.warn_of_silence(self.timeout)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> list[Tensor]:
        """What the peers' networks, as old as they are, say about `inputs`; empty until one has been heard from."""
        return [other.network(inputs) for other in self._others if other.network is not None]

    @property
    def peer_steps(self) -> dict[int, int]:
        """Peer -> the step of its weights that are in use here."""
        return {other.number: other.step for other in self._others if other.network is not None}

    def _path(self, peer):
        return self.folder / f"peer{peer}.pt"

    def _write(self):
        state = {name: x.detach().cpu() for name, x in self.network.state_dict().items()}
        # A rename is atomic: a reader finds the old file or the new one, whole. Each writer has its own temporary file.
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save({"step": self.steps, "weights": state}, file)
            os.replace(name, self._path(self.peer))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class _Peer:
    """Another process as seen from here: its file, its network once it has been heard from, and when that was."""

    def __init__(self, number, path):
        self.number = number
        self.path = path
        self.network = None
        self.step = None
        self._seen, self._heard, self._warned = None, time.monotonic(), False

    def read(self, network):
        try:
            status = self.path.stat()
            # A replaced file may have the old one's time, where the clock of the file system is coarse.
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen == self._seen:
                return
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            step, weights = content["step"], content["weights"]
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError):
            return  # not there, or not readable now; if that lasts, the silence is warned of
        if self.network is None:
            self.network = frozen(copy.deepcopy(network))
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"network must be the same on all peers; the weights in {self.path} do not fit") from error
        self.step, self._seen, self._heard, self._warned = step, seen, time.monotonic(), False

    def warn_of_silence(self, timeout):
        silence = time.monotonic() - self._heard
        if silence <= timeout or self._warned:
            return
        self._warned = True
        rest = "without it" if self.network is None else f"with those of its step {self.step}"
        warnings.warn(
            f"peer {self.number} has written no weights to {self.path} for {silence:.0f} s: going on {rest}",
            PeerWarning,
            stacklevel=4,
        )
