"""Processes, devices, meters and evaluation: on real gloo processes."""

import json
import os
import random
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends import distributed as ddp_backend
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config

import utils
from configs import load_config
from configs.defaults import get_defaults
from models.build import separate_heads
from models.class_map import LabelMap
from tests.support.helpers import free_port, run_ranks, torchrun
from tests.support.teachers import Glance, Pair
from utils import (
    Distributed,
    Meters,
    StopRequest,
    amp_dtype,
    autocast,
    choose_device,
    evaluate,
    grad_scaler,
    init_distributed,
    peak_memory,
    seed_everything,
    time_calls,
)

CPU = torch.device("cpu")
TORCHRUN_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for key in TORCHRUN_KEYS:
        monkeypatch.delenv(key, raising=False)


# ---- processes and devices


def test_without_torchrun_a_run_is_alone_and_every_exchange_is_the_identity():
    world = init_distributed("cpu")
    assert world == Distributed(0, 1, 0, CPU) and world.is_main
    tensor, obj = torch.ones(2), {"a": 1}
    assert world.any_of(True, False) == [True, False] and world.on_main(lambda: 3) == 3
    assert (
        world.all_reduce_sum(tensor) is tensor
        and world.broadcast_object(obj) is obj
        and world.gather_objects(obj) == [obj]
    )
    world.broadcast_tensors([tensor])
    world.destroy()
    assert not torch.distributed.is_initialized()


def fault_of(function):
    try:
        function()
    except ValueError as error:
        return type(error).__name__, str(error)


def waits(group: dist.ProcessGroup) -> timedelta:
    """How long an exchange of CPU tensors in a group waits; a ValueError where it has no gloo."""
    return group._get_backend(CPU).options._timeout


def exchange():
    world = init_distributed("cpu", join_timeout=timedelta(seconds=30))
    tensor = torch.tensor([world.rank + 1.0, 10.0], dtype=torch.float64)
    total = world.all_reduce_sum(tensor)
    kept = tensor.tolist()
    world.broadcast_tensors([tensor])
    result = {
        "world": (world.rank, world.world_size, world.local_rank, str(world.device), world.is_main),
        "sum": total.tolist(),
        "kept": kept,
        "broadcast": tensor.tolist(),
        "object": world.broadcast_object({"chosen": Path("x")} if world.is_main else None),
        "gathered": world.gather_objects(("from", world.rank)),
        "backend": torch.distributed.get_backend(),
        "patience": [waits(group).days for group in (dist.group.WORLD, world.objects)],
        "any": world.any_of(world.rank == 1, False, True),
        "on main": world.on_main(lambda: world.rank),
        "fault": fault_of(lambda: world.on_main(lambda: int(f"not {world.rank}"))),
    }
    world.destroy()
    world.destroy()  # a second time does nothing
    return result, torch.distributed.is_initialized()


def test_one_process_of_torchrun_is_alone():
    assert run_ranks(exchange_alone, 1) == [(Distributed(0, 1, 0, CPU), False)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_exchange_tensors_and_objects(world_size):
    for rank, (result, left) in enumerate(run_ranks(exchange, world_size)):
        assert not left
        assert result == {
            "world": (rank, world_size, rank, "cpu", rank == 0),
            "sum": [sum(range(1, world_size + 1)), 10.0 * world_size],
            "kept": [rank + 1.0, 10.0],
            "broadcast": [1.0, 10.0],
            "object": {"chosen": Path("x")},
            "gathered": [("from", r) for r in range(world_size)],
            "backend": "gloo",
            "patience": [0, 7],
            "any": [True, False, True],
            "on main": 0,
            "fault": (
                "PeerError" if rank else "ValueError",
                "invalid literal for int() with base 10: 'not 0'",
            ),
        }


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes in which group tensors are exchanged, and on what device they are."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [
                x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)
            ]
            groups = [x for x in args if isinstance(x, torch.ScriptObject)]
            name = dist.ProcessGroup.unbox(groups[0]).group_name
            self.seen |= {(name, x.device.type) for x in tensors}
        return function(*args, **(kwargs or {}))


