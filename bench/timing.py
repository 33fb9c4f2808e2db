"""How the tools of this folder take times: wait for the device, take turns."""

import time

import torch


def clock(function, device, times=1):
    """Seconds that one call takes, the work it leaves to a GPU included."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
    if wait:
        wait()
    begun = time.perf_counter()
    for _ in range(times):
        function()
    if wait:
        wait()
    return (time.perf_counter() - begun) / times


def in_turn(functions, rounds, device, times=1):
    """{name: function} -> {name: seconds of a call, one a round}. Busy machines slow all alike."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(clock(function, device, times))
    return seconds
