// What selective kernels do with the maps c[k] of their branches between convolution and sum, each map read twice
// forward and twice backward:
//
//   f[k] = relu(scale[k] c[k] + shift[k]), a batch norm and its activation, never written
//   descriptor = mean over positions of sum_k f[k]
//   out = sum_k a[k] f[k], a one number per sample, branch and channel.
//
// The gradient of f[k] is a[k] g + p, with g that of `out` and p, one number per sample and channel, that of the
// descriptor. So all others follow from four sums over each map, and a is needed only after they are known.
#include "convolution.h"

#include <math.h>

enum { PART = 2048, SUMS = 4 };  // numbers added up before sums go on in double; sums of a map

typedef struct selection selection;
typedef void step(const selection *, num);  // what is done to a map or a channel

struct selection {
  num branches, batch, channels, positions;
  const real *const *maps, *const *weights, *const *biases;
  const double *eps;
  real *of_norms;             // (5, branches, channels), see `of_norm`
  real *descriptor;           // (batch, channels)
  const real *attention;      // (batch, branches, channels)
  const real *gradient;       // of `out`
  real *out, *sums;           // (batch, branches, channels, SUMS)
  real *d_attention;          // (batch, branches, channels)
  const real *d_descriptor;   // (batch, channels)
  real *d_weights, *d_biases;  // (branches, channels)
  real *of_channels, *of_maps;  // see `normed`
  real *const *d_maps;
  step *each;
  num count, together;  // how many maps or channels there are, and how many a thread takes at one time
  loop steps;
};

// Of each channel of a branch: the last two are what a map is multiplied with and what is added.
enum { MEAN, VARIANCE, INVERSE, SCALE, SHIFT };

INLINE real *of_norm(const selection *s, num kind, num branch, num channel) {
  return s->of_norms + (kind * s->branches + branch) * s->channels + channel;
}

// The last vector of a map, which overlaps the one before it, and the lanes of it that are new.
typedef struct {
  num size, whole;  // of a map; of that what full vectors hold
  ivec fresh;
} ends;

INLINE ends ends_of(num size) {
  ends e = {size, size / LANES * LANES, {0, 1, 2, 3, 4, 5, 6, 7}};
  lane rest = (lane)(size % LANES);
  e.fresh = size < LANES ? e.fresh < rest : e.fresh >= LANES - rest;
  return e;
}

INLINE vec load_last(const real *x, const ends *e) {
  return e->size < LANES ? load_some(x, e->size) : load(x + e->size - LANES);
}

INLINE void store_last(real *to, vec x, const ends *e) {
  if (e->size < LANES) store_some(to, x, e->size);
  else store(to + e->size - LANES, x);
}

// What four vectors of sums add up to; they are zero then.
INLINE double taken(vec *sums) {
  double total = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  UNROLL for (int u = 0; u < 4; u++) sums[u] = broadcast(0);
  return total;
}

// The sum over a channel of `change` of each vector x, in parts of at least PART numbers.
#define SUM_OF_CHANNEL(change)                                                               \
  ends e = ends_of(s->positions);                                                            \
  vec sums[4] = {{0}, {0}, {0}, {0}}, x;                                                     \
  double total = 0;                                                                          \
  for (num b = 0, since = 0; b < s->batch; b++) {                                            \
    const real *from = map + b * s->channels * e.size;                                       \
    num i = 0;                                                                               \
    while (i < e.whole) {                                                                    \
      num stop = min(e.whole, i + PART), start = i;                                          \
      for (; i + 4 * LANES <= stop; i += 4 * LANES)                                          \
        UNROLL for (int u = 0; u < 4; u++) x = load(from + i + u * LANES), sums[u] += change; \
      for (; i < stop; i += LANES) x = load(from + i), sums[0] += change;                    \
      since += i - start;                                                                    \
      if (since >= PART) total += taken(sums), since = 0;                                    \
    }                                                                                        \
    if (e.whole == e.size) continue;                                                         \
    x = load_last(from, &e), sums[1] += (vec)((ivec)(change) & e.fresh), since += LANES;     \
    if (since >= PART) total += taken(sums), since = 0;                                      \
  }                                                                                          \
  return total + taken(sums);