def exchange_objects():
    world = init_distributed("cpu", join_timeout=timedelta(seconds=30))
    with Watched() as objects:
        assert world.on_main(str) == world.main_first(str) == ""
    with Watched() as tensors:
        world.any_of(True)
    names = [world.objects.group_name, dist.group.WORLD.group_name]
    world.destroy()
    return names, objects.seen, tensors.seen


def test_objects_travel_in_the_patient_group_on_the_cpu():
    for (patient, default), objects, tensors in run_ranks(exchange_objects, 2):
        assert objects == {(patient, "cpu")} and tensors == {(default, "cpu")}
        assert patient != default


@pytest.mark.parametrize(
    "left_behind", ["nothing", "a whole group", "an early end", "some who came"]
)
def test_processes_that_join_find_nothing_of_those_before(left_behind):
    """In one store, as torchrun's outlives a restart."""
    store, moment = dist.HashStore(), timedelta(seconds=0.2)

    def join(rank: int, timeout: timedelta = timedelta(seconds=20)):
        found = utils.fresh_store(store, rank, 3, timeout)
        found.set(f"of {rank}", "here")
        return found

    if left_behind == "a whole group":
        with ThreadPoolExecutor(3) as pool:
            old = list(pool.map(join, range(3)))
    elif left_behind != "nothing":
        with ThreadPoolExecutor(2) as pool:
            waits = [
                pool.submit(join, rank, moment)
                for rank in ((0,) if left_behind == "an early end" else (0, 1))
            ]
        assert all("not all have come" in str(wait.exception()) for wait in waits)
    with ThreadPoolExecutor(3) as pool:
        late = [pool.submit(join, rank) for rank in (1, 2)]
        time.sleep(0.1)  # they meet what was left behind before rank 0 comes
        new = [join(0), *(wait.result() for wait in late)]
    assert all(store.check([f"of {rank}" for rank in range(3)]) for store in new)
    if left_behind == "a whole group":
        new[0].set("new", "")
        assert new[1].check(["new"]) and not any(store.check(["new"]) for store in old)


def exchange_alone():
    world = init_distributed("cpu")  # one process under torchrun needs no group
    return world, torch.distributed.is_initialized()


