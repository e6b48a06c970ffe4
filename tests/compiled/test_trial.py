"""`auto` tries the kernels of a GPU before it trusts them; what fails is told once, and PyTorch's tiles serve.

There is no GPU here. `resolve` is asked about a tensor that says it is on one, and the trial runs on the CPU, with the
PyTorch tiles in place of the kernels; then each test breaks something. Real kernels are tried, right and wrong, in
test_ptx.py, test_launch_path.py and tests/kernels/test_trial.py.
"""

import math
import re
import threading
import time
import types
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.tools.kernels import compile_or_skip

compile_or_skip()
from hpcloss import backends  # noqa: E402
from hpcloss.backends import blockwise, resolve  # noqa: E402
from hpcloss.backends.triton import configs, launch, probe, trial  # noqa: E402

TILES = "hpcloss uses its PyTorch implementation on this GPU, not its Triton kernels: "
FOR_NOW = "hpcloss uses its PyTorch implementation on this GPU for now, not its Triton kernels: "
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


def tensor(index=0, dtype=torch.float16, channels=64):
    """What `resolve` reads of one on a GPU."""
    return types.SimpleNamespace(
        device=torch.device("cuda", index), dtype=dtype, shape=(2, channels), numel=lambda: 2 * channels
    )


def pack(features, *arguments):
    """As the kernels: unit rows of half precision in fp16."""
    rows, inverse_norm = blockwise.pack(features, *arguments)
    return rows.half() if features.element_size() == 2 else rows, inverse_norm


class Stage:
    """How often kernels were tried and with what, and places to break: `kernels` is what serves as the backend."""

    def __init__(self):
        self.tried, self.built, self.capturing = [], [], False
        self.kernels = types.SimpleNamespace(**{name: getattr(blockwise, name) for name in blockwise.__all__})
        self.kernels.pack = pack
        self.build = lambda kernel, programs, like, *arguments: None

    def failing(self, name, error):
        """Let a step of the trial raise."""

        def fail(*arguments):
            raise error

        setattr(self, "build", fail) if name == "build" else setattr(self.kernels, name, fail)

    def spoiling(self, name, change):
        """Let the first result of a step be another."""
        right = getattr(Stage().kernels, name)

        def spoilt(*arguments):
            found = right(*arguments)
            return change(found) if isinstance(found, torch.Tensor) else (change(found[0]), *found[1:])

        setattr(self.kernels, name, spoilt)


@pytest.fixture
def stage(monkeypatch):
    """A machine with GPUs on which everything is right, in a process that has asked nothing yet."""
    stage, failure = Stage(), trial.failure

    def on_the_cpu(device, *call):
        stage.tried.append((device.index, *call))
        return failure(torch.device("cpu"), *call)

    monkeypatch.setattr(trial, "failure", on_the_cpu)
    monkeypatch.setattr(trial, "kernels", stage.kernels)
    monkeypatch.setattr(launch, "run", lambda kernel, *call: stage.build(kernel, *call))
    monkeypatch.setattr(probe, "why_not", lambda device, index: None)
    monkeypatch.setattr(configs, "capability", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stage.capturing)
    backends.forget()
    yield stage
    backends.forget()


@pytest.fixture
def told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(one.message) for one in caught if "hpcloss" in str(one.message)]


def refusal(*arguments, **options):
    with pytest.raises(NotImplementedError) as caught:
        resolve("triton", tensor(*arguments, **options))
    return str(caught.value)


def assert_tiles(told, message):
    """`auto` takes the tiles, says so once, and an explicit request raises with the reason."""
    assert [resolve("auto", tensor()) for _ in range(3)] == ["pytorch"] * 3
    (said,) = told()
    assert re.fullmatch(re.escape(TILES) + message, said), said
    assert re.fullmatch(f"backend 'triton' cannot run this call: {message}", refusal())
    assert told() == [said]


