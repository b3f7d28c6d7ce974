// What a source needs to be compiled as host C++, as CUDA, and (KD_SIMT) as CUDA that runs on the CPU.
#pragma once

#if defined(__CUDACC__)
#define KD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KD_HD inline __attribute__((always_inline))
#else
#define KD_HD inline
#endif

// For host functions and, after the parameter list, lambdas. Not inlined: a loop that needs all registers.
#if defined(__GNUC__)
#define KD_INLINED __attribute__((always_inline))
#define KD_NOT_INLINED __attribute__((noinline))
#else
#define KD_INLINED
#define KD_NOT_INLINED
#endif

// The namespace and dispatch key under which device code is registered: the SIMT build stands beside the real one.
#if defined(KD_SIMT)
#define KD_CUDA_LIBRARY kdfast_simt
#define KD_CUDA_KEY CPU
#else
#define KD_CUDA_LIBRARY kdfast
#define KD_CUDA_KEY CUDA
#endif