def test_torchrun_itself_is_understood(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, pathlib, torch, utils\n"
        "world = utils.init_distributed('auto')\n"
        "total = world.all_reduce_sum(torch.ones(1)).item()\n"
        "line = f'{world.rank} {world.world_size} {world.local_rank} {total}'\n"
        "pathlib.Path(f'rank{world.rank}.txt').write_text(line)\n"
        "world.destroy()\n"
    )
    done = torchrun(["program.py"], 2, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{r}.txt").read_text() for r in (0, 1)] == ["0 2 0 2.0", "1 2 1 2.0"]


def test_a_port_in_use_is_a_clear_error(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for key, value in zip(TORCHRUN_KEYS, ("0", "2", "0", "127.0.0.1", str(port))):
            monkeypatch.setenv(key, value)
        with pytest.raises(
            ValueError, match=f"can't join the others at 127.0.0.1:{port}: .*another --master-port"
        ):
            init_distributed("cpu", join_timeout=timedelta(seconds=2))


def test_processes_that_never_come_are_a_clear_error(monkeypatch):
    for key, value in zip(TORCHRUN_KEYS, ("0", "2", "0", "127.0.0.1", str(free_port()))):
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="see that every process was started"):
        init_distributed("cpu", join_timeout=timedelta(seconds=1))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK and WORLD_SIZE only one is set"),
        ({"WORLD_SIZE": "2"}, "RANK and WORLD_SIZE only one is set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK 2 is not in \[0, WORLD_SIZE = 2\)"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK 0 is not in"),
        (
            {"RANK": "first", "WORLD_SIZE": "2"},
            "the environment variable RANK is 'first', not a number",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            r"at \(MASTER_ADDR is not set\):\(MASTER_PORT is not set\)",
        ),
    ],
)
def test_a_wrong_environment_is_a_clear_error(environment, message, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        init_distributed("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Pretends that a machine has so many GPUs and perhaps MPS; returns the list of devices made
    current.
    """

    def pretend(gpus: int, mps: bool = False) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return chosen

    return pretend


def test_devices_are_chosen_by_name_and_local_rank(machine):
    current = machine(gpus=2, mps=True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    assert current == [0, 0, 1]
    assert choose_device("cpu", 1) == CPU and choose_device("mps") == torch.device("mps")
    machine(gpus=0, mps=True)
    assert choose_device("auto", 3) == CPU  # MPS only on request


@pytest.mark.parametrize(
    ("name", "gpus", "visible", "message"),
    [
        ("cuda", 0, None, "no GPU is visible to PyTorch; use --device cpu"),
        ("cuda", 0, "", r"no GPU is visible to PyTorch \(CUDA_VISIBLE_DEVICES is ''\)"),
        ("cuda", 1, None, "1 GPU is visible; start at most 1 processes"),
        (
            "auto",
            2,
            "0,1",
            r"LOCAL_RANK 2: 2 GPUs are visible \(CUDA_VISIBLE_DEVICES is '0,1'\); start at most 2",
        ),
        ("mps", 0, None, "DEVICE mps: this machine or this PyTorch has no MPS device"),
        ("tpu", 0, None, "DEVICE 'tpu' is none of auto, cuda, mps, cpu"),
    ],
)
def test_a_missing_device_is_a_clear_error(name, gpus, visible, message, machine, monkeypatch):
    machine(gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=message):
        choose_device(name, 2)


def test_without_torchrun_slurm_says_which_gpu_is_whose(machine, monkeypatch):
    current = machine(gpus=2)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("SLURM_LOCALID", "1")):
        monkeypatch.setenv(name, value)
    for local_rank in (None, "0"):
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
            init_distributed("cuda")
    assert current == [1, 0]


def test_slurm_may_show_each_task_its_own_gpu_alone(machine, monkeypatch):
    current = machine(gpus=1)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert choose_device("cuda", 3) == torch.device("cuda", 0) and current == [0]
    monkeypatch.setenv("LOCAL_RANK", "3")  # torchrun's: one more process than GPUs
    with pytest.raises(ValueError, match="1 GPU is visible; start at most 1 processes"):
        choose_device("cuda", 3)


def test_mps_runs_alone(machine, monkeypatch):
    machine(gpus=0, mps=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="DEVICE mps runs on a single process, not on 2"):
        init_distributed("mps")


def test_seeding_covers_every_global_generator():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def draws():
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    try:
        seed_everything(2**40 + 3)
        first = draws()
        assert draws() != first
        seed_everything(2**40 + 3)
        assert draws() == first
        seed_everything(4)
        assert all(a != b for a, b in zip(draws(), first))
        torch.manual_seed(2**62 + 1)
        dropped = nn.functional.dropout(torch.ones(64))
        torch.manual_seed(2**62)
        assert not torch.equal(nn.functional.dropout(torch.ones(64)), dropped)
        torch.manual_seed(2**62 + 1)
        assert torch.equal(nn.functional.dropout(torch.ones(64)), dropped)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


# ---- stopping


def is_asked(stop: StopRequest, world: Distributed) -> bool:
    """Whether any process was asked to stop."""
    return world.any_of(stop.received is not None)[0]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_and_the_former_handler_comes_back(name):
    world, number = Distributed(), getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not is_asked(stop, world)
        os.kill(os.getpid(), number)
        assert is_asked(stop, world) and stop.received == name
    assert signal.getsignal(number) is before


def test_whoever_asks_twice_on_the_keyboard_need_not_wait(capfd):
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        assert "Ctrl-C again ends now" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)


def test_signals_a_system_lacks_are_left_out():
    with StopRequest(("SIGTERM", "SIGNOSUCH")) as stop:
        assert not is_asked(stop, Distributed())


def stop_on_rank_1():
    world = init_distributed("cpu")
    with StopRequest() as stop:
        before = is_asked(stop, world)
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after = is_asked(stop, world)
    world.destroy()
    return before, after, stop.received


def test_all_ranks_stop_when_one_is_asked():
    assert run_ranks(stop_on_rank_1, 2) == [(False, True, None), (False, True, "SIGTERM")]


def agree(now: float, seconds: dict[int, float]) -> tuple[list[int], list[int]]:
    """After which of 40 pieces of work, each of so many seconds for this rank, it agreed; and which
    of them found that rank 1 wanted something, after its piece 9.
    """
    world, clock = init_distributed("cpu"), [0.0]
    utils.time.monotonic = lambda: clock[0]
    reduce, asked, found = Distributed.all_reduce_sum, [], []
    agreement = utils.Agreement(world)
    for piece in range(1, 41):
        clock[0] += seconds[world.rank]
        Distributed.all_reduce_sum = lambda *args, piece=piece: asked.append(piece) or reduce(*args)
        wants = world.rank == 1 and piece >= 9
        if agreement.any_of(False, wants, now=now > 0 and piece % now == 0) == [False, True]:
            found.append(piece)
    return asked, found


@pytest.mark.parametrize(
    ("now", "seconds", "expected"),
    [
        (0, {0: 1 / 16, 1: 3 / 16}, [1, 3, 7, 15, 23, 31, 39]),  # 8 pieces a second on average
        (0, {0: 0.5, 1: 3.0}, [*range(1, 41)]),
        (20, {0: 0.0, 1: 0.0}, [1, 3, 7, 15, 20, 30, 40]),  # and where all wait anyway
    ],
)
def test_processes_agree_once_a_second_after_the_same_work(now, seconds, expected):
    found = [piece for piece in expected if piece >= 9]
    assert run_ranks(agree, 2, now, seconds) == [(expected, found)] * 2


def test_one_process_need_not_ask_and_always_knows():
    agreement = utils.Agreement(Distributed())
    flags = [(bool(i % 2), bool(i % 3)) for i in range(12)]
    assert [tuple(agreement.any_of(*pair)) for pair in flags] == flags


# ---- precision


def amp(device: str, *options) -> torch.dtype | None:
    cfg = get_defaults()
    cfg.merge_from_list(list(options))
    return amp_dtype(cfg, torch.device(device))


def test_mixed_precision_is_what_the_device_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert amp("cuda") is torch.bfloat16
    assert amp("cuda", "AMP_DTYPE", "fp16") is torch.float16
    assert amp("cuda", "AMP_DTYPE", "off") is amp("cuda", "AMP_ENABLE", False) is None
    assert amp("cuda", "AMP_ENABLE", False, "AMP_DTYPE", "bf16") is None
    assert amp("cpu") is amp("mps") is None
    assert (
        amp("cpu", "AMP_DTYPE", "bf16") is None
        and amp("mps", "AMP_DTYPE", "bf16") is torch.bfloat16
    )
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert amp("cuda") is torch.float16
    with pytest.raises(
        ValueError, match="AMP_DTYPE bf16: Tesla V100 has no bfloat16; use AMP_DTYPE fp16 or auto"
    ):
        amp("cuda", "AMP_DTYPE", "bf16")
    with pytest.raises(ValueError, match="AMP_DTYPE 'fp8' is none of"):
        amp("cpu", "AMP_DTYPE", "fp8")


def test_autocast_and_scaler_follow_the_type():
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(CPU, None):
        assert layer(x).dtype is torch.float32
    with autocast(CPU, torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    for dtype, scale in ((None, 1.0), (torch.bfloat16, 1.0), (torch.float16, 65536.0)):
        assert grad_scaler(CPU, dtype).scale(torch.ones(())).item() == scale


# ---- the frame


def ending(program, load=lambda: None) -> int:
    return utils.run_program(load, lambda settings, stop: program(stop))


def raised(error):
    def program(stop):
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (torch.OutOfMemoryError("CUDA is full"), 2, "error: CUDA is full\n"),
        (utils.PeerError("told elsewhere"), 2, ""),
        (utils.Stopped("the same command goes on"), 75, ""),
        (KeyboardInterrupt(), 130, "ended without saving: the same command goes on\n"),
    ],
)
def test_how_a_program_ends(error, code, told, capsys):
    assert ending(raised(error)) == code
    assert capsys.readouterr().err == told


def test_a_group_that_can_not_be_aborted_changes_no_exit_code(monkeypatch):
    def abort():
        raise AttributeError("another PyTorch")

    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", abort)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert ending(raised(ValueError("bad"))) == 2
    finally:
        dist.destroy_process_group()


def test_a_fault_of_the_program_itself_is_raised_whatever_its_words():
    with pytest.raises(RuntimeError, match="Connection"):
        ending(raised(RuntimeError("Connection of two layers is wrong")))
    with pytest.raises(KeyError):
        ending(raised(KeyError("x")))


def test_a_fault_after_a_signal_stays_a_fault(capsys):
    def program(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device")

    assert ending(program) == 2
    assert "No space left" in capsys.readouterr().err


def end_while_another_waits(error):
    """How two processes end of which the last fails while the first waits for it, and whether they
    have left their group.
    """

    def program(stop):
        world = init_distributed("cpu")
        if world.rank:
            raise error
        dist.all_reduce(torch.ones(3), async_op=True)  # as in a backward pass
        world.gather_objects("in vain")

    try:
        code = ending(program)
    except KeyError:
        code = "a fault of the program"
    return code, dist.is_initialized()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (utils.Stopped("x"), 75),
        (KeyboardInterrupt(), 130),
        (KeyError("x"), "a fault of the program"),
    ],
)
def test_however_a_process_ends_it_leaves_its_group_and_none_waits_for_it(error, code):
    assert run_ranks(end_while_another_waits, 2, error) == [(2, False), (code, False)]


def test_a_second_ctrl_c_may_come_at_any_time(capsys, monkeypatch):
    """Even while a stop is being told."""

    def program(stop):
        signal.raise_signal(signal.SIGINT)
        raise utils.Stopped("x")

    def told(text):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(utils.logging.getLogger("tinyvit"), "info", told)
    assert ending(program) == 130


def test_kernels_are_fast_or_deterministic_and_new_memory_is_never_filled(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for deterministic, device, products in ((True, CPU, "highest"), (False, "cuda", "high")):
            utils.choose_kernels(deterministic, torch.device(device))
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.backends.cudnn.benchmark is not deterministic
            assert torch.get_float32_matmul_precision() == products
            assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        utils.choose_kernels(False, CPU)
        torch.backends.cudnn.benchmark = False


# ---- meters and evaluation


def filled(meters: Meters, rows: torch.Tensor) -> Meters:
    """The meters with rows of values added and collected; the last one is the norm."""
    names = ["a", "b", "norm"][-rows.shape[1] :]
    for row in rows:
        meters.add(dict(zip(names, row)))
    meters.collect()
    return meters


def test_meters_are_means_in_float64_over_windows_and_epochs():
    names = ("a", "b", "norm")
    rows = torch.rand(7, 3)
    rows[2, 2], rows[3, 2] = float("nan"), float("inf")  # skipped
    good = [row.tolist() for i, row in enumerate(rows) if i not in (2, 3)]
    mean = {name: sum(row[i] for row in good) / 5 for i, name in enumerate(names)}
    part = {name: (good[0][i] + good[1][i]) / 2 for i, name in enumerate(names)}
    meters = Meters(Distributed())
    meters.collect()
    assert meters.take_window() == {} and meters.take_epoch() == {}
    filled(meters, rows[:4].requires_grad_())
    assert meters.state["skipped_in_a_row"] == 2
    assert meters.take_window() == pytest.approx(part, rel=1e-14)
    again = Meters(Distributed())
    again.state.update(json.loads(json.dumps(meters.state)))  # as through a checkpoint
    filled(again, rows[4:])
    assert again.state["skipped"] == 2 and again.state["skipped_in_a_row"] == 0
    assert again.take_epoch() == pytest.approx(mean, rel=1e-14)
    assert list(again.take_window()) == list(names)
    assert again.take_window() == {} and again.take_epoch() == {}
    big = filled(Meters(Distributed()), torch.tensor([[16777216.0], [1.0]]))
    assert big.take_window()["norm"] * 2 == 16777217  # float32 would lose the last one


def test_a_value_that_only_some_updates_measure_is_noticed():
    meters = filled(Meters(Distributed()), torch.ones(1, 2))
    with pytest.raises(AssertionError, match="others"):
        meters.add({"norm": torch.ones(())})


def test_a_checkpoint_of_a_version_that_measured_other_values_can_be_continued():
    before = filled(Meters(Distributed()), torch.ones(3, 2))
    now = Meters(Distributed())
    now.state.update(json.loads(json.dumps(before.state | {"skipped": 4})))
    now.add({"norm": torch.tensor(2.0), "kl": torch.tensor(3.0)})
    now.collect()
    assert now.take_window() == now.take_epoch() == {"norm": 2.0, "kl": 3.0}
    assert now.state["skipped"] == 4


def test_meters_do_not_wait_for_the_device_before_they_are_collected(monkeypatch):
    meters = Meters(Distributed())

    def waits(*args):
        raise AssertionError("the device was waited for")

    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    meters.add({"norm": torch.ones(())})
    with pytest.raises(AssertionError, match="waited for"):
        meters.collect()


def test_calls_are_timed_after_a_warm_up_and_end_early_on_a_slow_machine(monkeypatch):
    calls = []
    clock = iter(range(1000))
    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(clock))
    assert time_calls(lambda: calls.append(1), CPU, calls=6) == [1.0] * 6 and len(calls) == 8
    calls.clear()
    assert (
        time_calls(lambda: calls.append(1), CPU, calls=30, limit=4.0) == [1.0] * 4
        and len(calls) == 8
    )
    assert 0 < peak_memory(CPU) < 1000


def evaluation(seed: int = 0, classes: int = 7):
    """A model with running statistics, images and labels."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes), nn.BatchNorm1d(classes))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
        model[1].weight.normal_(generator=generator)
    return (
        model,
        torch.randn(41, 3, 2, 2, generator=generator),
        torch.randint(0, classes, (41,), generator=generator),
    )


def batches(images, labels, size):
    return list(zip(images.split(size), labels.split(size)))


def naive(model, images, labels, classes=7):
    model = model.eval()
    with torch.no_grad():
        logits = model(images).double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ranked = np.argsort(-logits, axis=1)
    known = [i for i, label in enumerate(labels.tolist()) if label >= 0]
    return {
        "count": len(labels),
        "loss": -np.mean([log_p[i, labels[i]] for i in known]),
        "top1": 100 * sum(int(ranked[i, 0] == labels[i]) for i in known) / len(labels),
        "top5": 100 * sum(int(labels[i]) in ranked[i, :5] for i in known) / len(labels),
        "class_count": [sum(int(label == c) for label in labels) for c in range(classes)],
        "class_top1": [
            sum(int(labels[i] == c == ranked[i, 0]) for i in known) for c in range(classes)
        ],
    }


def assert_results(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert np.allclose(found[key], value, rtol=1e-6), key


@pytest.mark.parametrize("size", [1, 8, 41])
@pytest.mark.parametrize("missing", [0, 5])
def test_evaluate_against_a_naive_loop(size, missing):
    model, images, labels = evaluation()
    labels[:missing] = -1
    model.train()
    parts = batches(images, labels.to(torch.int32), size)  # narrow labels, and more than is needed
    loader = [(*part, "seed", "position") for part in parts]
    found = evaluate(model, loader, CPU, num_classes=7)
    assert model.training  # and the running statistics did not move:
    assert_results(found, naive(model, images, labels))
    without = evaluate(model.eval(), batches(images, labels, size), CPU)
    assert not model.training and set(without) == {"count", "loss", "top1", "top5"}


def test_evaluate_reads_two_heads_and_their_mean():
    _, images, labels = evaluation()
    model = Pair(7)
    found = evaluate(model, batches(images, labels, 8), CPU, num_classes=7)
    mean = nn.Module()
    mean.forward = lambda images: sum(model(images)) / 2
    heads = {"": mean, "class_head_": Glance(7), "distill_head_": Glance(7, 1)}
    expected = {"class_count": None, "class_top1": None, "count": 41}
    for name, head in heads.items():
        alone = naive(head, images, labels)
        expected |= {f"{name}{key}": alone[key] for key in ("loss", "top1", "top5")}
    expected |= {key: naive(mean, images, labels)[key] for key in ("class_count", "class_top1")}
    assert_results(found, expected)
    assert found["top1"] != found["class_head_top1"] != found["distill_head_top1"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 48}),
        ("repvit_m0_9", {}),  # whose heads lie deeper
    ],
)
def test_timms_heads_are_read_apart_as_in_eval_mode(name, shape):
    model = timm.create_model(name, num_classes=5, **shape)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    plain = evaluate(model, batches(images, labels, 4), CPU)
    assert separate_heads(model) and model.training
    apart = evaluate(model, batches(images, labels, 4), CPU)
    assert {key: apart[key] for key in plain} == plain and len(apart) == 1 + 3 * 3
    assert plain["loss"] < (apart["class_head_loss"] + apart["distill_head_loss"]) / 2
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda x: {"logits": x}, "['dict']"),
        (lambda x: (x, x, x), "[8, 10], [8, 10], [8, 10]"),
        (lambda x: (x, x[:, :3]), "[8, 10], [8, 3]"),
    ],
)
def test_other_answers_are_told_in_one_line(answer, found):
    _, images, labels = evaluation()
    model = Glance(10)
    model.register_forward_hook(lambda module, images, output: answer(output))
    with pytest.raises(ValueError, match=f"answers 8 images with {re.escape(found)}: one tensor"):
        evaluate(model, batches(images, labels, 8), CPU)


