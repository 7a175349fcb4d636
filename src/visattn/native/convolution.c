// Convolutions of narrow groups, and the gradients of their inputs.
#include "convolution.h"

#define LEAST_ROWS 4     // at one time, as each time needs some rows around them too
#define MOST_OUTPUTS 16  // that are computed together

// What the channels of an output become, and what they add up to.
typedef struct {
  real scale[MOST_OUTPUTS], shift[MOST_OUTPUTS];
  vec sums[MOST_OUTPUTS];  // in parts
  bool relu;
} ending;

// Sums over input channels and taps, in the order of the weights: one list for both, so that the loop over it is long.
typedef struct {
  const real *x;
  const uint32_t *at;  // which x
  const real *weight;  // of the outputs that are computed together, for each x
  num count;
  real *out;
  num map, step;  // how far apart channels and positions of `out` are
  ending *end;
} sum;

INLINE vec ended(const ending *end, vec x, vec scale, vec shift) {
  x = scale * x + shift;
  return end->relu ? positive(x) : x;
}

// O output channels at V vectors of a row, written where they belong. The last vector begins at `last`, so that it ends
// with the row, and only its `fresh` numbers are new.
INLINE void rows_of(const int O, const int V, const sum *s, num last, num valid, ivec fresh) {
  vec total[WIDEST];
  const real *x = s->x, *weight = s->weight;
  UNROLL for (int i = 0; i < O * V; i++) total[i] = broadcast(0);
  for (const uint32_t *at = s->at, *end = at + s->count; at < end; at++, weight += O) {
    const real *from = x + *at;
    vec here[WIDEST];
    UNROLL for (int v = 0; v < V; v++) here[v] = load(v < V - 1 ? from + v * LANES : from + last);
    UNROLL for (int o = 0; o < O; o++) {
      vec by = broadcast(weight[o]);
      UNROLL for (int v = 0; v < V; v++) total[o * V + v] += by * here[v];
    }
  }
  ending *end = s->end;
  UNROLL for (int o = 0; o < O; o++) {
    vec scale = broadcast(end->scale[o]), shift = broadcast(end->shift[o]), all = broadcast(0);
    UNROLL for (int v = 0; v < V; v++) {
      vec y = ended(end, total[o * V + v], scale, shift);
      all += v < V - 1 ? y : (vec)((ivec)y & fresh);
      real *to = s->out + o * s->map + (v < V - 1 ? v * LANES : last) * s->step;
      if (s->step == 1 && valid == LANES)
        store(to, y);
      else
        for (num j = 0; j < valid; j++) to[j * s->step] = y[j];
    }
    end->sums[o] += all;
  }
}

// As many output channels at the positions of a row.
static void rows(const int O, num columns, sum s) {
  num units = ceil_div(columns, LANES), valid = min(columns, LANES);
  num tiles = ceil_div(units, O == 1 ? WIDEST : O == 2 ? 5 : 3);
  const real *x = s.x;
  real *out = s.out;
  ivec all = {0}, some;
  all = all == 0;
  for (int i = 0; i < LANES; i++) some[i] = (columns < LANES ? i < columns : i >= units * LANES - columns) ? -1 : 0;
  for (num i = 0; i < tiles; i++) {
    num from = units * i / tiles, many = units * (i + 1) / tiles - from;
    from *= LANES, s.x = x + from, s.out = out + from * s.step;
    bool ends = i == tiles - 1;
    num last = ends ? max(0, columns - LANES - from) : (many - 1) * LANES;
    ivec fresh = ends ? some : all;
#define CASE(o, v) \
  case o * 16 + v: rows_of(o, v, &s, last, valid, fresh); break;
    switch (O * 16 + many) {
      CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
      CASE(1, 9) CASE(1, 10) CASE(1, 11) CASE(1, 12)
      CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(2, 5)
      CASE(4, 1) CASE(4, 2) CASE(4, 3)
    }
#undef CASE
  }
}

