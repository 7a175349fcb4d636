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

// Sums over input channels and taps of a convolution, in the order of its weights: one list for both, so that the loop
// over it is long.
typedef struct {
  const uint32_t *at;  // which x
  const real *weight;  // of the outputs that are computed together, for each x
  num count;
} list;

typedef struct {
  const real *x;
  list lists[BRANCHES];
  num branches;
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
  const real *x = s->x;
  UNROLL for (int i = 0; i < O * V; i++) total[i] = broadcast(0);
  for (const list *l = s->lists; l < s->lists + s->branches; l++) {
    const real *weight = l->weight;
    for (const uint32_t *at = l->at, *end = at + l->count; at < end; at++, weight += O) {
      const real *from = x + *at;
      vec here[WIDEST];
      UNROLL for (int v = 0; v < V; v++) here[v] = load(v < V - 1 ? from + v * LANES : from + last);
      UNROLL for (int o = 0; o < O; o++) {
        vec by = broadcast(weight[o]);
        UNROLL for (int v = 0; v < V; v++) total[o * V + v] += by * here[v];
      }
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
static void rows(const int O, num columns, const sum *whole) {
  sum s = *whole;
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
  const real *x = s->x;
  UNROLL for (int i = 0; i < L * P; i++) total[i] = broadcast(0);
  for (const list *some = s->lists; some < s->lists + s->branches; some++) {
    const real *weight = some->weight;
    for (const uint32_t *at = some->at, *end = at + some->count; at < end; at++, weight += L * LANES) {
      const real *from = x + *at;
      vec by[2];
      UNROLL for (int l = 0; l < L; l++) by[l] = load(weight + l * LANES);
      UNROLL for (int p = 0; p < P; p++) {
        vec here = broadcast(from[p]);
        UNROLL for (int l = 0; l < L; l++) total[p * L + l] += by[l] * here;
      }
    }
  }
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int l = 0; l < L; l++) store(s->out + (p * s->step * L + l) * LANES, total[p * L + l]);
}

static void lanes(num L, num columns, const sum *whole) {
  sum s = *whole;
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

// Where the list of sums has a tap and a channel: all channels of a row of taps before the next row, so that the rows
// that meet the map are one piece.
INLINE num place(const convolution *w, num t, num c) {
  const tap *taps = w->taps;
  return taps[t].first * w->in + c * taps[t].beside + t - taps[t].first;
}

// 8 rows of weights side by side, each number where the list has it.
INLINE void pack_lanes(real *to, num block, const uint32_t *place, const real *from, num row, num count) {
  for (num i = 0; i < count; i += LANES) {
    vec r[LANES];
    i = min(i, count - LANES);
    UNROLL for (int o = 0; o < LANES; o++) r[o] = load(from + o * row + i);
    transpose(r);
    UNROLL for (int j = 0; j < LANES; j++) store(to + place[i + j] * block, r[j]);
  }
}

static void pack(void *data) {
  convolution *w = data;
  num blocks = w->out / w->block, count = w->in * w->count;
  for (num i; (i = next_step(&w->steps)) < w->steps.count;) {
    num group = i / blocks, first = i % blocks * w->block;
    real *to = w->packed + i * count * w->block;
    const uint32_t *place = w->places;
    for (num k = 0; k < w->branches; k++) {
      num taps = w->sizes[k].kernel * w->sizes[k].kernel, pieces = w->added ? w->in : 1, piece = w->in * taps / pieces;
      for (num c = 0; c < pieces; c++, place += piece) {
        num row = w->added ? taps : w->in * taps;
        const real *from = w->weights[k] + ((group * pieces + c) * w->out + first) * row;
        num o = 0;
        for (; piece >= LANES && o + LANES <= w->block; o += LANES)
          pack_lanes(to + o, w->block, place, from + o * row, row, piece);
        for (; o < w->block; o++)
          for (num j = 0; j < piece; j++) to[place[j] * w->block + o] = from[o * row + j];
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
static void block_rows(const convolution *w, const real *buffer, real *side_by_side, num output, num channel,
                       num sample, num band) {
  num block = w->block, width = w->out_width, map = w->out_height * width;
  num first = band * w->band * w->step, last = min(first + w->band * w->step, w->out_height);
  num at = (sample - w->first) * w->groups * w->out + channel;
  real *y = w->y[output] + at * map;
  const real *scale = w->scales ? w->scales[output] : NULL, *shift = w->shifts ? w->shifts[output] : NULL;
  ending end = {.relu = w->relu};
  for (num o = 0; o < block; o++) {
    end.scale[o] = scale ? scale[channel + o] : 1, end.shift[o] = shift ? shift[channel + o] : 0;
    end.sums[o] = broadcast(0);
  }
  sum s = {.map = map, .step = w->step, .end = &end, .branches = w->added ? w->branches : 1};
  for (num row = first; row < last; row++)
    for (num f = row % w->step * w->step, i = 0; i < w->step; i++, f++) {
      num q = row / w->step;
      const phase *p = NULL;
      for (num k = 0; k < s.branches; k++) {
        num from, to;
        p = w->phases + (w->added ? k : output) * w->step * w->step + f;
        meeting(w->taps + p->start, p->count, q * w->l.split, w->height, &from, &to);
        num before = (p->start + from) * w->in;
        const real *packed = w->packed + channel * w->in * w->count + before * block;
        s.lists[k] = (list){w->at + before, packed, (to - from) * w->in};
      }
      s.x = buffer + (q - band * w->band) * w->l.row;
      if (block >= LANES) {
        s.out = side_by_side + ((row - first) * width + p->column) * block;
        lanes(block / LANES, p->columns, &s);
      } else {
        s.out = y + row * width + p->column;
        switch (block) {
          case 1: rows(1, p->columns, &s); break;
          case 2: rows(2, p->columns, &s); break;
          case 4: rows(4, p->columns, &s); break;
        }
      }
    }
  if (block >= LANES) finish(&end, side_by_side, block, y + first * width, map, (last - first) * width);
  num sum_of = (output * w->samples * w->groups * w->out + at) * w->bands + band;
  for (num o = 0; w->sums && o < block; o++) w->partial[sum_of + o * w->bands] = horizontal_sum(end.sums[o]);
}

static void convolve_steps(void *data) {
  convolution *w = data;
  num inputs = w->added ? w->branches : 1, outputs = w->added ? 1 : w->branches, map = w->height * w->width;
  num size = inputs * w->in * w->l.channel + 2 * LANES;
  real *buffer = allocate(size), *scratch = allocate(w->normed ? map : 0);
  real *side_by_side = allocate(w->block >= LANES ? w->band * w->step * w->out_width * w->block : 0);
  if (buffer == NULL || scratch == NULL || side_by_side == NULL) {
    __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  } else {
    memset(buffer, 0, sizeof(real) * size);
    for (num i; (i = next_step(&w->steps)) < w->steps.count;) {
      num band = i % w->bands, sample = w->first + i / w->bands % w->now, group = i / w->bands / w->now;
      for (num k = 0; k < inputs; k++)
        for (num c = 0; c < w->in; c++) {
          num channels = w->groups * w->in, at = sample * channels + group * w->in + c;
          const real *x = w->x[k] + at * map;
          if (w->normed) {
            num from = max(band * w->band + w->l.first, 0) * w->width;
            num to = min((band * w->band + w->l.first + w->l.rows) * w->width, map);
            x = normed_gradient(w->normed, k, channels, w->batch * channels, at, map, from, to, scratch);
          }
          fill(buffer + (k * w->in + c) * w->l.channel, &w->l, x, band * w->band);
        }
      for (num k = 0; k < outputs; k++)
        for (num b = 0; b < w->out; b += w->block)
          block_rows(w, buffer, side_by_side, k, group * w->out + b, sample, band);
    }
  }
  release(buffer);
  release(scratch);
  release(side_by_side);
}

// Taps and phases. Those of a gradient of an input: the outputs that an input has met.
static void tap_by_tap(convolution *w) {
  tap *next = w->taps;
  num step = w->step;
  for (num k = 0; k < w->branches; k++) {
    const sizes *s = w->sizes + k;
    num side = s->kernel, count = side * side;
    for (num f = 0; f < step * step; f++) {
      num row = f / step, column = f % step;
      phase *p = w->phases + k * step * step + f;
      *p = (phase){.start = next - w->taps, .column = column,
                   .columns = floor_div(w->out_width - 1 - column, step) + 1};
      if (!w->added) next = taps_of(s, next);
      for (num t = 0; w->added && t < count; t++) {
        num up = t / side * s->dilation - s->padding, aside = t % side * s->dilation - s->padding;
        if (part_of(row - up, step) == 0 && part_of(column - aside, step) == 0)
          *next++ = (tap){.weight = t, .row = floor_div(row - up, step), .column = floor_div(column - aside, step)};
      }
      p->count = next - w->taps - p->start;
    }
  }
}

// The list of the sums, and where it has each number of the weights.
static void list_sums(convolution *w) {
  num step = w->step, places = 0;
  for (num k = 0; k < w->branches; k++) {
    num count = w->sizes[k].kernel * w->sizes[k].kernel, input = w->added ? k * w->in * w->l.channel : 0;
    for (num f = 0; f < step * step; f++) {
      const phase *p = w->phases + k * step * step + f;
      for (num t = p->start, next; t < p->start + p->count; t = next) {
        for (next = t; next < p->start + p->count && w->taps[next].row == w->taps[t].row;) next++;
        for (num i = t; i < next; i++) {
          w->taps[i].first = t, w->taps[i].beside = next - t;
          for (num c = 0; c < w->in; c++) {
            num at = place(w, i, c);
            w->at[at] = input + c * w->l.channel + w->taps[i].at;
            w->places[places + c * count + w->taps[i].weight] = at;
          }
        }
      }
    }
    places += w->in * count;
  }
}

// Makes ready for so many samples at one time.
bool NAME(open_convolution)(convolution *w, num samples, num threads) {
  num inputs = w->added ? w->branches : 1, split = w->added ? 1 : w->sizes[0].stride;
  const sizes *s = w->sizes;
  w->batch = s->batch, w->groups = s->groups, w->samples = samples;
  w->in = w->added ? s->out : s->in, w->out = w->added ? s->in : s->out;
  w->height = w->added ? s->out_height : s->height, w->width = w->added ? s->out_width : s->width;
  w->out_height = w->added ? s->height : s->out_height, w->out_width = w->added ? s->width : s->out_width;
  w->step = w->added ? s->stride : 1;
  for (num k = 0; k < w->branches; k++) w->count += s[k].kernel * s[k].kernel;
  num maps = w->groups * w->out * (w->added ? 1 : w->branches) * samples;
  w->taps = malloc(sizeof(tap) * w->count);
  w->phases = malloc(sizeof(phase) * w->branches * w->step * w->step);
  w->at = malloc(sizeof(uint32_t) * w->count * w->in);
  w->places = malloc(sizeof(uint32_t) * w->count * w->in);
  w->packed = allocate(w->groups * w->in * w->out * w->count);
  if (!w->taps || !w->phases || !w->at || !w->places || !w->packed) return false;
  tap_by_tap(w);
  num rows = ceil_div(w->out_height, w->step), columns = ceil_div(w->out_width, w->step);
  layout whole = lay_out(w->taps, w->count, split, w->height, w->width, rows, columns);
  // Fewer rows at a time where they would not fit into the cache, or would be too few pieces for all threads.
  num fitting = BUFFER / (inputs * w->in * split * split * whole.row) - (whole.rows - rows);
  num shared = ceil_div(rows, ceil_div(4 * threads, samples * w->groups));
  w->band = min(rows, max(LEAST_ROWS, min(fitting, shared)));
  w->bands = ceil_div(rows, w->band);
  w->l = lay_out(w->taps, w->count, split, w->height, w->width, w->band, columns);
  if (inputs * w->in * w->l.channel > UINT32_MAX) return false;
  list_sums(w);
  if (w->sums) w->partial = allocate(maps * w->bands);
  if (w->sums && w->partial == NULL) return false;
  w->block = block_of(w->out);
  w->steps = (loop){.count = w->groups * w->out / w->block};
  GOMP_parallel(pack, w, (unsigned)min(threads, w->steps.count), 0);
  return true;
}

// Some samples, of which the outputs hold just these.
bool NAME(convolve_samples)(convolution *w, num first, num count, num threads) {
  w->first = first, w->now = count;
  w->steps = (loop){.count = count * w->groups * w->bands};
  GOMP_parallel(convolve_steps, w, (unsigned)min(threads, w->steps.count), 0);
  num maps = count * w->groups * w->out;
  for (num k = 0; w->sums && !w->steps.failed && k < w->branches; k++)
    for (num i = 0; i < maps; i++) {
      const real *partial = w->partial + (k * w->samples * w->groups * w->out + i) * w->bands;
      w->sums[k][i] = 0;
      for (num band = 0; band < w->bands; band++) w->sums[k][i] += partial[band];
    }
  return !w->steps.failed;
}

void NAME(close_convolution)(convolution *w) {
  free(w->taps);
  free(w->phases);
  free(w->at);
  free(w->places);
  release(w->packed);
  release(w->partial);
}

static int convolve_once(convolution *w, num threads) {
  bool done = NAME(open_convolution)(w, w->sizes->batch, threads);
  done = done && NAME(convolve_samples)(w, 0, w->sizes->batch, threads);
  NAME(close_convolution)(w);
  return !done;
}

// `y = scale * convolution + shift`, with a ReLU if wanted, and the sum of each map of y if there is a place for it.
PUBLIC int NAME(convolve)(const real *x, const real *weight, const real *scale, const real *shift, real *y, real *sums,
                          const sizes *s, num relu, num threads) {
  convolution w = {.branches = 1, .sizes = s, .x = &x, .weights = &weight, .scales = &scale, .shifts = &shift,
                   .relu = relu, .y = &y, .sums = sums ? &sums : NULL};
  return convolve_once(&w, threads);
}

// Several convolutions of one map.
PUBLIC int NAME(convolve_branches)(num branches, const real *x, const real *const *weights, real *const *y,
                                   const sizes *s, num threads) {
  convolution w = {.branches = branches, .sizes = s, .x = &x, .weights = weights, .y = y};
  return convolve_once(&w, threads);
}

PUBLIC int NAME(convolve_input_gradient)(const real *gradient, const real *weight, real *d_x, const sizes *s,
                                         num threads) {
  convolution w = {.branches = 1, .added = true, .sizes = s, .x = &gradient, .weights = &weight, .y = &d_x};
  return convolve_once(&w, threads);
}

// The gradient of the input of a selective kernel's branches.
PUBLIC int NAME(select_input_gradient)(num branches, const real *const *weights, const real *const *maps,
                                       const real *gradient, const real *of_channels, const real *of_maps, real *d_x,
                                       const sizes *s, num threads) {
  normed of = {maps, gradient, of_channels, of_maps};
  convolution w = {.branches = branches, .added = true, .sizes = s, .x = maps, .normed = &of, .weights = weights,
                   .y = &d_x};
  return convolve_once(&w, threads);
}
