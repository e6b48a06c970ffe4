// Loops over rows of floats, compiled for each width of vectors; the loader takes the widest that the processor has.
#pragma once

// Named by what the processor can do. A name such as "arch=haswell" asks who made it: others would get the narrowest.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(HPCLOSS_ONE_TARGET)
#if __GNUC__ >= 12
#define HPCLOSS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HPCLOSS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define HPCLOSS_CLONES
#endif
#if defined(__GNUC__)
#define HPCLOSS_INLINE inline __attribute__((always_inline))
#else
#define HPCLOSS_INLINE inline
#endif