// L vectors of output channels at P positions of a row, side by side.
INLINE void lanes_of(const int L, const int P, const sum *s) {
  vec total[WIDEST];
  const real *x = s->x, *weight = s->weight;
  UNROLL for (int i = 0; i < L * P; i++) total[i] = broadcast(0);
  for (const uint32_t *at = s->at, *end = at + s->count; at < end; at++, weight += L * LANES) {
    const real *from = x + *at;
    vec by[2];
    UNROLL for (int l = 0; l < L; l++) by[l] = load(weight + l * LANES);
    UNROLL for (int p = 0; p < P; p++) {
      vec here = broadcast(from[p]);
      UNROLL for (int l = 0; l < L; l++) total[p * L + l] += by[l] * here;
    }
  }
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int l = 0; l < L; l++) store(s->out + (p * s->step * L + l) * LANES, total[p * L + l]);
}

static void lanes(num L, num columns, sum s) {
  num tiles = ceil_div(columns, WIDEST / L);
  const real *x = s.x;
  real *out = s.out;
  for (num i = 0; i < tiles; i++) {
    num from = columns * i / tiles, to = columns * (i + 1) / tiles;
    s.x = x + from, s.out = out + from * s.step * L * LANES;
#define CASE(l, p) \
  case l * 16 + p: lanes_of(l, p, &s); break;
    switch (L * 16 + to - from) {
      CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
      CASE(1, 9) CASE(1, 10) CASE(1, 11) CASE(1, 12)
      CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(2, 5) CASE(2, 6)
    }
#undef CASE
  }
}

// `count` positions of some rows of channels side by side, each into its map.
static void finish(ending *end, const real *from, num block, real *to, num map, num count) {
  for (num l = 0; l < block; l += LANES, from += LANES, to += LANES * map) {
    vec scale = load(end->scale + l), shift = load(end->shift + l), all = broadcast(0);
    num i = 0;
    for (; i + LANES <= count; i += LANES) {
      vec r[LANES];
      UNROLL for (int p = 0; p < LANES; p++) r[p] = ended(end, load(from + (i + p) * block), scale, shift);
      all += ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
      transpose(r);
      UNROLL for (int c = 0; c < LANES; c++) store(to + c * map + i, r[c]);
    }
    for (; i < count; i++) {
      vec y = ended(end, load(from + i * block), scale, shift);
      all += y;
      UNROLL for (int c = 0; c < LANES; c++) to[c * map + i] = y[c];
    }
    UNROLL for (int c = 0; c < LANES; c++) end->sums[l + c][0] += all[c];
  }
}

// With a stride, each `step`-th row and column of the gradient of the input has its own taps.
typedef struct {
  num start, count;  // its taps
  num column, columns;
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
  uint32_t *at;
  loop packing, steps;
} convolution;

// Where the list of sums has a tap and a channel: all channels of a row of taps before the next row, so that the rows
// that meet the map are one piece.
INLINE num place(const convolution *w, const tap *taps, num t, num c) {
  return taps[t].first * w->in + c * taps[t].beside + t - taps[t].first;
}

