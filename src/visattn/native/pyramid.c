// What pyramid squeeze attention does with the maps of its scales: means, from which come the weights, and the weighted
// maps one after the other, the last scale's first; and the gradients of both.
#include "common.h"

enum { PART = 2048 };  // numbers added up before sums go on in double

typedef struct {
  num scales, batch, channels, positions;  // channels of a scale
  const real *const *maps, *weights, *added, *gradient;
  real *means, *out, *d_weights, *d_map;
  num scale;  // of d_map
  num together;  // maps in a step
  loop steps;
} pyramid;

// The sum of a map, times another one if there is one.
static double sum_of(const real *x, const real *times, num count) {
  double total = 0;
  for (num start = 0; start < count; start += PART) {
    vec sums[4] = {{0}, {0}, {0}, {0}};
    num i = start, stop = min(start + PART, count);
    for (; i + 4 * LANES <= stop; i += 4 * LANES)
      UNROLL for (int u = 0; u < 4; u++) {
        vec y = load(x + i + u * LANES);
        sums[u] += times ? y * load(times + i + u * LANES) : y;
      }
    for (; i < stop; i += LANES) {
      vec y = load_some(x + i, stop - i);
      sums[0] += times ? y * load_some(times + i, stop - i) : y;
    }
    total += horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

static void scale_and_shift(real *to, const real *x, num count, real scale, real shift) {
  vec by = broadcast(scale), add = broadcast(shift);
  num i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, by * load(x + i) + add);
  if (i < count) store_some(to + i, by * load_some(x + i, count - i) + add, count - i);
}

static void map_steps(void *data) {
  pyramid *p = data;
  num maps = p->batch * p->scales * p->channels, size = p->positions;
  for (num i; (i = next_step(&p->steps)) < p->steps.count;)
    for (num j = i * p->together; j < min((i + 1) * p->together, maps); j++) {
      num c = j % p->channels, k = j / p->channels % p->scales, b = j / p->channels / p->scales;
      num map = (b * p->channels + c) * size, whole = ((b * p->scales + p->scales - 1 - k) * p->channels + c) * size;
      if (p->means) p->means[j] = (real)(sum_of(p->maps[k] + map, NULL, size) / (double)size);
      if (p->out) scale_and_shift(p->out + whole, p->maps[k] + map, size, p->weights[j], 0);
      if (p->d_weights) p->d_weights[j] = (real)sum_of(p->maps[k] + map, p->gradient + whole, size);
    }
}

static void scatter_steps(void *data) {
  pyramid *p = data;
  num maps = p->batch * p->channels, size = p->positions;
  for (num i; (i = next_step(&p->steps)) < p->steps.count;)
    for (num j = i * p->together; j < min((i + 1) * p->together, maps); j++) {
      num c = j % p->channels, b = j / p->channels, of_vector = (b * p->scales + p->scale) * p->channels + c;
      num whole = ((b * p->scales + p->scales - 1 - p->scale) * p->channels + c) * size;
      scale_and_shift(p->d_map + j * size, p->gradient + whole, size, p->weights[of_vector],
                      p->added[of_vector] / (real)size);
    }
}

static int run(pyramid *p, void (*body)(void *), num scales, num threads) {
  p->together = ceil_div(4 * PART, p->positions);
  p->steps.count = ceil_div(p->batch * scales * p->channels, p->together);
  GOMP_parallel(body, p, (unsigned)min(threads, p->steps.count), 0);
  return 0;
}

PUBLIC int NAME(pyramid_means)(num scales, num batch, num channels, num positions, const real *const *maps, real *means,
                               num threads) {
  return run(&(pyramid){scales, batch, channels, positions, .maps = maps, .means = means}, map_steps, scales,
             threads);
}

PUBLIC int NAME(pyramid_weigh)(num scales, num batch, num channels, num positions, const real *const *maps,
                               const real *weights, real *out, num threads) {
  return run(&(pyramid){scales, batch, channels, positions, .maps = maps, .weights = weights, .out = out}, map_steps,
             scales, threads);
}

PUBLIC int NAME(pyramid_gather)(num scales, num batch, num channels, num positions, const real *const *maps,
                                const real *gradient, real *d_weights, num threads) {
  return run(&(pyramid){scales, batch, channels, positions, .maps = maps, .gradient = gradient,
                        .d_weights = d_weights}, map_steps, scales, threads);
}

// The gradient of the maps of one scale; `added` is that of the means.
PUBLIC int NAME(pyramid_scatter)(num scales, num batch, num channels, num positions, num scale, const real *gradient,
                                 const real *weights, const real *added, real *d_map, num threads) {
  return run(&(pyramid){scales, batch, channels, positions, .gradient = gradient, .weights = weights, .added = added,
                        .d_map = d_map, .scale = scale}, scatter_steps, 1, threads);
}
