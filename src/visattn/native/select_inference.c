// A whole selective kernel in inference, some samples at a time: their maps are still in the cache when they are added
// up.
#include "convolution.h"

#include <math.h>

#define AT_ONCE 2097152  // numbers of the branches' maps that are at hand at one time
#define ROWS 16          // of a matrix that a thread takes at one time
#define SAMPLES 4        // whose products with a row are computed together

// Of select.c.
int NAME(select_combine)(num branches, num batch, num channels, num positions, const real *const *maps, real *numbers,
                         const real *attention, real *out, num threads);

// What a batch norm does behind a layer with a bias, all of which may be missing.
typedef struct {
  const real *before, *weight, *bias, *mean, *variance;
  double eps;
} norm;

typedef struct {
  num branches, channels, positions, hidden, samples;
  norm between;
  bool relu;
  const real *weight, *const *weights, *const *biases;
  real *const *sums;                    // of the branches' maps, (samples, channels)
  real *descriptor, *vector, *attention;  // (samples, channels), (samples, hidden), (samples, branches, channels)
  loop steps;
} gate;

INLINE void scale_and_shift(const norm *n, num i, real *scale, real *shift) {
  double before = n->before ? n->before[i] : 0, by = 1, add = before;
  if (n->variance) {
    by = (real)((n->weight ? n->weight[i] : 1) / sqrt(n->variance[i] + n->eps));  // what is multiplied with in the end
    add = (before - n->mean[i]) * by + (n->bias ? n->bias[i] : 0);
  }
  *scale = (real)by, *shift = (real)add;
}

// The products of a row with some vectors that lie one after the other.
INLINE void dots(const real *row, const real *x, num count, num vectors, real *out) {
  vec sums[SAMPLES];
  const real *from[SAMPLES];
  UNROLL for (int s = 0; s < SAMPLES; s++) sums[s] = broadcast(0), from[s] = x + min(s, vectors - 1) * count;
  num i = 0;
  for (; i + LANES <= count; i += LANES) {
    vec here = load(row + i);
    UNROLL for (int s = 0; s < SAMPLES; s++) sums[s] += here * load(from[s] + i);
  }
  if (i < count) {
    vec here = load_some(row + i, count - i);
    UNROLL for (int s = 0; s < SAMPLES; s++) sums[s] += here * load_some(from[s] + i, count - i);
  }
  for (num s = 0; s < vectors; s++) out[s] = horizontal_sum(sums[s]);
}

static void hidden_steps(void *data) {
  gate *g = data;
  for (num i; (i = next_step(&g->steps)) < g->steps.count;)
    for (num j = i * ROWS; j < min((i + 1) * ROWS, g->hidden); j++) {
      real scale, shift, y[SAMPLES];
      scale_and_shift(&g->between, j, &scale, &shift);
      for (num first = 0; first < g->samples; first += SAMPLES) {
        num some = min(SAMPLES, g->samples - first);
        dots(g->weight + j * g->channels, g->descriptor + first * g->channels, g->channels, some, y);
        for (num s = 0; s < some; s++) {
          real x = scale * y[s] + shift;
          g->vector[(first + s) * g->hidden + j] = g->relu && x < 0 ? 0 : x;
        }
      }
    }
}

static void attention_steps(void *data) {
  gate *g = data;
  for (num i; (i = next_step(&g->steps)) < g->steps.count;)
    for (num c = i * ROWS; c < min((i + 1) * ROWS, g->channels); c++)
      for (num first = 0; first < g->samples; first += SAMPLES) {
        num some = min(SAMPLES, g->samples - first);
        real logits[BRANCHES][SAMPLES];
        for (num k = 0; k < g->branches; k++)
          dots(g->weights[k] + c * g->hidden, g->vector + first * g->hidden, g->hidden, some, logits[k]);
        for (num s = 0; s < some; s++) {
          real top = -INFINITY, sum = 0, *to = g->attention + (first + s) * g->branches * g->channels + c;
          for (num k = 0; k < g->branches; k++) {
            logits[k][s] += g->biases[k] ? g->biases[k][c] : 0;
            if (!(logits[k][s] <= top)) top = logits[k][s];  // NaN too
          }
          for (num k = 0; k < g->branches; k++) {
#ifdef DOUBLE
            to[k * g->channels] = exp(logits[k][s] - top);
#else
            to[k * g->channels] = expf(logits[k][s] - top);
#endif
            sum += to[k * g->channels];
          }
          for (num k = 0; k < g->branches; k++) to[k * g->channels] /= sum;
        }
      }
}