def test_evaluate_without_labels_gives_the_count_alone():
    model, images, labels = evaluation()
    assert evaluate(model, batches(images, torch.full_like(labels, -1), 8), CPU, num_classes=7) == {
        "count": 41
    }


class Look(LabelMap):
    """A map that changes nothing, and notes what it is given."""

    def logits(self, logits):
        seen.append((logits.dtype, logits.requires_grad))
        if len(seen) > 100:
            raise KeyError("stop")
        return logits


seen: list = []


def test_evaluate_restores_the_mode_after_an_error_and_builds_no_graph():
    model, images, labels = evaluation()
    model.train()
    seen[:] = [None] * 100
    with pytest.raises(KeyError):
        evaluate(model, batches(images, labels, 8), CPU, label_map=Look(torch.arange(7)))
    assert model.training and seen[100:] == [(torch.float32, False)]


def test_evaluate_maps_outputs_and_labels():
    model, images, labels = evaluation()
    places = LabelMap(torch.tensor([3, -1, 0, 6]))  # the output of each of the data's 4 classes
    labels %= 4
    found = evaluate(model, batches(images, labels, 8), CPU, label_map=places, num_classes=4)
    wrapped = nn.Sequential(model, nn.Module())
    wrapped[1].forward = places.logits
    assert_results(found, naive(wrapped, images, places.known(labels), classes=4))
    assert found["class_top1"][1] == 0 and found["class_count"][1] == 0