static double sum_of(const selection *s, const real *map) { SUM_OF_CHANNEL(x) }

static double squares_of(const selection *s, const real *map, real mean) {
  vec middle = broadcast(mean);
  SUM_OF_CHANNEL((x - middle) * (x - middle))
}

// Of one map: its mean after the relu is what the descriptor has of it.
static double relu_sum(const real *x, const ends *e, vec scale, vec shift) {
  double total = 0;
  for (num start = 0; start < e->whole; start += PART) {
    vec sums[2] = {{0}, {0}};
    num i = start, stop = min(e->whole, start + PART);
    for (; i + 2 * LANES <= stop; i += 2 * LANES)
      UNROLL for (int u = 0; u < 2; u++) sums[u] += positive(scale * load(x + i + u * LANES) + shift);
    if (i < stop) sums[0] += positive(scale * load(x + i) + shift);
    total += horizontal_sum(sums[0] + sums[1]);
  }
  if (e->whole < e->size)
    total += horizontal_sum((vec)((ivec)positive(scale * load_last(x, e) + shift) & e->fresh));
  return total;
}

// One channel of all branches and samples, which the cache holds from one pass over it to the next: first the mean,
// then the squared distances from it, without a difference of large numbers.
static void normalise_channel(const selection *s, num channel) {
  num size = s->positions;
  double count = (double)s->batch * (double)size;
  ends e = ends_of(size);
  for (num k = 0; k < s->branches; k++) {
    const real *map = s->maps[k] + channel * size;
    double mean = sum_of(s, map) / count, squares = squares_of(s, map, (real)mean);
    double apart = mean - (real)mean;  // what the mean lost as a number of the maps' type
    squares -= apart * apart * count;
    double inverse = 1 / sqrt(squares / count + s->eps[k]);
    double scale = (real)(s->weights[k][channel] * inverse);  // what maps are multiplied with: the shift is of that
    double shift = s->biases[k][channel] - mean * scale;
    *of_norm(s, MEAN, k, channel) = (real)mean;
    *of_norm(s, VARIANCE, k, channel) = (real)(squares / (count - 1));
    *of_norm(s, INVERSE, k, channel) = (real)inverse;
    *of_norm(s, SCALE, k, channel) = (real)scale;
    *of_norm(s, SHIFT, k, channel) = (real)shift;
    vec scales = broadcast((real)scale), shifts = broadcast((real)shift);
    for (num b = 0; b < s->batch; b++) {
      real *to = s->descriptor + b * s->channels + channel;
      *to = (real)((k ? *to : 0) + relu_sum(map + b * s->channels * size, &e, scales, shifts) / (double)size);
    }
  }
}

// One map of the output.
INLINE void combine_of(const int branches, const bool normed, const selection *s, num map) {
  num channel = map % s->channels, sample = map / s->channels, size = s->positions;
  vec by[BRANCHES], scale[BRANCHES], shift[BRANCHES];
  const real *from[BRANCHES];
  UNROLL for (int k = 0; k < branches; k++) {
    by[k] = broadcast(s->attention[(sample * s->branches + k) * s->channels + channel]);
    scale[k] = broadcast(normed ? *of_norm(s, SCALE, k, channel) : 1);
    shift[k] = broadcast(normed ? *of_norm(s, SHIFT, k, channel) : 0);
    from[k] = s->maps[k] + map * size;
  }
  real *out = s->out + map * size;
  ends e = ends_of(size);
#define SUM(load_from)                                                    \
  vec sum = broadcast(0);                                                 \
  UNROLL for (int k = 0; k < branches; k++) {                             \
    vec x = load_from;                                                    \
    sum += by[k] * (normed ? positive(scale[k] * x + shift[k]) : x);      \
  }
  for (num i = 0; i < e.whole; i += LANES) {
    SUM(load(from[k] + i))
    store(out + i, sum);
  }
  if (e.whole < size) {
    SUM(load_last(from[k], &e))
    store_last(out, sum, &e);
  }
#undef SUM
}

