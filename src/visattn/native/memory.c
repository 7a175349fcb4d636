// Memory of the kernels: counted, as torch's allocator, which gives out all other memory, is.
#include "common.h"

#define HEAD 64  // bytes before what is given out: its size, and what keeps the rest aligned

#ifndef DOUBLE
PUBLIC const uint32_t visattn_sources = SOURCES;  // see hatch_build.py
#endif

static num held, peak;

real *allocate(num count) {
  num bytes = ceil_div((num)sizeof(real) * (count + 2 * LANES) + HEAD, 64) * 64;
  char *memory = aligned_alloc(64, bytes);
  if (memory == NULL) return NULL;
  *(num *)memory = bytes;
  num now = __atomic_add_fetch(&held, bytes, __ATOMIC_RELAXED), before = __atomic_load_n(&peak, __ATOMIC_RELAXED);
  while (now > before && !__atomic_compare_exchange_n(&peak, &before, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return (real *)(memory + HEAD);
}

void release(real *memory) {
  if (memory == NULL) return;
  char *start = (char *)memory - HEAD;
  __atomic_sub_fetch(&held, *(num *)start, __ATOMIC_RELAXED);
  free(start);
}

// The most bytes held at one time since the last call.
PUBLIC num NAME(memory_peak)(void) {
  return __atomic_exchange_n(&peak, __atomic_load_n(&held, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}
