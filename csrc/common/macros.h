// What a source needs to be compiled as host C++, as CUDA, and (KD_SIMT) as CUDA that runs on the CPU.
#pragma once

#if defined(__CUDACC__)
#define KD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KD_HD inline __attribute__((always_inline))
#else
#define KD_HD inline
#endif

// always_inline for host functions and lambdas (after the parameter list). Without it the callee is compiled for the
// baseline instruction set, not for that of the target_clones version which calls it.
#if defined(__GNUC__)
#define KD_INLINED __attribute__((always_inline))
#else
#define KD_INLINED
#endif

// One binary for all x86-64 machines: the loader picks the widest version that this CPU has.
// Needs ifunc, hence ELF. A sanitizer's interceptors are not up yet when ifuncs resolve, so a build may switch it off.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(KD_ONE_VERSION)
#define KD_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KD_MULTIVERSION
#endif

// The namespace and dispatch key under which device code is registered: the SIMT build stands beside the real one.
#if defined(KD_SIMT)
#define KD_CUDA_LIBRARY kdfast_simt
#define KD_CUDA_KEY CPU
#else
#define KD_CUDA_LIBRARY kdfast
#define KD_CUDA_KEY CUDA
#endif