static void combine_map(const selection *s, num map) {
#define CASE(branches)                                         \
  case branches: combine_of(branches, false, s, map); break;   \
  case branches + BRANCHES: combine_of(branches, true, s, map); break;
  switch (s->branches + (s->of_norms ? BRANCHES : 0)) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
}

// Over a map of one branch: the gradient of a, and for the positions that the relu lets through how many they are, and
// the sums of x, g and x g, with x what the norm makes of the map before weight and bias.
static void gather_branch(const selection *s, num branch, num map, const ends *e) {
  num channel = map % s->channels, sample = map / s->channels, size = s->positions;
  const real *from = s->maps[branch] + map * size, *gradient = s->gradient + map * size;
  vec scale = broadcast(*of_norm(s, SCALE, branch, channel)), shift = broadcast(*of_norm(s, SHIFT, branch, channel));
  vec mean = broadcast(*of_norm(s, MEAN, branch, channel)), one = broadcast(1);
  double totals[SUMS + 1] = {0};
#define ADD(load_from, kept)                                       \
  vec c = load_from(from), g = load_from(gradient);                \
  vec normed = scale * c + shift;                                  \
  ivec through = kept & ~(normed <= broadcast(0)); /* NaN too */   \
  vec x = (vec)((ivec)(c - mean) & through);                       \
  sums[SUMS] += (vec)((ivec)(g * positive(normed)) & kept);        \
  g = (vec)((ivec)g & through);                                    \
  sums[0] += (vec)((ivec)one & through);                           \
  sums[1] += x;                                                    \
  sums[2] += g;                                                    \
  sums[3] += x * g;
#define LOAD(p) load(p + i)
#define LAST(p) load_last(p, e)
  ivec all = ~(ivec){0};
  for (num start = 0; start < size; start += PART) {
    vec sums[SUMS + 1] = {{0}, {0}, {0}, {0}, {0}};
    for (num i = start; i < min(e->whole, start + PART); i += LANES) {
      ADD(LOAD, all)
    }
    if (e->whole < size && size - start <= PART) {
      ADD(LAST, e->fresh)
    }
    for (int j = 0; j <= SUMS; j++) totals[j] += horizontal_sum(sums[j]);
  }
#undef ADD
#undef LOAD
#undef LAST
  double inverse = *of_norm(s, INVERSE, branch, channel);
  totals[1] *= inverse, totals[3] *= inverse;
  num at = (sample * s->branches + branch) * s->channels + channel;
  for (int j = 0; j < SUMS; j++) s->sums[at * SUMS + j] = (real)totals[j];
  s->d_attention[at] = (real)totals[SUMS];
}

static void gather_map(const selection *s, num map) {
  ends e = ends_of(s->positions);
  for (num k = 0; k < s->branches; k++) gather_branch(s, k, map, &e);
}

// What the gradient of one channel of a branch is made of, see `normed`. That of batch norm's input is the gradient of
// its output with the mean and the part along x taken away, times the scale.
static void factors_of_branch(const selection *s, num branch, num channel) {
  double d_weight = 0, d_bias = 0, count = (double)s->batch * (double)s->positions;
  double by = *of_norm(s, SCALE, branch, channel);
  for (num b = 0; b < s->batch; b++) {
    num at = (b * s->branches + branch) * s->channels + channel, map = b * s->channels + channel;
    const real *sums = s->sums + at * SUMS;
    double a = s->attention[at], p = s->d_descriptor[map] / (double)s->positions;
    real *to = s->of_maps + (branch * s->batch * s->channels + map) * 2;
    to[0] = (real)(by * a), to[1] = (real)(by * p);
    if (sums[0] == 0) continue;  // numbers that are none do not come through either
    d_bias += a * sums[2] + p * sums[0];
    d_weight += a * sums[3] + p * sums[1];
  }
  s->d_weights[branch * s->channels + channel] = (real)d_weight;
  s->d_biases[branch * s->channels + channel] = (real)d_bias;
  real *to = s->of_channels + (branch * s->channels + channel) * 5;
  to[0] = (real)by, to[1] = *of_norm(s, SHIFT, branch, channel), to[2] = *of_norm(s, MEAN, branch, channel);
  to[3] = (real)(by * d_bias / count);
  to[4] = (real)(by * *of_norm(s, INVERSE, branch, channel) * d_weight / count);
}

