// Convolutions of narrow groups, forward and both gradients.
//
// The maps of a group are copied, some rows at a time, into a buffer with zeros beside each row, where a tap of the
// kernel is an offset. Rows above and below a map are not stored: taps that lie there are left out. With a stride the
// buffer holds every `split`-th row and column apart from the others, so that its rows are read one by one.
#include "common.h"

#define BUFFER 24576    // numbers of input in a buffer: a part of the cache that a core has for itself
#define POSITIONS 1024  // that a sum of the gradient of a weight runs over before the next is begun
#define AT_ONCE 64      // positions that a sum in registers runs over
#define LEAST_ROWS 4     // at one time, as each time needs some rows around them too
#define WIDEST 12       // sums that a processor with 16 registers holds, with room for what they are made of

typedef struct {
  num batch, groups, in, out;  // channels of a group
  num height, width, out_height, out_width;
  num kernel, stride, padding, dilation;
} sizes;

// An element of the kernel, and which input it meets: of row split * q + row, for row q of the output; columns alike.
typedef struct {
  num weight;  // its index in the kernel
  num row, column;
  num at;  // offset in a channel of the buffer, from the output's row and column
} tap;

typedef struct {
  num split;
  uint64_t used_rows;           // which of the parts a tap meets
  num height, width;            // of the input
  num left, row, map, channel;  // zeros before a row; numbers of a row, a part, a channel
  num first, rows;              // rows of a part in the buffer: the first, from the output's, and how many
} layout;

