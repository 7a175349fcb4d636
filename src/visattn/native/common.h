// What every kernel uses: eight numbers at a time, and the threads that torch has already started.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define INLINE static inline __attribute__((always_inline))
#define PUBLIC __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 16")

typedef ptrdiff_t num;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float any_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE vec load(const float *from) { return *(const any_vec *)from; }
INLINE void store(float *to, vec x) { *(any_vec *)to = x; }
INLINE vec all(float x) { return (vec){x, x, x, x, x, x, x, x}; }
INLINE num least(num a, num b) { return a < b ? a : b; }
INLINE num most(num a, num b) { return a > b ? a : b; }
INLINE num share(num whole, num parts) { return (whole + parts - 1) / parts; }

// Memory for so many numbers, aligned; NULL where there is none.
INLINE float *numbers(num count) { return aligned_alloc(64, (size_t)share(4 * count + 64, 64) * 64); }

// OpenMP's runtime is the one that torch brings: its threads are warm, and torch.set_num_threads rules them. It is
// called by name, so that any compiler will do and none links a second runtime.
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);

// A loop that threads share: each takes the next of `count` steps until none is left.
typedef struct {
  num count, next;
  bool failed;  // some thread had no memory
} loop;

INLINE num take(loop *steps) { return __atomic_fetch_add(&steps->next, 1, __ATOMIC_RELAXED); }
