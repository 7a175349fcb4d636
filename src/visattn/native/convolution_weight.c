// The gradient of the weight of a convolution: sums over positions of products of gradients and inputs, T taps of a row
// of the kernel at a time. Groups of 8 output channels are read position by position, others row by row.
#include "convolution.h"

#define POSITIONS 4096  // in the buffers at one time, and of a sum before the next is begun; a lane has fewer
#define AT_ONCE 128     // positions that a sum in registers runs over

typedef struct {
  num branches;
  const sizes *sizes;  // of each branch
  sizes s;             // of one: what is the same for all
  const real *x, *const *gradient;
  const normed *normed;  // what to make the gradients of, or NULL
  real *const *d_weight;
  tap *taps;  // of all branches
  layout l;
  num block;               // output channels read together
  num samples, band, row;  // in the buffers at one time; and how long a row of gradients is there
  num parts;               // of the input channels, which threads share
  ivec inside;             // which numbers of the last vector of a row are in the row
  uint32_t *x_at;          // where positions are in the buffer, if they are read one by one
  loop steps;
} gradients;

typedef struct {
  const real *g, *x;
  num g_map, g_sample, x_map;  // how far apart channels and samples are
  const tap *taps;
  num samples, from, to;  // rows
  real *out;
  num out_channel, in_channel;
} tap_product;

// Where the input of tap t is, from that of the first: `step` apart, or as the taps say.
#define BESIDE(t) (step ? (t) * step : p->taps[t].at - p->taps[0].at)

// O output channels and T taps of one input channel: what a vector of positions adds.
INLINE void add_vector(const int O, const int T, vec *total, const real *g, num g_map, const real *x, const num *at,
                       const ivec *inside) {
  vec here[WIDEST];
  UNROLL for (int t = 0; t < T; t++) {
    here[t] = load(x + at[t]);
    if (inside) here[t] = (vec)((ivec)here[t] & *inside);
    if (O > 1) KEEP(here[t]);
  }
  UNROLL for (int o = 0; o < O; o++) {
    vec by = load(g + o * g_map);
    UNROLL for (int t = 0; t < T; t++) total[o * T + t] += by * here[t];
  }
}

INLINE void rows_times(const int O, const int T, const int step, const gradients *w, const tap_product *p) {
  vec total[WIDEST];
  num at[WIDEST], whole = w->s.out_width - w->s.out_width % LANES;
  UNROLL for (int i = 0; i < O * T; i++) total[i] = broadcast(0);
  UNROLL for (int t = 0; t < T; t++) at[t] = BESIDE(t);
  for (num b = 0; b < p->samples; b++)
    for (num q = p->from; q < p->to; q++) {
      const real *x = p->x + b * w->l.channel + q * w->l.row + p->taps[0].at, *g = p->g + b * p->g_sample + q * w->row;
      for (num v = 0; v < whole; v += LANES) add_vector(O, T, total, g + v, p->g_map, x + v, at, NULL);
      if (whole < w->row)  // no infinity from behind the row may meet the zeros there
        add_vector(O, T, total, g + whole, p->g_map, x + whole, at, &w->inside);
    }
  UNROLL for (int o = 0; o < O; o++)
    UNROLL for (int t = 0; t < T; t++)
      p->out[o * p->out_channel + p->taps[t].weight] += horizontal_sum(total[o * T + t]);
}

