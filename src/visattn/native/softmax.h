// The exponentials of attention, some keys of a row at a time.
#pragma once

#include <math.h>

#include "common.h"

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE vec choose(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

// exp of some vectors of x <= 0 to about one unit in the last place; what float32 holds only denormalised is zero. NaN
// stays. Two go step by step together: one alone would wait for itself.
#ifdef DOUBLE
INLINE void exponentials(vec *x, int count) {
  for (int j = 0; j < count; j++)
    for (int i = 0; i < LANES; i++) x[j][i] = exp(x[j][i]);
}
#else
#define EACH UNROLL for (int j = 0; j < count; j++)
INLINE void exponentials(vec *x, int count) {
  vec p[2], power[2];
  ivec none[2];
  EACH none[j] = x[j] < broadcast(-87.3f);
  EACH power[j] = x[j] * broadcast(1.44269504f) + broadcast(12582912.f);  // whole powers of 2 are the last digits now
  EACH p[j] = power[j] - broadcast(12582912.f);
  EACH x[j] = x[j] - p[j] * broadcast(0.693147182f);  // in one step with the product: ln 2 is split for that
  EACH x[j] = x[j] + p[j] * broadcast(1.90465421e-9f);
  EACH p[j] = x[j] * broadcast(0.00139402284f) + broadcast(0.00836650189f);
  EACH p[j] = p[j] * x[j] + broadcast(0.0416663662f);
  EACH p[j] = p[j] * x[j] + broadcast(0.166665435f);
  EACH p[j] = p[j] * x[j] + broadcast(0.5f);
  EACH p[j] = p[j] * x[j] + broadcast(1.f);
  EACH p[j] = p[j] * x[j] + broadcast(1.f);
  EACH power[j] = (vec)(((ivec)power[j] << 23) + 0x3f800000);
  EACH x[j] = (vec)((ivec)(p[j] * power[j]) & ~none[j]);
}
#undef EACH
#endif

INLINE real exponential(real x) {
#ifdef DOUBLE
  return exp(x);
#else
  vec one = broadcast(x);
  exponentials(&one, 1);
  return one[0];
#endif
}

// Multiplicative weights and the mask of some keys of a row, NULL where there are none.
typedef struct {
  const real *weights;
  const uint8_t *mask;
  num weight_step, mask_step;
} adjustment;

// Scores are weighed.
static void weigh(real *row, num keys, const real *weights, num step) {
  num i = 0;
  if (step == 1)
    for (; i + LANES <= keys; i += LANES) store(row + i, load(row + i) * load(weights + i));
  for (; i < keys; i++) row[i] *= weights[i * step];
}

// Scores are masked; whether one is left.
static bool hide(real *row, num keys, const uint8_t *mask, num step) {
  num i = 0;
  ivec kept = (ivec){0};
  bool some = false;
  if (step == 1)
    for (; i + LANES <= keys; i += LANES) {
      ivec seen = __builtin_convertvector(*(const bytes *)(mask + i), ivec) == 0;
      kept |= seen;
      store(row + i, choose(seen, load(row + i), broadcast(-INFINITY)));
    }
  for (int j = 0; j < LANES; j++) some |= kept[j] != 0;
  for (; i < keys; i++) {
    some |= mask[i * step] == 0;
    if (mask[i * step]) row[i] = -INFINITY;
  }
  return some;
}

// The largest of some scores and of `least`. They end in a whole vector of -inf.
static real largest(real *row, num keys, real least) {
  num whole = ceil_div(keys, LANES) * LANES, i = 0;
  for (num j = keys; j < whole; j++) row[j] = -INFINITY;
  vec high[4] = {broadcast(least), broadcast(least), broadcast(least), broadcast(least)};
  for (; i + 4 * LANES <= whole; i += 4 * LANES)
    UNROLL for (int j = 0; j < 4; j++) high[j] = larger(load(row + i + j * LANES), high[j]);
  for (; i < whole; i += LANES) high[0] = larger(load(row + i), high[0]);
  vec most = larger(larger(high[0], high[1]), larger(high[2], high[3]));
  most = larger(most, SHUFFLE(most, most, 4, 5, 6, 7, 0, 1, 2, 3));
  most = larger(most, SHUFFLE(most, most, 2, 3, 0, 1, 6, 7, 4, 5));
  return most[0] > most[1] ? most[0] : most[1];
}

// Scores become share * exp(score - top); returns their sum. Without any score (`top` is -inf) all are zero.
static real raise(real *row, num keys, real top, real share) {
  num whole = ceil_div(keys, LANES) * LANES, i = 0;
  vec sum[2] = {broadcast(0), broadcast(0)}, shift = broadcast(top == -INFINITY ? 0 : top);
  for (; i + 2 * LANES <= whole; i += 2 * LANES) {
    vec x[2] = {load(row + i) - shift, load(row + i + LANES) - shift};
    exponentials(x, 2);
    UNROLL for (int j = 0; j < 2; j++) {
      x[j] *= share;
      store(row + i + j * LANES, x[j]);
      sum[j] += x[j];
    }
  }
  for (; i < whole; i += LANES) {
    vec x = load(row + i) - shift;
    exponentials(&x, 1);
    x *= share;
    store(row + i, x);
    sum[0] += x;
  }
  return horizontal_sum(sum[0] + sum[1]);
}

static void scale_by(real *row, num columns, real factor) {
  for (num i = 0; i < columns; i += LANES) store(row + i, load(row + i) * factor);
}

// sum of a * b
static real dot(const real *a, const real *b, num columns) {
  num whole = ceil_div(columns, LANES) * LANES, i = 0;
  vec sum[4] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
  for (; i + 4 * LANES <= whole; i += 4 * LANES)
    UNROLL for (int j = 0; j < 4; j++) sum[j] += load(a + i + j * LANES) * load(b + i + j * LANES);
  for (; i < whole; i += LANES) sum[0] += load(a + i) * load(b + i);
  return horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