// From the sums of the branches' maps to their weights.
static void attend(gate *g, num threads) {
  for (num i = 0; i < g->samples * g->channels; i++) {
    real sum = 0;
    for (num k = 0; k < g->branches; k++) sum += g->sums[k][i];
    g->descriptor[i] = sum / (real)g->positions;
  }
  g->steps = (loop){.count = ceil_div(g->hidden, ROWS)};
  GOMP_parallel(hidden_steps, g, (unsigned)min(threads, g->steps.count), 0);
  g->steps = (loop){.count = ceil_div(g->channels, ROWS)};
  GOMP_parallel(attention_steps, g, (unsigned)min(threads, g->steps.count), 0);
}

// `norms` has five vectors for each branch and for the hidden vector: the bias of the layer before, then weight, bias,
// mean and variance of the norm. Without a variance there is no norm.
PUBLIC int NAME(select_infer)(num branches, const sizes *s, const real *x, const real *const *weights,
                              const real *const *norms, const double *eps, num hidden, num relu, const real *fc_weight,
                              const real *const *fc_weights, const real *const *fc_biases, real *out, num threads) {
  num channels = s->groups * s->out, positions = s->out_height * s->out_width, map = channels * positions;
  num together = min(s->batch, max(1, AT_ONCE / (branches * map)));
  num vectors = branches * together * channels;
  const real *scales[BRANCHES], *shifts[BRANCHES], *of_hidden[5];
  real *maps[BRANCHES], *sums[BRANCHES];
  real *memory = allocate(branches * together * map);
  real *small = allocate(2 * branches * channels + 2 * vectors + together * (channels + hidden));
  convolution w = {.branches = branches, .sizes = s, .x = &x, .weights = weights, .scales = scales, .shifts = shifts,
                   .relu = true, .y = maps, .sums = sums};
  bool done = memory != NULL && small != NULL && NAME(open_convolution)(&w, together, threads);
  if (done) {
    real *next = small;
    for (num k = 0; k < branches; k++) {
      norm n = {norms[5 * k], norms[5 * k + 1], norms[5 * k + 2], norms[5 * k + 3], norms[5 * k + 4], eps[k]};
      real *scale = next, *shift = next + channels;
      for (num c = 0; c < channels; c++) scale_and_shift(&n, c, scale + c, shift + c);
      scales[k] = scale, shifts[k] = shift, sums[k] = shift + channels;
      maps[k] = memory + k * together * map;
      next = sums[k] + together * channels;
    }
    memcpy(of_hidden, norms + 5 * branches, sizeof of_hidden);
    gate g = {branches, channels, positions, hidden, .relu = relu, .weight = fc_weight, .weights = fc_weights,
              .between = {of_hidden[0], of_hidden[1], of_hidden[2], of_hidden[3], of_hidden[4], eps[branches]},
              .biases = fc_biases, .sums = sums, .descriptor = next, .vector = next + together * channels,
              .attention = next + together * (channels + hidden)};
    for (num first = 0; done && first < s->batch; first += together) {
      g.samples = min(together, s->batch - first);
      done = NAME(convolve_samples)(&w, first, g.samples, threads);
      if (!done) break;
      attend(&g, threads);
      NAME(select_combine)(branches, g.samples, channels, positions, (const real *const *)maps, NULL, g.attention,
                           out + first * map, threads);
    }
  }
  NAME(close_convolution)(&w);
  release(memory);
  release(small);
  return !done;
}