// L vectors of output channels, C input channels and T taps. Sums of sums: a single one would lose digits.
INLINE void lanes_times(const int L, const int C, const int T, const int step, const gradients *w,
                        const tap_product *p) {
  vec total[WIDEST], part[WIDEST];
  num at[WIDEST], summed = 0;
  UNROLL for (int k = 0; k < L * C * T; k++) total[k] = part[k] = broadcast(0);
  UNROLL for (int t = 0; t < T; t++) at[t] = BESIDE(t);
  for (num b = 0; b < p->samples; b++) {
    const real *x[C], *g = p->g + b * p->g_sample + p->from * w->row * L * LANES;
    UNROLL for (int c = 0; c < C; c++) {
      x[c] = p->x + c * p->x_map + b * w->l.channel + p->taps[0].at;
      __asm__("" : "+r"(x[c]));  // a register each: compilers would find each from the one before, at each position
    }
    for (num i = p->from * w->row, end = p->to * w->row, stop; i < end; i = stop) {
      if (summed >= AT_ONCE) {
        UNROLL for (int k = 0; k < L * C * T; k++) total[k] += part[k], part[k] = broadcast(0);
        summed = 0;
      }
      stop = min(i + AT_ONCE, end);
      summed += stop - i;
      for (; i < stop; i++, g += L * LANES) {
        num here_at = w->x_at[i];
        vec by[2];
        UNROLL for (int l = 0; l < L; l++) by[l] = load(g + l * LANES);
        UNROLL for (int c = 0; c < C; c++)
          UNROLL for (int t = 0; t < T; t++) {
            vec here = broadcast(x[c][here_at + at[t]]);
            UNROLL for (int l = 0; l < L; l++) part[(c * T + t) * L + l] += by[l] * here;
          }
      }
    }
  }
  UNROLL for (int k = 0; k < L * C * T; k++) total[k] += part[k];
  for (int o = 0; o < LANES; o++)
    UNROLL for (int c = 0; c < C; c++)
      UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int l = 0; l < L; l++)
          p->out[(l * LANES + o) * p->out_channel + c * p->in_channel + p->taps[t].weight] +=
              total[(c * T + t) * L + l][o];
}

// `channels` of the output read row by row, or of the input where those of the output lie side by side.
INLINE void products_at(const int step, num channels, num count, const gradients *w, const tap_product *p) {
#define ROWS(n, t) \
  case n * 16 + t: rows_times(n, t, step, w, p); break;
#define SIDE(l, n, t) \
  case (l * 16 + n) * 16 + t: lanes_times(l, n, t, step, w, p); break;
  num lanes = w->block / LANES;
  switch ((lanes * 16 + channels) * 16 + count) {
    ROWS(1, 1) ROWS(1, 2) ROWS(1, 3) ROWS(1, 4) ROWS(1, 5) ROWS(1, 6) ROWS(1, 7) ROWS(1, 8) ROWS(1, 9)
    ROWS(2, 1) ROWS(2, 2) ROWS(2, 3) ROWS(2, 4) ROWS(2, 5)
    ROWS(4, 1) ROWS(4, 2) ROWS(4, 3)
    SIDE(1, 1, 1) SIDE(1, 1, 2) SIDE(1, 1, 3) SIDE(1, 1, 4) SIDE(1, 1, 5) SIDE(1, 1, 6) SIDE(1, 1, 7) SIDE(1, 1, 8)
    SIDE(1, 1, 9) SIDE(1, 2, 1) SIDE(1, 2, 2) SIDE(1, 2, 3) SIDE(1, 2, 4) SIDE(1, 2, 5)
    SIDE(1, 4, 1) SIDE(1, 4, 2) SIDE(1, 4, 3)
    SIDE(2, 1, 1) SIDE(2, 1, 2) SIDE(2, 1, 3) SIDE(2, 1, 4) SIDE(2, 1, 5) SIDE(2, 2, 1) SIDE(2, 2, 2) SIDE(2, 2, 3)
  }
#undef ROWS
#undef SIDE
}

static void products(num channels, num count, const gradients *w, const tap_product *p) {
  num step = count > 1 ? p->taps[1].at - p->taps[0].at : 1;
  for (num t = 2; t < count; t++)
    if (p->taps[t].at - p->taps[0].at != t * step) step = 0;
  switch (step) {
    case 1: products_at(1, channels, count, w, p); break;
    case 2: products_at(2, channels, count, w, p); break;
    default: products_at(0, channels, count, w, p);
  }
}

