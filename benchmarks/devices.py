"""The GPUs of which times are predicted, in SI units.

From NVIDIA's datasheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" (SXM): memory and its rate, dense rates of
float32, float64 (tensor cores) and TF32 (half of the rate with sparsity, which is what they print). From the white
paper "NVIDIA H100 Tensor Core GPU Architecture": 132 multiprocessors, 50 MB of L2. From the CUDA C++ Programming Guide,
"Arithmetic Instructions" and "Technical Specifications", of compute capability 9.0: what a multiprocessor does in a
clock. The clock is the one that the float32 rate stands for: 67e12 / (132 x 128 lanes x 2).

What no vendor publishes is marked as judged; so it is the same for both implementations that are compared.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    name: str
    memory: float  # bytes
    hbm: float  # bytes/s
    float32: float  # FLOP/s
    float64: float
    tf32: float
    multiprocessors: int = 132
    clock: float = 1.98e9
    l2: int = 50 * 10**6  # bytes

    # Judged: no datasheet has them.
    l2_rate: float = 5.5e12  # bytes/s; half of what A100's white paper gives in bytes a clock, at this clock
    hbm_clocks: float = 600.0  # from a load to its use, where L2 does not hold the data
    l2_clocks: float = 270.0  # where it does
    near_clocks: float = 30.0  # from a use of shared memory or of a slow unit to its result
    launch: float = 2e-6  # s of a launch beside others of a stream: the kernel's start and end
    reached: float = 0.9  # share of the rate of the memory that streaming kernels reach
    product_reached: float = 0.75  # share of the arithmetic rates that large matrix products reach
    issued: float = 0.65  # share of its issue slots that a full multiprocessor fills

    def product_rate(self, dtype, tf32):
        """FLOP/s of matrix products."""
        rates = {"float64": self.float64, "float32": self.tf32 if tf32 else self.float32}
        return self.product_reached * rates.get(dtype, 2 * self.tf32)  # half and bfloat16: twice TF32


H100 = Device("H100 SXM", memory=80e9, hbm=3.35e12, float32=67e12, float64=67e12, tf32=494.5e12)
H200 = replace(H100, name="H200", memory=141e9, hbm=4.8e12)
DEVICES = {"h100-sxm": H100, "h200": H200}

SECTOR = 32  # bytes that memory is read in
L1_SECTORS = 4  # of a clock
SCHEDULERS = 4  # each issues one instruction of a warp in a clock

# Clocks that an instruction of a warp takes of its pipe, of which a multiprocessor has one for each scheduler; the
# classes are those of tests/sass_table.py. Warp instructions are shuffles, mostly.
PIPES = {
    "fp32": 1.0,
    "fp64": 2.0,
    "int": 2.0,
    "mufu": 8.0,
    "convert": 2.0,
    "warp": 4.0,
}
BANK_CLOCKS = 1.0  # of the one pipe of a multiprocessor to its shared memory, for each access and lost wavefront