static void pack(void *data) {
  convolution *w = data;
  num blocks = w->out / w->block;
  for (num i; (i = next_step(&w->packing)) < w->packing.count;) {
    num group = i / blocks, first = i % blocks * w->block, next = w->count * (w->transposed ? 1 : w->in);
    for (num c = 0; c < w->in; c++) {
      num pair = w->transposed ? (group * w->in + c) * w->out + first : (group * w->out + first) * w->in + c;
      const real *from = w->weight + pair * w->count;
      for (num t = 0; t < w->count; t++) {
        real *to = w->packed + (i * w->in * w->count + place(w, w->taps, t, c)) * w->block;
        for (num o = 0; o < w->block; o++) to[o] = from[w->taps[t].weight + o * next];
      }
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

// A block of output channels of some rows of one sample, from the filled buffer.
static void block_rows(const convolution *w, const real *buffer, real *side_by_side, num channel, num sample,
                       num band) {
  num block = w->block, width = w->out_width, map = w->out_height * width;
  num first = band * w->band * w->step, last = min(first + w->band * w->step, w->out_height);
  num at = sample * w->groups * w->out + channel;
  real *y = w->y + at * map;
  ending end = {.relu = w->relu};
  for (num o = 0; o < block; o++) {
    end.scale[o] = w->scale ? w->scale[channel + o] : 1, end.shift[o] = w->shift ? w->shift[channel + o] : 0;
    end.sums[o] = broadcast(0);
  }
  for (num row = first; row < last; row++)
    for (num f = row % w->step * w->step, i = 0; i < w->step; i++) {
      const phase *p = w->phases + f + i;
      num q = row / w->step, from, to;
      meeting(w->taps + p->start, p->count, q * w->l.split, w->height, &from, &to);
      num before = (p->start + from) * w->in;
      sum s = {.x = buffer + (q - band * w->band) * w->l.row, .at = w->at + before, .count = (to - from) * w->in,
               .weight = w->packed + (channel * w->in * w->count + before * block), .map = map, .step = w->step,
               .end = &end};
      if (block >= LANES) {
        s.out = side_by_side + ((row - first) * width + p->column) * block;
        lanes(block / LANES, p->columns, s);
      } else {
        s.out = y + row * width + p->column;
        switch (block) {
          case 1: rows(1, p->columns, s); break;
          case 2: rows(2, p->columns, s); break;
          case 4: rows(4, p->columns, s); break;
        }
      }
    }
  if (block >= LANES) finish(&end, side_by_side, block, y + first * width, map, (last - first) * width);
  for (num o = 0; w->sums && o < block; o++) w->sums[(at + o) * w->bands + band] = horizontal_sum(end.sums[o]);
}

static void convolve_steps(void *data) {
  convolution *w = data;
  num size = w->in * w->l.channel + 2 * LANES;
  real *buffer = allocate(size), *side_by_side = NULL;
  if (w->block >= LANES) side_by_side = allocate(w->band * w->step * w->out_width * w->block);
  if (buffer == NULL || (w->block >= LANES && side_by_side == NULL)) {
    __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  } else {
    memset(buffer, 0, sizeof(real) * size);
    for (num i; (i = next_step(&w->steps)) < w->steps.count;) {
      num band = i % w->bands, sample = i / w->bands % w->batch, group = i / w->bands / w->batch;
      const real *x = w->x + (sample * w->groups + group) * w->in * w->height * w->width;
      for (num c = 0; c < w->in; c++)
        fill(buffer + c * w->l.channel, &w->l, x + c * w->height * w->width, band * w->band);
      for (num b = 0; b < w->out; b += w->block)
        block_rows(w, buffer, side_by_side, group * w->out + b, sample, band);
    }
  }
  release(buffer);
  release(side_by_side);
}

// How many output channels are computed together.
static num block_of(num out) {
  return out % (2 * LANES) == 0 ? 2 * LANES : out % LANES == 0 ? LANES : out % 4 == 0 ? 4 : out % 2 == 0 ? 2 : 1;
}

// The list of the sums.
static bool list(convolution *w, tap *taps) {
  w->at = malloc(sizeof(uint32_t) * w->count * w->in);
  if (w->at == NULL || w->in * w->l.channel > UINT32_MAX) return false;
  for (num f = 0; f < w->step * w->step; f++) {
    num start = w->phases[f].start, end = start + w->phases[f].count;
    for (num t = start, next; t < end; t = next) {
      for (next = t; next < end && taps[next].row == taps[t].row;) next++;
      for (num i = t; i < next; i++) {
        taps[i].first = t, taps[i].beside = next - t;
        for (num c = 0; c < w->in; c++) w->at[place(w, taps, i, c)] = c * w->l.channel + taps[i].at;
      }
    }
  }
  return true;
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
  bool failed = !list(w, taps) || w->packed == NULL || (sums && partial == NULL);
  if (!failed) {
    GOMP_parallel(pack, w, min(threads, w->packing.count), 0);
    GOMP_parallel(convolve_steps, w, min(threads, w->steps.count), 0);
    failed = w->steps.failed;
  }
  for (num i = 0; sums && !failed && i < maps; i++) {
    sums[i] = 0;
    for (num band = 0; band < w->bands; band++) sums[i] += partial[i * w->bands + band];
  }
  free(w->at);
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
  phase all_of_it = {.count = count, .columns = s->out_width};
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
    phases[f] = (phase){.start = next - taps, .column = column,
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