// Rows of gradients of one sample; 8 channels side by side where they are read so.
static void fill_gradients(const gradients *w, num branch, real *gs, real *scratch, num sample, num group, num n,
                           num first, num rows) {
  const sizes *s = &w->s;
  num channels = s->groups * s->out, map = s->out_height * s->out_width, start = first * s->out_width;
  num block = w->block, together = block < LANES ? 1 : LANES, g_map = w->samples * w->band * w->row;
  for (num o = 0; o < s->out; o += together) {
    num at = sample * channels + group * s->out + o;
    const real *from = w->gradient[branch] + at * map;
    for (num c = 0; w->normed && c < together; c++)
      normed_gradient(w->normed, branch, channels, s->batch * channels, at + c, map, start,
                      start + rows * s->out_width, scratch + c * map);
    from = (w->normed ? scratch : from) + start;
    for (num q = 0; q < rows; q++, from += s->out_width) {
      num row = (n * w->band + q) * w->row;
      if (block < LANES) {
        copy(gs + o * g_map + row, from, s->out_width);
        continue;
      }
      real *to = gs + o / block * block * g_map + row * block + o % block;
      num j = 0;
      for (; j + LANES <= s->out_width; j += LANES) {
        vec r[LANES];
        UNROLL for (int c = 0; c < LANES; c++) r[c] = load(from + c * map + j);
        transpose(r);
        UNROLL for (int c = 0; c < LANES; c++) store(to + (j + c) * block, r[c]);
      }
      for (; j < s->out_width; j++)
        for (int c = 0; c < LANES; c++) to[j * block + c] = from[c * map + j];
    }
  }
}

// What a piece of rows of some samples adds to the gradient of a part of the input channels.
static void add_products(const gradients *w, const sizes *s, const tap *taps_of_branch, const real *gs, const real *xs,
                         num channels, num samples, num first, num rows, real *d_weight) {
  num k = s->kernel, widest = w->block == 4 ? 3 : w->block == 2 ? 5 : w->block > LANES ? (k % 5 ? 4 : 5) : 9;
  tap_product p = {.g_map = w->samples * w->band * w->row, .x_map = w->samples * w->l.channel, .samples = samples,
               .g_sample = w->band * w->row * (w->block < LANES ? 1 : w->block),
               .out_channel = s->in * k * k, .in_channel = k * k};
  for (num o = 0; o < s->out; o += w->block)
    for (num r = 0; r < k; r++) {
      num up = taps_of_branch[r * k].row, tiles = ceil_div(k, widest);
      p.from = 0, p.to = rows;
      while (p.from < p.to && (first + p.from) * s->stride + up < 0) p.from++;
      while (p.to > p.from && (first + p.to - 1) * s->stride + up >= s->height) p.to--;
      for (num t = 0; t < tiles; t++) {
        num t0 = k * t / tiles, taps = k * (t + 1) / tiles - t0, together = 1;
        for (num c = 0; c < channels; c += together) {
          p.g = gs + o * p.g_map, p.x = xs + c * p.x_map, p.taps = taps_of_branch + r * k + t0;
          p.out = d_weight + (o * s->in + c) * k * k;
          num left = channels - c;
          if (w->block == LANES) together = taps <= 3 && left >= 4 ? 4 : taps <= 5 && left >= 2 ? 2 : 1;
          if (w->block > LANES) together = taps <= 3 && left >= 2 ? 2 : 1;
          products(w->block >= LANES ? together : w->block, taps, w, &p);
        }
      }
    }
}