def test_evaluate_runs_under_autocast_and_counts_in_float32():
    model, images, labels = evaluation()
    seen.clear()
    look = Look(torch.arange(7))
    rough = evaluate(model, batches(images, labels, 8), CPU, torch.bfloat16, label_map=look)
    exact = evaluate(model, batches(images, labels, 8), CPU)
    assert {kind for kind, _ in seen} == {torch.float32} and rough["loss"] != exact["loss"]
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05)


def evaluate_part(counts):
    """Evaluate this rank's share, of another size than the others', with a wrapped model whose
    statistics differ by rank.
    """
    world = init_distributed("cpu")
    model, images, labels = evaluation()
    model = nn.parallel.DistributedDataParallel(model)
    model.module[2].running_mean += world.rank
    start = sum(counts[: world.rank])
    part = slice(start, start + counts[world.rank])
    loader = batches(images[part], labels[part], 4) if counts[world.rank] else []
    result = evaluate(model, loader, world.device, world=world, num_classes=7)
    meters = filled(Meters(world), torch.tensor([[1.0, 1.0 + world.rank]]))
    world.destroy()
    return result, meters.take_window()


@pytest.mark.parametrize("counts", [(41, 0), (14, 20, 7)])
def test_ranks_with_different_counts_evaluate_each_image_once(counts):
    expected = naive(*evaluation())
    for result, mean in run_ranks(evaluate_part, len(counts), counts):
        assert_results(result, expected)
        assert mean == {"b": 1.0, "norm": 1 + (len(counts) - 1) / 2}


