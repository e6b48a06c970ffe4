"""An interpreter of the PTX that Triton makes, on the CPU: all threads of a program in lockstep, as numpy arrays.

    kernel = Kernel(ptx, shared_bytes)              # every instruction becomes one function
    kernel.launch(programs, [tensor, 3, ...])       # tensors are read and written in place
    assert not kernel.hazards.counts, kernel.hazards

It models global memory with the bounds of every tensor, shared memory, asynchronous copies that land at their wait,
the matrix instructions of sm_80 to sm_90 and sm_120, poison in memory and registers that nobody wrote, and races
between barriers (hazards.py). It raises `Fault` for addresses outside a tensor, and for what it does not model:
tensor memory (sm_100), TMA, mbarrier, atomics, branches in which the threads of a program part. It cannot see ptxas,
nor how hardware rounds inside a matrix instruction.
"""

from tests.tools.ptx.hazards import Fault
from tests.tools.ptx.launch import Kernel

__all__ = ["Fault", "Kernel"]
