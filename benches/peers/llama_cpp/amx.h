// For native builds by GCC 12 and before on CPUs with AMX: their `_tile_loadconfig` tells the compiler of the first eight bytes of the
// configuration only, so that the others are written after it is loaded, and llama.cpp dies of a general protection fault.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config)                            \
    do {                                                    \
        const void *whole = (config);                       \
        __asm__ volatile("" : : "r"(whole) : "memory");     \
        __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])whole)); \
    } while (0)
#endif