def test_a_failing_rank_fails_the_test_with_its_traceback():
    with pytest.raises(AssertionError, match=r"(?s)rank 0 failed.*ValueError: DEVICE 'tpu'"):
        run_ranks(choose_device, 1, "tpu")


# ---- compiling, and the last batch


@pytest.mark.parametrize(
    ("opts", "device", "updates", "expected"),
    [
        ("", "cuda", 2000, (True, "auto, 2,000 updates")),
        ("", "cuda", 1999, (False, "auto, 1,999 updates")),
        ("", "cpu", 10**6, (False, "auto, on cpu")),
        ("TRAIN.DETERMINISTIC True", "cuda", 10**6, (False, "auto, with TRAIN.DETERMINISTIC")),
        ("TRAIN.COMPILE True TRAIN.DETERMINISTIC True", "cpu", 1, (True, "as asked")),
        ("TRAIN.COMPILE false", "cuda", 10**6, (False, "as asked")),
    ],
)
def test_who_is_compiled(opts, device, updates, expected):
    cfg = load_config(["--opts", *opts.split()])
    assert utils.must_compile(cfg, torch.device(device), updates) == expected


def test_a_model_that_the_compiler_fails_on_goes_on_uncompiled(monkeypatch):
    """Which shows at its first batch: the trial before is too simple to fail."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        if len(graphs) > 1:
            raise RuntimeError("no kernel\nfor that")
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    model, images, labels = evaluation()
    plain, told = deepcopy(model), []
    utils.compile_model(model, Distributed(), told.append)
    assert not told
    for one in (plain, model):
        one(images).sum().backward()
    assert len(told) == 1 and "(backend='compiler' raised: RuntimeError: no kernel" in told[0]
    assert "\n" not in told[0]
    assert torch.equal(plain[1].weight.grad, model[1].weight.grad)
    assert torch.equal(plain[2].running_mean, model[2].running_mean)  # no batch counts twice
    found, expected = (evaluate(one, batches(images, labels, 8), CPU) for one in (model, plain))
    assert found == expected and len(told) == 1 and len(graphs) == 2


@pytest.mark.skipif(
    not hasattr(functorch_config, "force_non_lazy_backward_lowering"),
    reason="this PyTorch compiles backward passes when they come",
)
def test_a_backward_pass_that_can_not_be_compiled_is_known_before_it_comes(monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("no kernel for that")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=no_compiler)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model, images, _ = evaluation()
    plain, told = deepcopy(model), []
    utils.compile_model(model, Distributed(), told.append)
    for one in (plain, model):
        one(images).sum().backward()
    assert len(told) == 1 and "no kernel for that" in told[0]
    assert torch.equal(plain[1].weight.grad, model[1].weight.grad)
    assert torch.equal(plain[2].running_mean, model[2].running_mean)


def test_a_model_whose_graph_can_not_be_cut_for_buckets_is_compiled_whole(monkeypatch):
    def no_cut(self, graph, inputs):  # of recomputed parts, PyTorch 2.6
        raise NotImplementedError("turn it off using torch._dynamo.config.optimize_ddp=False")

    graphs, told = [], []
    monkeypatch.setattr(ddp_backend.DDPOptimizer, "compile_fn", no_cut)
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda g, i: graphs.append(g) or g)
    )
    model, images, _ = evaluation()
    expected = deepcopy(model)(images)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        utils.compile_model(model, Distributed(), told.append)
        with torch._dynamo.config.patch(optimize_ddp=True):  # which is set back
            found = nn.parallel.DistributedDataParallel(model)(images)
    finally:
        dist.destroy_process_group()
    assert torch.equal(found, expected) and told == []
    assert len(graphs) == 2  # of the trial and of the model


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_last_batch_is_filled_up_for_a_compiled_model_alone(is_compiled, monkeypatch):
    sizes = []  # of the batches that the model runs on

    class Looks(Glance):
        def forward(self, images):
            if not torch.compiler.is_compiling():
                sizes.append(len(images))
            return super().forward(images)

    def compiler(graph, inputs):
        def run(*values):
            sizes.extend(len(value) for value in values if value.dim() == 4)
            return graph.forward(*values)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    images = torch.randn(19, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(19) % 5
    model = Looks(5)
    if is_compiled:
        utils.compile_model(model, Distributed(), print)
    found = evaluate(model, batches(images, labels, 8), CPU, num_classes=5)
    assert sizes == [8, 8, 8 if is_compiled else 3]
    assert_results(found, naive(Glance(5), images, labels, classes=5))
    assert torch.equal(utils.outputs_of(model, images[:3], 8), Glance(5)(images[:3]))
    sizes.clear()
    evaluate(model, batches(images[:3], labels[:3], 8), CPU)
    assert sizes == [3]  # a first batch is whole as it is