# --------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_right_numbers(stage, told, dtype):
    """One trial a device and dtype, as wide as the first call; it draws nothing from torch's generator."""
    before = torch.get_rng_state()
    for channels in (60, 128, 512):
        assert resolve("auto", tensor(dtype=dtype, channels=channels)) == "triton"
    assert resolve("triton", tensor(dtype=dtype)) == "triton"
    assert stage.tried == [(0, dtype, 64)] and told() == []
    assert torch.equal(torch.get_rng_state(), before)


def test_no_trial_where_no_kernel_takes_the_call(stage, told):
    for call in (tensor(dtype=torch.float64), tensor(channels=513)):
        assert resolve("auto", call) == "pytorch"
    assert stage.tried == [] and told() == []


@pytest.mark.parametrize("error", [ImportError("no libtriton"), AttributeError("module 'numpy' has no attribute 'x'")])
def test_triton_cannot_be_imported(stage, told, monkeypatch, error):
    def load(name):
        raise error

    monkeypatch.setattr(backends, "load", load)
    assert_tiles(told, re.escape(f"Triton cannot be imported: {type(error).__name__}: {error}"))
    assert stage.tried == []


BUILD = re.escape(f" ({trial.FIX})")
STEP = "a small step in float16 with 64 channels "
ERRORS = {
    "compiler": ("build", RuntimeError("no compiler\nFailed to find C compiler"),
                 f"a kernel cannot be built here: RuntimeError: Failed to find C compiler{BUILD}"),
    "driver": ("build", ImportError("libcuda.so.1: cannot open"),
               f"a kernel cannot be built here: ImportError: libcuda.so.1: cannot open{BUILD}"),
    "at compile": ("pack", SyntaxError("at 12:8: x = tl.dot(a, b)"), STEP + "fails: SyntaxError: at 12:8: .*"),
    "at launch": ("pair_lse", RuntimeError("Triton Error [CUDA]: invalid argument"),
                  STEP + "fails: RuntimeError: Triton Error .CUDA.: invalid argument"),
    "resources": ("pair_lse_backward", ValueError("out of resource: shared memory, Required: 239616"),
                  STEP + "fails: ValueError: out of resource: shared memory, Required: 239616"),
    "without a word": ("pack_backward", AssertionError(), STEP + "fails: AssertionError: without a word"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(stage, told, case):
    name, error, message = ERRORS[case]
    stage.failing(name, error)
    assert_tiles(told, message)
    assert len(stage.tried) == 1


def one_entry(change):
    """Change an entry of middling size, as one wrong thread would."""

    def changed(x):
        x = x.clone()
        place = x.abs().flatten().nan_to_num(0.0, posinf=0.0, neginf=0.0).argsort()[-x.numel() // 8]
        x.view(-1)[place] = change(x.view(-1)[place], x[x.isfinite()].abs().max())
        return x

    return changed


# A row of the log-sum-exp that is off by a tenth, a class that is left out, a gradient that is not rescaled ...
WRONG = {
    "rows": ("pack", one_entry(lambda x, most: x + 0.02 * most)),
    "rows nan": ("pack", one_entry(lambda x, most: math.nan)),
    "sums": ("pair_lse", lambda lse: lse + 0.02),
    "sums of one row": ("pair_lse", one_entry(lambda x, most: x + 1)),
    "sums of too many keys": ("pair_lse", lambda lse: torch.where(lse == -math.inf, 4.0, lse)),
    "sums nan": ("pair_lse", one_entry(lambda x, most: math.nan)),
    "gradient": ("pair_lse_backward", lambda grad: 1.02 * grad),
    "gradient zero": ("pair_lse_backward", torch.zeros_like),
    "gradient negative": ("pack_backward", torch.neg),
    "gradient of one entry": ("pack_backward", one_entry(lambda x, most: x + 0.02 * most)),
    "gradient nan": ("pack_backward", one_entry(lambda x, most: math.nan)),
    "gradient infinite": ("pack_backward", one_entry(lambda x, most: math.inf)),
    "gradient in another order": ("pack_backward", lambda grad: grad.flip(-1)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers(stage, told, case):
    stage.spoiling(*WRONG[case])
    off = rf".*\b{case.split()[0]} off by \S+ of the largest entry.* \(at most 0.01 is rounding\)"
    assert_tiles(told, f"{STEP}computes wrong numbers: {off}")
    assert ("nan" in case) == ("off by nan" in told()[0])


def test_rounding_is_not_wrong(stage, told):
    """What half precision and tf32 do to rows and slopes."""
    stage.spoiling("pair_lse_backward", lambda grad: grad.bfloat16().float())
    for dtype in (torch.float16, torch.bfloat16):
        assert resolve("auto", tensor(dtype=dtype)) == "triton"
    torch.set_float32_matmul_precision("high")
    try:
        stage.spoiling("pack", lambda rows: (rows.view(torch.int32) & ~0x1FFF).view(torch.float32))
        assert resolve("auto", tensor(dtype=torch.float32)) == "triton" and told() == []
    finally:
        torch.set_float32_matmul_precision("highest")


def test_single_precision_is_held_to_more(stage, told):
    stage.spoiling("pack", lambda rows: rows.half().float())
    assert resolve("auto", tensor(dtype=torch.float32)) == "pytorch"
    assert "in float32 with 64 channels computes wrong numbers" in told()[0] and "at most 0.0001" in told()[0]


# ---------------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError(), RuntimeError("Triton Error [CUDA]: out of memory")])
@pytest.mark.parametrize("name", ["build", "pair_lse"])
def test_short_memory_is_asked_again(stage, told, name, error):
    stage.failing(name, error)
    assert [resolve("auto", tensor()) for _ in range(2)] == ["pytorch"] * 2
    (said,) = told()
    assert said.startswith(FOR_NOW) and type(error).__name__ in said
    assert type(error).__name__ in refusal()
    stage.build, stage.kernels.pair_lse = Stage().build, blockwise.pair_lse
    assert resolve("auto", tensor()) == "triton" and resolve("auto", tensor()) == "triton"
    assert len(stage.tried) == 4 and told() == [said]


def test_a_capture_elsewhere_is_no_failure(stage, told):
    """A graph that another thread captures forbids what the trial does."""
    stage.failing("pack", RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    assert resolve("auto", tensor()) == "pytorch" and told()[0].startswith(FOR_NOW)
    stage.kernels.pack = pack
    assert resolve("auto", tensor()) == "triton" and len(told()) == 1


def test_no_trial_during_capture(stage, told):
    """Nothing is launched that the host would wait for. `auto` takes the tiles, an explicit request the kernels."""
    stage.capturing = True
    assert [resolve("auto", tensor()) for _ in range(2)] == ["pytorch"] * 2
    assert told() == [f"{FOR_NOW}a CUDA graph is being captured and no step has run before, so the kernels cannot be"
                      " tried (run one step before the capture)"]  # fmt: skip
    assert resolve("triton", tensor()) == "triton" and stage.tried == []
    stage.capturing = False
    assert resolve("auto", tensor()) == "triton" and len(stage.tried) == 1
    stage.capturing = True
    assert resolve("auto", tensor()) == "triton" and len(stage.tried) == 1 and len(told()) == 1


def test_a_failure_is_remembered_during_capture(stage, told):
    stage.failing("pair_lse", RuntimeError("invalid argument"))
    assert resolve("auto", tensor()) == "pytorch"
    stage.capturing = True
    assert resolve("auto", tensor()) == "pytorch" and "invalid argument" in refusal() and len(told()) == 1


# ------------------------------------------------------------------------------------------- devices and threads


def test_two_devices(stage, told):
    """Each is tried; a failure on one is told once and is none of the other's."""
    on_one = trial.failure

    def failure(device, *call):
        stage.kernels.pair_lse = blockwise.pair_lse
        if device.index == 1:
            stage.failing("pair_lse", RuntimeError("no kernel image"))
        return on_one(device, *call)

    trial.failure = failure  # `stage` puts it back
    found = [resolve("auto", tensor(index)) for index in (0, 1, 1, 0)]
    assert found == ["triton", "pytorch", "pytorch", "triton"]
    assert [index for index, *_ in stage.tried] == [0, 1]
    assert told() == [f"{TILES}{STEP}fails: RuntimeError: no kernel image"]


def test_one_failure_of_two_dtypes(stage, told):
    """What keeps all kernels from a device is one reason; what fails in one dtype is none of another's."""
    stage.failing("build", RuntimeError("no compiler"))
    assert [resolve("auto", tensor(dtype=dtype)) for dtype in (torch.float16, torch.float32)] == ["pytorch"] * 2
    assert len(told()) == 1
    backends.forget()
    stage.build = Stage().build

    def pack_single(x, *arguments):
        if x.dtype != torch.float32:
            raise OSError("bad fp16")
        return pack(x, *arguments)

    stage.kernels.pack = pack_single
    found = [resolve("auto", tensor(dtype=dtype)) for dtype in (torch.float16, torch.float32) * 2]
    assert found == ["pytorch", "triton"] * 2
    assert told()[1:] == [f"{TILES}{STEP}fails: OSError: bad fp16"]


@pytest.mark.parametrize("error", [None, RuntimeError("invalid argument")])
def test_threads_at_once(stage, told, error):
    """One of them tries, the others wait for what it finds."""
    stage.build = lambda *call: time.sleep(0.2)
    if error:
        stage.failing("pair_lse", error)
    found, start = [], threading.Barrier(4)

    def ask():
        start.wait()
        found.append(resolve("auto", tensor()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["pytorch" if error else "triton"] * 4
    assert len(stage.tried) == 1 and len(told()) == (1 if error else 0)


# ----------------------------------------------------------------------------------------------- modes of torch


def test_under_modes_of_torch(stage, told):
    """Fake tensors, autocast, another default device or dtype, gradients off: the trial's thread has none of them."""
    with FakeTensorMode():
        assert resolve("auto", torch.empty(2, 64, dtype=torch.float16, device="cuda:0")) == "triton"
    backends.forget()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert resolve("auto", tensor()) == "triton"
    assert len(stage.tried) == 2 and told() == []


def test_default_dtype(stage):
    torch.set_default_dtype(torch.float64)
    try:
        assert resolve("auto", tensor()) == "triton"
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("works", [True, False])
def test_while_torch_compile_traces(stage, told, works, dynamic):
    """The answer is asked while tracing and is part of the compiled code; also where channels are no constant."""
    if not works:
        stage.spoiling("pair_lse", torch.zeros_like)

    def reasons(x):
        return torch.full_like(x, len(backends.unsupported("triton", x, falls_back=True)))

    torch._dynamo.reset()  # what was compiled keeps its answer
    compiled = torch.compile(reasons, backend="eager", fullgraph=True, dynamic=dynamic)
    for channels in (50, 60, 50):
        x = torch.zeros(8, channels)
        assert torch.equal(compiled(x), torch.full_like(x, 0 if works else 1))
    assert stage.tried == [(None, torch.float32, 64)]
    assert resolve("auto", tensor(dtype=torch.float32)) == ("triton" if works else "pytorch")


def test_the_host_may_wait_where_a_training_forbids_it(monkeypatch):
    modes = ["error"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with trial._waiting(torch.device("cuda", 0)):
        assert modes[-1] == "default"
    with pytest.raises(KeyError), trial._waiting(torch.device("cuda", 0)):
        raise KeyError
    assert modes == ["error", "default", "error", "default", "error"]
    with trial._waiting(torch.device("cpu")):
        assert len(modes) == 5
