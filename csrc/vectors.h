// Loops over rows of floats, compiled for each width of vectors; the loader takes the widest that the processor has.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(HPCLOSS_ONE_TARGET)
#define HPCLOSS_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define HPCLOSS_CLONES
#endif
#if defined(__GNUC__)
#define HPCLOSS_INLINE inline __attribute__((always_inline))
#else
#define HPCLOSS_INLINE inline
#endif
