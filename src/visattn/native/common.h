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

// Each file is compiled once for either type: float is what is fast, double what is proven to 10 digits and more.
#ifdef DOUBLE
typedef double real;
typedef int64_t lane;
#define NAME(x) x##_float64
#else
typedef float real;
typedef int32_t lane;
#define NAME(x) x##_float32
#endif

typedef ptrdiff_t num;
typedef real vec __attribute__((vector_size(sizeof(real) * LANES)));
typedef lane ivec __attribute__((vector_size(sizeof(real) * LANES)));
typedef real any_vec __attribute__((vector_size(sizeof(real) * LANES), aligned(sizeof(real)), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

// A vector that is to stay in a register: compilers would rather read it again at each use.
#if defined(__AVX2__) && !defined(DOUBLE)
#define KEEP(x) __asm__("" : "+x"(x))
#else
#define KEEP(x) (void)(x)
#endif

INLINE vec load(const real *from) { return *(const any_vec *)from; }
INLINE void store(real *to, vec x) { *(any_vec *)to = x; }
INLINE vec broadcast(real x) { return (vec){x, x, x, x, x, x, x, x}; }
// The first so many numbers of a vector, all of them from LANES on; the rest is zero, or is not written.
INLINE vec load_some(const real *from, num count) {
  if (count >= LANES) return load(from);
  vec x = broadcast(0);
  if (count > 0) memcpy(&x, from, sizeof(real) * (count % LANES));
  return x;
}

INLINE void store_some(real *to, vec x, num count) {
  if (count >= LANES) store(to, x);
  else if (count > 0) memcpy(to, &x, sizeof(real) * (count % LANES));
}
INLINE vec positive(vec x) { return (vec)((ivec)x & ~(x < broadcast(0))); }  // NaN stays
INLINE real horizontal_sum(vec x) {
  x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  return x[0] + x[1];
}
// 8 vectors as the rows of a matrix.
INLINE void transpose(vec *r) {
  vec a[8], b[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    a[i] = SHUFFLE(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    a[i + 1] = SHUFFLE(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  UNROLL for (int i = 0; i < 8; i += 4)
    UNROLL for (int j = i; j < i + 2; j++) {
      b[j] = SHUFFLE(a[j], a[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[j + 2] = SHUFFLE(a[j], a[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  UNROLL for (int i = 0; i < 4; i++) {
    r[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

INLINE num min(num a, num b) { return a < b ? a : b; }
INLINE num max(num a, num b) { return a > b ? a : b; }
INLINE num ceil_div(num whole, num parts) { return (whole + parts - 1) / parts; }

// Memory for so many numbers, aligned, with a little more behind; NULL where there is none. See memory.c.
#define allocate NAME(allocate)
#define release NAME(release)
real *allocate(num count);
void release(real *memory);

// OpenMP's runtime is the one that torch brings: its threads are warm, and torch.set_num_threads rules them. It is
// called by name, so that any compiler will do and none links a second runtime.
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);

// A loop that threads share: each takes the next of `count` steps until none is left.
typedef struct {
  num count, next;
  bool failed;  // some thread had no memory
} loop;

INLINE num next_step(loop *steps) { return __atomic_fetch_add(&steps->next, 1, __ATOMIC_RELAXED); }
