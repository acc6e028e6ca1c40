"""Two processes that meet in one group, for tests."""

import os
import socket
import warnings

import torch
import torch.multiprocessing as mp

from masklr.callbacks.peers import leave_peers


def in_two_processes(function, *args, join=True):
    """Call function(rank, *args) in each of two new processes; as `mp.spawn`, of a function at a file's top level."""
    return mp.spawn(one_of_two, args=(free_port(), function, *args), nprocs=2, join=join)


def one_of_two(rank, port, function, *args):
    """One of them: its environment is that of Lightning's processes."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    function(rank, *args)
    leave_peers()
    os._exit(0)  # Python's own end aborts if a thread of gloo's still holds a tensor


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