static void factors_of_channel(const selection *s, num channel) {
  for (num k = 0; k < s->branches; k++) factors_of_branch(s, k, channel);
}

static void scatter_map(const selection *s, num map) {
  num maps = s->batch * s->channels, size = s->positions;
  normed of = {s->maps, s->gradient, s->of_channels, s->of_maps};
  for (num k = 0; k < s->branches; k++)
    normed_gradient(&of, k, s->channels, maps, map, size, 0, size, s->d_maps[k] + map * size);
}

static void steps(void *data) {
  selection *s = data;
  for (num i; (i = next_step(&s->steps)) < s->steps.count;)
    for (num j = i * s->together; j < min((i + 1) * s->together, s->count); j++) s->each(s, j);
}

static int run(selection *s, step *each, num count, num together, num threads) {
  s->each = each, s->count = count, s->together = together;
  s->steps = (loop){.count = ceil_div(count, together)};
  GOMP_parallel(steps, s, (unsigned)min(threads, s->steps.count), 0);
  return 0;
}

// Threads stay away from each other's lines, but have enough steps to share.
static int by_channel(selection *s, step *each, num threads) {
  num together = min(ceil_div(PART, s->positions), max(1, s->channels / (4 * threads)));
  return run(s, each, s->channels, together, threads);
}

static int by_map(selection *s, step *each, num threads) {
  return run(s, each, s->batch * s->channels, ceil_div(4 * PART, s->positions), threads);
}

// What the norms of all branches do, from the statistics of these maps, and the mean of what the relus let through.
PUBLIC int NAME(select_normalise)(num branches, num batch, num channels, num positions, const real *const *maps,
                                  const real *const *weights, const real *const *biases, const double *eps,
                                  real *of_norms, real *descriptor, num threads) {
  selection s = {branches, batch, channels, positions, .maps = maps, .weights = weights, .biases = biases, .eps = eps,
                 .of_norms = of_norms, .descriptor = descriptor};
  return by_channel(&s, normalise_channel, threads);
}

// out = sum of a f, or of a c where there are no numbers of norms.
PUBLIC int NAME(select_combine)(num branches, num batch, num channels, num positions, const real *const *maps,
                                real *of_norms, const real *attention, real *out, num threads) {
  selection s = {branches, batch, channels, positions, .maps = maps, .of_norms = of_norms, .attention = attention,
                 .out = out};
  return by_map(&s, combine_map, threads);
}

// The gradient of a, and the sums that the other gradients follow from.
PUBLIC int NAME(select_gather)(num branches, num batch, num channels, num positions, const real *const *maps,
                               real *of_norms, const real *gradient, real *d_attention, real *sums, num threads) {
  selection s = {branches, batch, channels, positions, .maps = maps, .of_norms = of_norms, .gradient = gradient,
                 .d_attention = d_attention, .sums = sums};
  return by_map(&s, gather_map, threads);
}

// The gradients of the norms' weights and biases, and the factors that those of the maps are made with.
PUBLIC int NAME(select_factors)(num branches, num batch, num channels, num positions, real *of_norms,
                                const real *attention, real *sums, const real *d_descriptor, real *d_weights,
                                real *d_biases, real *of_channels, real *of_maps, num threads) {
  selection s = {branches, batch, channels, positions, .of_norms = of_norms, .attention = attention, .sums = sums,
                 .d_descriptor = d_descriptor, .d_weights = d_weights, .d_biases = d_biases,
                 .of_channels = of_channels, .of_maps = of_maps};
  return by_channel(&s, factors_of_channel, threads);
}

// The gradients of the maps.
PUBLIC int NAME(select_scatter)(num branches, num batch, num channels, num positions, const real *const *maps,
                                const real *gradient, real *of_channels, real *of_maps, real *const *d_maps,
                                num threads) {
  selection s = {branches, batch, channels, positions, .maps = maps, .gradient = gradient,
                 .of_channels = of_channels, .of_maps = of_maps, .d_maps = d_maps};
  return by_map(&s, scatter_map, threads);
}