INLINE num floor_div(num a, num b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
INLINE num part_of(num a, num b) { return a - b * floor_div(a, b); }

static tap *taps_of(const sizes *s) {
  num k = s->kernel;
  tap *taps = malloc(sizeof(tap) * k * k);
  for (num t = 0; taps && t < k * k; t++)
    taps[t] = (tap){.weight = t, .row = t / k * s->dilation - s->padding, .column = t % k * s->dilation - s->padding};
  return taps;
}

// How many output channels are computed together.
static num block_of(num out) { return out % LANES == 0 ? LANES : out % 4 == 0 ? 4 : out % 2 == 0 ? 2 : 1; }

// The buffer for `rows` rows of `columns` columns of the output.
static layout lay_out(tap *taps, num count, num split, num height, num width, num rows, num columns) {
  layout l = {.split = split, .height = height, .width = width};
  num last = 0, right = 0;
  for (num i = 0; i < count; i++) {
    num row = floor_div(taps[i].row, split), column = floor_div(taps[i].column, split);
    l.first = i ? min(l.first, row) : row, last = i ? max(last, row) : row;
    l.left = max(l.left, -column), right = max(right, column);
    l.used_rows |= UINT64_C(1) << part_of(taps[i].row, split);
  }
  l.rows = rows + last - l.first;
  l.row = l.left + max(ceil_div(columns, LANES) * LANES + right, ceil_div(width, split));
  l.map = l.rows * l.row;
  l.channel = split * split * l.map;
  for (num i = 0; i < count; i++) {
    num row = floor_div(taps[i].row, split) - l.first, column = floor_div(taps[i].column, split) + l.left;
    num part = part_of(taps[i].row, split) * split + part_of(taps[i].column, split);
    taps[i].at = part * l.map + row * l.row + column;
  }
  return l;
}

// A short row, for which a call of memcpy would take longer than the copy.
INLINE void copy(real *to, const real *from, num count) {
  num i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = from[i];
}

INLINE void split_in_two(real *even, real *odd, const real *from, num count) {
  for (num j = 0; j < count / 2; j++) even[j] = from[2 * j], odd[j] = from[2 * j + 1];
  if (count % 2) even[count / 2] = from[count - 1];
}

// The rows of one map that an output's rows from `first` on meet.
static void fill(real *buffer, const layout *l, const real *from, num first) {
  num split = l->split;
  first += l->first;
  for (num a = 0; a < split; a++) {
    if (!(l->used_rows >> a & 1)) continue;
    for (num i = max(first, 0); i < first + l->rows && i * split + a < l->height; i++) {
      const real *source = from + (i * split + a) * l->width;
      real *to = buffer + a * split * l->map + (i - first) * l->row + l->left;
      if (split == 1)
        copy(to, source, l->width);
      else if (split == 2)
        split_in_two(to, to + l->map, source, l->width);
      else
        for (num j = 0; j < l->width; j++) to[j % split * l->map + j / split] = source[j];
    }
  }
}

// Of taps in the order of their rows, those that meet a row of the map.
INLINE void meeting(const tap *taps, num count, num row, num height, num *from, num *to) {
  num first = 0, last = count;
#define OUTSIDE(i) (row + taps[i].row < 0 || row + taps[i].row >= height)
  while (first < last && OUTSIDE(first)) first++;
  while (last > first && OUTSIDE(last - 1)) last--;
#undef OUTSIDE
  *from = first, *to = last;
}

// ---- Sums over input channels and taps. Vectors may run over the end of a row of `out`: what is there comes later.

typedef struct {
  const real *x;
  num channels, channel;  // of the input, and how far apart
  const tap *taps;
  num from, to, count;  // taps that count, and how many a channel of weights has
  const real *weight;
  real *out;
  num map;  // how far apart channels of `out` are
} sum;

// O output channels at V vectors of a row.
INLINE void rows_of(const int O, const int V, const sum *s) {
  vec total[WIDEST];
  const real *x = s->x, *weight = s->weight;
  UNROLL for (int i = 0; i < O * V; i++) total[i] = broadcast(0);
  for (num c = 0; c < s->channels; c++, x += s->channel, weight += s->count * O)
    for (num t = s->from; t < s->to; t++) {
      const real *at = x + s->taps[t].at;
      vec by[4];
      UNROLL for (int o = 0; o < O; o++) by[o] = broadcast(weight[t * O + o]);
      UNROLL for (int v = 0; v < V; v++) {
        vec here = load(at + v * LANES);
        UNROLL for (int o = 0; o < O; o++) total[o * V + v] += by[o] * here;
      }
    }
  UNROLL for (int o = 0; o < O; o++)
    UNROLL for (int v = 0; v < V; v++) store(s->out + o * s->map + v * LANES, total[o * V + v]);
}

static void rows(num O, num V, const sum *s) {
#define CASE(o, v) \
  case o * 16 + v: rows_of(o, v, s); break;
  switch (O * 16 + V) {
    CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
    CASE(1, 9) CASE(1, 10) CASE(1, 11) CASE(1, 12)
    CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(2, 5) CASE(2, 6)
    CASE(4, 1) CASE(4, 2) CASE(4, 3)
  }
#undef CASE
}

// 8 output channels at P positions of a row.
INLINE void lanes_of(const int P, const sum *s) {
  vec total[16];
  const real *x = s->x, *weight = s->weight;
  UNROLL for (int p = 0; p < 16; p++) total[p] = broadcast(0);
  for (num c = 0; c < s->channels; c++, x += s->channel, weight += s->count * LANES)
    for (num t = s->from; t < s->to; t++) {
      const real *at = x + s->taps[t].at;
      vec by = load(weight + t * LANES);
      UNROLL for (int p = 0; p < P; p++) total[p] += by * broadcast(at[p]);
    }
  UNROLL for (int p = 0; p < P; p += 8) {
    transpose(total + p);
    UNROLL for (int o = 0; o < 8; o++) store(s->out + o * s->map + p, total[p + o]);
  }
}

static void lanes(num P, const sum *s) {
#define CASE(p) \
  case p: lanes_of(p, s); break;
  switch (P) {
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
  }
#undef CASE
}

static void one_row(num block, num columns, sum s) {
  const real *x = s.x;
  real *out = s.out;
  num unit = block == LANES ? 1 : LANES, units = ceil_div(columns, unit);
  num tiles = ceil_div(units, block == LANES ? WIDEST : WIDEST / block);
  for (num i = 0; i < tiles; i++) {
    num from = units * i / tiles, to = units * (i + 1) / tiles;
    s.x = x + from * unit, s.out = out + from * unit;
    if (block == LANES)
      lanes(to - from, &s);
    else
      rows(block, to - from, &s);
  }
}

// ---- Forward, and the gradient of the input: with a stride each `step`-th row and column of it has its own taps.

typedef struct {
  num start, count;  // its taps
  num row, column, rows, columns;
} phase;

typedef struct {
  num batch, groups, in, out;
  num height, width, out_height, out_width;
  bool transposed;  // weights are (in, out) of a group, not (out, in)
  num count, step, block, bands, band;
  const tap *taps;
  const phase *phases;
  layout l;
  const real *x, *weight, *scale, *shift;
  bool relu;
  real *y, *sums, *packed;
  loop packing, steps;
} convolution;

static void pack(void *data) {
  convolution *w = data;
  num blocks = w->out / w->block;
  for (num i; (i = next_step(&w->packing)) < w->packing.count;) {
    num group = i / blocks, first = i % blocks * w->block;
    for (num c = 0; c < w->in; c++)
      for (num o = 0; o < w->block; o++) {
        num pair = w->transposed ? (group * w->in + c) * w->out + first + o : (group * w->out + first + o) * w->in + c;
        const real *from = w->weight + pair * w->count;
        real *to = w->packed + (i * w->in + c) * w->count * w->block + o;
        for (num t = 0; t < w->count; t++) to[t * w->block] = from[w->taps[t].weight];
      }
  }
}

// Some rows of a map, `scale * x + shift` and a ReLU applied; the sum of what is written.
INLINE real write_rows(const bool relu, real *to, const real *from, num count, real scale, real shift) {
  vec totals = broadcast(0), scales = broadcast(scale), shifts = broadcast(shift);
  num i = 0;
  for (; i + LANES <= count; i += LANES) {
    vec y = scales * load(from + i) + shifts;
    if (relu) y = positive(y);
    store(to + i, y);
    totals += y;
  }
  real total = horizontal_sum(totals);
  for (; i < count; i++) {
    real y = scale * from[i] + shift;
    to[i] = relu && y < 0 ? 0 : y;
    total += to[i];
  }
  return total;
}

// Some rows of a block of channels, from where vectors ran over their ends, into their place.
static void finish(const convolution *w, const phase *p, const real *from, num map, num sample, num channel, num band,
                   num rows) {
  num width = w->out_width, step = w->step, first = band * w->band;
  for (num o = channel; o < channel + w->block; o++, from += map) {
    num at = sample * w->groups * w->out + o;
    real *to = w->y + at * w->out_height * width;
    if (step == 1) {
      real scale = w->scale ? w->scale[o] : 1, shift = w->shift ? w->shift[o] : 0, *here = to + first * width, total;
      if (w->relu)
        total = write_rows(true, here, from, rows * width, scale, shift);
      else
        total = write_rows(false, here, from, rows * width, scale, shift);
      if (w->sums) w->sums[at * w->bands + band] = total;
      continue;
    }
    for (num i = 0; i < rows; i++) {
      real *here = to + (p->row + (first + i) * step) * width;
      const real *even = from + i * p[0].columns, *odd = from + w->block * map + i * p[1].columns;
      if (step == 2) {
        for (num j = 0; j < width / 2; j++) here[2 * j] = even[j], here[2 * j + 1] = odd[j];
        if (width % 2) here[width - 1] = even[width / 2];
      } else {
        for (num j = 0; j < width; j++)
          here[j] = from[j % step * w->block * map + i * p[j % step].columns + j / step];
      }
    }
  }
}

static void convolve_steps(void *data) {
  convolution *w = data;
  num blocks = w->out / w->block, map = w->band * ceil_div(w->out_width, w->step) + 2 * LANES;
  real *buffer = allocate(w->in * w->l.channel + 2 * LANES), *out = allocate(w->step * w->block * map);
  if (buffer == NULL || out == NULL) {
    __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  } else {
    memset(buffer, 0, sizeof(real) * (w->in * w->l.channel + 2 * LANES));
    for (num i; (i = next_step(&w->steps)) < w->steps.count;) {
      num first = i % w->bands * w->band, group = i / w->bands % w->groups, sample = i / w->bands / w->groups;
      for (num c = 0; c < w->in; c++) {
        num channel = (sample * w->groups + group) * w->in + c;
        fill(buffer + c * w->l.channel, &w->l, w->x + channel * w->height * w->width, first);
      }
      for (num a = 0; a < w->step; a++) {
        const phase *p = w->phases + a * w->step;
        num some = min(w->band, p->rows - first);
        if (some <= 0) continue;
        for (num b = 0; b < blocks; b++) {
          num channel = group * w->out + b * w->block;
          for (num f = 0; f < w->step; f++) {
            sum s = {.channels = w->in, .channel = w->l.channel, .map = map, .count = w->count,
                     .taps = w->taps + p[f].start,
                     .weight = w->packed + channel * w->in * w->count + p[f].start * w->block};
            for (num q = 0; q < some; q++) {
              meeting(s.taps, p[f].count, (first + q) * w->l.split, w->height, &s.from, &s.to);
              s.x = buffer + q * w->l.row, s.out = out + f * w->block * map + q * p[f].columns;
              one_row(w->block, p[f].columns, s);
            }
          }
          finish(w, p, out, map, sample, channel, i % w->bands, some);
        }
      }
    }
  }
  release(buffer);
  release(out);
}

static int run(convolution *w, tap *taps, num split, num threads) {
  num rows = ceil_div(w->out_height, w->step), columns = ceil_div(w->out_width, w->step);
  layout whole = lay_out(taps, w->count, split, w->height, w->width, rows, columns);
  // Fewer rows at a time where they would not fit into the cache, or would be too few pieces for all threads.
  num fitting = BUFFER / (w->in * split * split * whole.row) - (whole.rows - rows);
  num shared = ceil_div(rows, ceil_div(4 * threads, w->batch * w->groups));
  w->band = min(rows, max(LEAST_ROWS, min(fitting, shared)));
  w->bands = ceil_div(rows, w->band);
  w->l = lay_out(taps, w->count, split, w->height, w->width, w->band, columns);
  w->taps = taps;
  w->block = block_of(w->out);
  w->packing.count = w->groups * w->out / w->block;
  w->steps.count = w->batch * w->groups * w->bands;
  num maps = w->batch * w->groups * w->out;
  real *sums = w->sums, *partial = sums ? allocate(maps * w->bands) : NULL;
  w->packed = allocate(w->groups * w->in * w->out * w->count), w->sums = partial;
  bool failed = w->packed == NULL || (sums && partial == NULL);
  if (!failed) {
    GOMP_parallel(pack, w, min(threads, w->packing.count), 0);
    GOMP_parallel(convolve_steps, w, min(threads, w->steps.count), 0);
    failed = w->steps.failed;
  }
  for (num i = 0; sums && !failed && i < maps; i++) {
    sums[i] = 0;
    for (num band = 0; band < w->bands; band++) sums[i] += partial[i * w->bands + band];
  }
  release(w->packed);
  release(partial);
  return failed;
}

// `y = scale * convolution + shift`, with a ReLU if wanted, and the sum of each map of y if there is a place for it.
PUBLIC int NAME(convolve)(const real *x, const real *weight, const real *scale, const real *shift, real *y, real *sums,
                          const sizes *s, num relu, num threads) {
  num count = s->kernel * s->kernel;
  tap *taps = taps_of(s);
  if (taps == NULL) return 1;
  phase all_of_it = {.count = count, .rows = s->out_height, .columns = s->out_width};
  convolution w = {.batch = s->batch, .groups = s->groups, .in = s->in, .out = s->out,
                   .height = s->height, .width = s->width, .out_height = s->out_height, .out_width = s->out_width,
                   .count = count, .step = 1, .phases = &all_of_it,
                   .x = x, .weight = weight, .scale = scale, .shift = shift, .relu = relu, .y = y, .sums = sums};
  int failed = run(&w, taps, s->stride, threads);
  free(taps);
  return failed;
}

PUBLIC int NAME(convolve_input_gradient)(const real *gradient, const real *weight, real *d_x, const sizes *s,
                                         num threads) {
  num k = s->kernel, count = k * k, step = s->stride;
  tap *taps = malloc(sizeof(tap) * count);
  phase *phases = calloc(step * step, sizeof(phase));
  int failed = 1;
  if (taps == NULL || phases == NULL) goto end;
  tap *next = taps;
  for (num f = 0; f < step * step; f++) {
    num row = f / step, column = f % step;
    phases[f] = (phase){.start = next - taps, .row = row, .column = column,
                        .rows = floor_div(s->height - 1 - row, step) + 1,
                        .columns = floor_div(s->width - 1 - column, step) + 1};
    for (num t = 0; t < count; t++) {  // which met this phase: step * output + t * dilation - padding = its row
      num up = row + s->padding - t / k * s->dilation, aside = column + s->padding - t % k * s->dilation;
      if (part_of(up, step) == 0 && part_of(aside, step) == 0)
        *next++ = (tap){.weight = t, .row = floor_div(up, step), .column = floor_div(aside, step)};
    }
    phases[f].count = next - taps - phases[f].start;
  }
  convolution w = {.batch = s->batch, .groups = s->groups, .in = s->out, .out = s->in,
                   .height = s->out_height, .width = s->out_width, .out_height = s->height, .out_width = s->width,
                   .transposed = true, .count = count, .step = step, .phases = phases,
                   .x = gradient, .weight = weight, .y = d_x};
  failed = run(&w, taps, 1, threads);
end:
  free(taps);
  free(phases);
  return failed;
}

// ---- The gradient of the weight: sums over positions of products of gradients and inputs, T taps of a row of the
// kernel at a time. Groups of 8 output channels are read position by position, others row by row.

typedef struct {
  sizes s;
  const real *x, *gradient;
  real *d_weight;
  const tap *taps;
  layout l;
  num block;               // output channels read together
  num samples, band, row;  // in the buffers at one time; and how long a row of gradients is there
  num parts;               // of the input channels, which threads share
  ivec inside;             // which numbers of the last vector of a row are in the row
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

// O output channels and T taps of one input channel.
INLINE void rows_times(const int O, const int T, const gradients *w, const tap_product *p) {
  vec total[WIDEST];
  UNROLL for (int i = 0; i < O * T; i++) total[i] = broadcast(0);
  for (num b = 0; b < p->samples; b++)
    for (num q = p->from; q < p->to; q++) {
      const real *x = p->x + b * w->l.channel + q * w->l.row, *g = p->g + b * p->g_sample + q * w->row;
      for (num v = 0; v < w->row; v += LANES) {
        vec here[WIDEST];
        UNROLL for (int t = 0; t < T; t++) here[t] = load(x + p->taps[t].at + v);
        if (v + LANES > w->s.out_width)  // no infinity from behind the row may meet the zeros there
          UNROLL for (int t = 0; t < T; t++) here[t] = (vec)((ivec)here[t] & w->inside);
        UNROLL for (int o = 0; o < O; o++) {
          vec by = load(g + o * p->g_map + v);
          UNROLL for (int t = 0; t < T; t++) total[o * T + t] += by * here[t];
        }
      }
    }
  UNROLL for (int o = 0; o < O; o++)
    UNROLL for (int t = 0; t < T; t++)
      p->out[o * p->out_channel + p->taps[t].weight] += horizontal_sum(total[o * T + t]);
}

// 8 output channels, C input channels and T taps. Sums of sums of some rows: a single one would lose digits.
INLINE void lanes_times(const int C, const int T, const gradients *w, const tap_product *p) {
  vec total[WIDEST], part[WIDEST];
  UNROLL for (int i = 0; i < C * T; i++) total[i] = part[i] = broadcast(0);
  num at[WIDEST], added_up = 0;
  UNROLL for (int t = 0; t < T; t++) at[t] = p->taps[t].at;
  for (num b = 0; b < p->samples; b++)
    for (num q = p->from; q < p->to; q++) {
      const real *x = p->x + b * w->l.channel + q * w->l.row, *g = p->g + b * p->g_sample + q * w->row * LANES;
      for (num j = 0; j < w->row; j++) {
        vec by = load(g + j * LANES);
        UNROLL for (int c = 0; c < C; c++)
          UNROLL for (int t = 0; t < T; t++) part[c * T + t] += by * broadcast(x[c * p->x_map + at[t] + j]);
      }
      added_up += w->row;
      if (added_up < AT_ONCE) continue;
      added_up = 0;
      UNROLL for (int i = 0; i < C * T; i++) total[i] += part[i], part[i] = broadcast(0);
    }
  for (int o = 0; o < LANES; o++)
    UNROLL for (int c = 0; c < C; c++)
      UNROLL for (int t = 0; t < T; t++) {
        vec all_of_it = total[c * T + t] + part[c * T + t];
        p->out[o * p->out_channel + c * p->in_channel + p->taps[t].weight] += all_of_it[o];
      }
}

// `channels` of the output read row by row, or of the input where 8 of the output lie side by side.
static void products(num channels, num count, const gradients *w, const tap_product *p) {
#define CASE(n, t)                     \
  case n * 16 + t:                     \
    if (w->block < LANES)              \
      rows_times(n, t, w, p);          \
    else                               \
      lanes_times(n, t, w, p);         \
    break;
  switch (channels * 16 + count) {
    CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8) CASE(1, 9)
    CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(2, 5)
    CASE(4, 1) CASE(4, 2) CASE(4, 3)
  }
#undef CASE
}

// Rows of gradients of one sample; 8 channels side by side where they are read so.
static void fill_gradients(const gradients *w, real *gs, num sample, num group, num n, num first, num rows) {
  const sizes *s = &w->s;
  num map = s->out_height * s->out_width, g_map = w->samples * w->band * w->row;
  for (num o = 0; o < s->out; o++) {
    const real *from = w->gradient + ((sample * s->groups + group) * s->out + o) * map + first * s->out_width;
    for (num q = 0; q < rows; q++, from += s->out_width) {
      num at = (n * w->band + q) * w->row;
      if (w->block < LANES) {
        copy(gs + o * g_map + at, from, s->out_width);
      } else if (o % LANES == 0) {
        real *to = gs + o * g_map + at * LANES;
        num j = 0;
        for (; j + LANES <= s->out_width; j += LANES) {
          vec r[LANES];
          UNROLL for (int c = 0; c < LANES; c++) r[c] = load(from + c * map + j);
          transpose(r);
          UNROLL for (int c = 0; c < LANES; c++) store(to + (j + c) * LANES, r[c]);
        }
        for (; j < s->out_width; j++)
          for (int c = 0; c < LANES; c++) to[j * LANES + c] = from[c * map + j];
      }
    }
  }
}

// What a piece of rows of some samples adds to the gradient of a part of the input channels.
static void add_products(const gradients *w, const real *gs, const real *xs, num channels, num samples, num first,
                         num rows, real *d_weight) {
  const sizes *s = &w->s;
  num k = s->kernel, widest = w->block == 4 ? 3 : w->block == 2 ? 5 : 9;
  tap_product p = {.g_map = w->samples * w->band * w->row, .x_map = w->samples * w->l.channel, .samples = samples,
               .g_sample = w->band * w->row * (w->block == LANES ? LANES : 1),
               .out_channel = s->in * k * k, .in_channel = k * k};
  for (num o = 0; o < s->out; o += w->block)
    for (num r = 0; r < k; r++) {
      num up = w->taps[r * k].row, tiles = ceil_div(k, widest);
      p.from = 0, p.to = rows;
      while (p.from < p.to && (first + p.from) * s->stride + up < 0) p.from++;
      while (p.to > p.from && (first + p.to - 1) * s->stride + up >= s->height) p.to--;
      for (num t = 0; t < tiles; t++) {
        num t0 = k * t / tiles, taps = k * (t + 1) / tiles - t0, together = 1;
        for (num c = 0; c < channels; c += together) {
          p.g = gs + o * p.g_map, p.x = xs + c * p.x_map, p.taps = w->taps + r * k + t0;
          p.out = d_weight + (o * s->in + c) * k * k;
          num left = channels - c;
          if (w->block == LANES) together = taps <= 3 && left >= 4 ? 4 : taps <= 5 && left >= 2 ? 2 : 1;
          products(w->block == LANES ? together : w->block, taps, w, &p);
        }
      }
    }
}

static void gradient_steps(void *data) {
  gradients *w = data;
  const sizes *s = &w->s;
  num count = s->kernel * s->kernel, map = s->height * s->width;
  num x_size = ceil_div(s->in, w->parts) * w->samples * w->l.channel + 2 * LANES;
  num g_size = s->out * w->samples * w->band * w->row;
  real *xs = allocate(x_size), *gs = allocate(g_size);
  if (xs == NULL || gs == NULL) {
    __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  } else {
    memset(xs, 0, sizeof(real) * x_size);
    memset(gs, 0, sizeof(real) * g_size);
    for (num i; (i = next_step(&w->steps)) < w->steps.count;) {
      num group = i / w->parts, c0 = s->in * (i % w->parts) / w->parts, c1 = s->in * (i % w->parts + 1) / w->parts;
      real *d_weight = w->d_weight + (group * s->out * s->in + c0) * count;
      for (num o = 0; o < s->out; o++) memset(d_weight + o * s->in * count, 0, sizeof(real) * (c1 - c0) * count);
      for (num b = 0; b < s->batch; b += w->samples)
        for (num first = 0; first < s->out_height; first += w->band) {
          num samples = min(w->samples, s->batch - b), rows = min(w->band, s->out_height - first);
          for (num n = 0; n < samples; n++) {
            fill_gradients(w, gs, b + n, group, n, first, rows);
            for (num c = c0; c < c1; c++)
              fill(xs + ((c - c0) * w->samples + n) * w->l.channel, &w->l,
                   w->x + (((b + n) * s->groups + group) * s->in + c) * map, first);
          }
          add_products(w, gs, xs, c1 - c0, samples, first, rows, d_weight);
        }
    }
  }
  release(xs);
  release(gs);
}

PUBLIC int NAME(convolve_weight_gradient)(const real *x, const real *gradient, real *d_weight, const sizes *s,
                                          num threads) {
  num count = s->kernel * s->kernel;
  tap *taps = taps_of(s);
  if (taps == NULL) return 1;
  gradients w = {.s = *s, .x = x, .gradient = gradient, .d_weight = d_weight, .taps = taps};
  w.block = block_of(s->out);
  w.row = w.block == LANES ? s->out_width : ceil_div(s->out_width, LANES) * LANES;
  num positions = w.block == LANES ? POSITIONS : LANES * POSITIONS;  // a lane of a row has an eighth of them
  w.samples = max(1, min(s->batch, POSITIONS / (s->out_height * w.row)));
  w.band = max(1, min(s->out_height, positions / w.row));
  w.parts = min(s->in, ceil_div(4 * threads, s->groups));
  for (int i = 0; i < LANES; i++) w.inside[i] = w.row - LANES + i < s->out_width ? -1 : 0;
  w.steps.count = s->groups * w.parts;
  w.l = lay_out(taps, count, s->stride, s->height, s->width, w.band, s->out_width);
  GOMP_parallel(gradient_steps, &w, min(threads, w.steps.count), 0);
  free(taps);
  return w.steps.failed;
}