static void gradient_steps(void *data) {
  gradients *w = data;
  const sizes *s = &w->s;
  num map = s->height * s->width, x_size = ceil_div(s->in, w->parts) * w->samples * w->l.channel + 2 * LANES;
  num g_size = s->out * w->samples * w->band * w->row;
  real *xs = allocate(x_size), *gs = allocate(g_size);
  real *scratch = allocate(w->normed ? LANES * s->out_height * s->out_width : 0);
  if (xs == NULL || gs == NULL || scratch == NULL) {
    __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  } else {
    memset(xs, 0, sizeof(real) * x_size);
    memset(gs, 0, sizeof(real) * g_size);
    for (num i; (i = next_step(&w->steps)) < w->steps.count;) {
      num group = i / w->parts, c0 = s->in * (i % w->parts) / w->parts, c1 = s->in * (i % w->parts + 1) / w->parts;
      for (num b = 0; b < s->batch; b += w->samples)
        for (num first = 0; first < s->out_height; first += w->band) {
          num samples = min(w->samples, s->batch - b), rows = min(w->band, s->out_height - first);
          for (num n = 0; n < samples; n++)
            for (num c = c0; c < c1; c++)
              fill(xs + ((c - c0) * w->samples + n) * w->l.channel, &w->l,
                   w->x + (((b + n) * s->groups + group) * s->in + c) * map, first);
          const tap *taps = w->taps;
          for (num k = 0; k < w->branches; k++) {
            num count = w->sizes[k].kernel * w->sizes[k].kernel;
            real *d_weight = w->d_weight[k] + (group * s->out * s->in + c0) * count;
            for (num o = 0; b + first == 0 && o < s->out; o++)
              memset(d_weight + o * s->in * count, 0, sizeof(real) * (c1 - c0) * count);
            for (num n = 0; n < samples; n++) fill_gradients(w, k, gs, scratch, b + n, group, n, first, rows);
            add_products(w, w->sizes + k, taps, gs, xs, c1 - c0, samples, first, rows, d_weight);
            taps += count;
          }
        }
    }
  }
  release(xs);
  release(gs);
  release(scratch);
}

static int weight_gradients(gradients *w, num threads) {
  const sizes *s = w->sizes;
  num count = 0;
  for (num k = 0; k < w->branches; k++) count += s[k].kernel * s[k].kernel;
  w->s = *s;
  w->taps = malloc(sizeof(tap) * count);
  if (w->taps == NULL) return 1;
  tap *taps = w->taps;
  for (num k = 0; k < w->branches; k++) taps = taps_of(s + k, taps);
  w->block = block_of(s->out);
  w->row = w->block >= LANES ? s->out_width : ceil_div(s->out_width, LANES) * LANES;
  num positions = w->block >= LANES ? POSITIONS : 2 * POSITIONS;  // a lane of a row has an eighth of them
  w->samples = max(1, min(s->batch, POSITIONS / (s->out_height * w->row)));
  w->band = max(1, min(s->out_height, positions / w->row));
  w->parts = min(s->in, ceil_div(4 * threads, s->groups));
  for (int i = 0; i < LANES; i++) w->inside[i] = w->row - LANES + i < s->out_width ? -1 : 0;
  w->steps.count = s->groups * w->parts;
  w->l = lay_out(w->taps, count, s->stride, s->height, s->width, w->band, s->out_width);
  num many = w->block >= LANES ? w->band * w->row : 0;
  w->x_at = malloc(sizeof(uint32_t) * (many + 1));
  w->steps.failed = w->x_at == NULL || w->samples * w->l.channel > UINT32_MAX;
  for (num i = 0; !w->steps.failed && i < many; i++) w->x_at[i] = i / w->row * w->l.row + i % w->row;
  if (!w->steps.failed) GOMP_parallel(gradient_steps, w, (unsigned)min(threads, w->steps.count), 0);
  free(w->x_at);
  free(w->taps);
  return w->steps.failed;
}

PUBLIC int NAME(convolve_weight_gradient)(const real *x, const real *gradient, real *d_weight, const sizes *s,
                                          num threads) {
  gradients w = {.branches = 1, .sizes = s, .x = x, .gradient = &gradient, .d_weight = &d_weight};
  return weight_gradients(&w, threads);
}

// The gradients of the weights of a selective kernel's branches.
PUBLIC int NAME(select_weight_gradients)(num branches, const real *x, const real *const *maps, const real *gradient,
                                         const real *of_channels, const real *of_maps, real *const *d_weights,
                                         const sizes *s, num threads) {
  normed of = {maps, gradient, of_channels, of_maps};
  gradients w = {.branches = branches, .sizes = s, .x = x, .gradient = maps, .normed = &of, .d_weight = d_weights};
  return weight_gradients(&w, threads);
}
