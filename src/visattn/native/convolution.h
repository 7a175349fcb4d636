// What convolutions and their gradients share: the taps of a kernel, and buffers of rows of the input.
//
// The maps of a group are copied, some rows at a time, into a buffer with zeros beside each row, where a tap of the
// kernel is an offset. Rows above and below a map are not stored: taps that lie there are left out. With a stride the
// buffer holds every `split`-th row and column apart from the others, so that its rows are read one by one.
#pragma once
#include "common.h"

#define BUFFER 24576  // numbers of input in a buffer: a part of the cache that a core has for itself
#define BRANCHES 4    // convolutions that are computed together, at most
#define WIDEST 12     // sums that a processor with 16 registers holds, with room for what they are made of

typedef struct {
  num batch, groups, in, out;  // channels of a group
  num height, width, out_height, out_width;
  num kernel, stride, padding, dilation;
} sizes;

// An element of the kernel, and which input it meets: of row split * q + row, for row q of the output; columns alike.
typedef struct {
  num weight;  // its index in the kernel
  num row, column;
  num at;           // offset in a channel of the buffer, from the output's row and column
  num first, beside;  // the first tap of the same row, and how many there are
} tap;

// The gradient of maps before norm and ReLU, from the gradient of what a selective kernel makes of them, see select.c:
// found piece by piece where it is needed, and never written as a whole.
typedef struct {
  const real *const *maps, *gradient;
  const real *of_channels;  // (branches, channels, 5): scale, shift, mean, constant, along
  const real *of_maps;      // (branches, batch * channels, 2): factor of the gradient, what is added
} normed;

INLINE const real *normed_gradient(const normed *n, num branch, num channels, num maps, num map, num size, num from,
                                   num to, real *scratch) {
  const real *by = n->of_channels + (branch * channels + map % channels) * 5;
  const real *more = n->of_maps + (branch * maps + map) * 2;
  const real *c = n->maps[branch] + map * size, *g = n->gradient + map * size;
  vec scale = broadcast(by[0]), shift = broadcast(by[1]), mean = broadcast(by[2]), constant = broadcast(by[3]);
  vec along = broadcast(by[4]), factor = broadcast(more[0]), added = broadcast(more[1]);
#define OF(c, g) \
  ((vec)((ivec)(factor * (g) + added) & ~(scale * (c) + shift <= broadcast(0))) - (constant + along * ((c) - mean)))
  num i = from;
  for (; i + LANES <= to; i += LANES) store(scratch + i, OF(load(c + i), load(g + i)));
  if (i < to) store_some(scratch + i, OF(load_some(c + i, to - i), load_some(g + i, to - i)), to - i);
#undef OF
  return scratch;
}

typedef struct {
  num split;
  uint64_t used_rows;           // which of the parts a tap meets
  num height, width;            // of the input
  num left, row, map, channel;  // zeros before a row; numbers of a row, a part, a channel
  num first, rows;              // rows of a part in the buffer: the first, from the output's, and how many
} layout;

INLINE num floor_div(num a, num b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
INLINE num part_of(num a, num b) { return a - b * floor_div(a, b); }

// How many output channels are computed together.
INLINE num block_of(num out) {
  return out % (2 * LANES) == 0 ? 2 * LANES : out % LANES == 0 ? LANES : out % 4 == 0 ? 4 : out % 2 == 0 ? 2 : 1;
}

// The taps of a kernel, row by row; returns where the next are.
INLINE tap *taps_of(const sizes *s, tap *to) {
  for (num t = 0; t < s->kernel * s->kernel; t++)
    *to++ = (tap){.weight = t, .row = t / s->kernel * s->dilation - s->padding,
                  .column = t % s->kernel * s->dilation - s->padding};
  return to;
}

// The buffer for `rows` rows of `columns` columns of the output.
INLINE layout lay_out(tap *taps, num count, num split, num height, num width, num rows, num columns) {
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
  num whole = count >= LANES ? count / 2 * 2 : 0;
  for (num j = 0; j < whole; j += LANES) {
    j = min(j, whole - LANES);  // the last piece ends with the row
    vec a = load(from + j), parted = SHUFFLE(a, a, 0, 2, 4, 6, 1, 3, 5, 7);
    memcpy(even + j / 2, &parted, sizeof(parted) / 2);
    memcpy(odd + j / 2, (real *)&parted + LANES / 2, sizeof(parted) / 2);
  }
  for (num j = whole; j + 1 < count; j += 2) even[j / 2] = from[j], odd[j / 2] = from[j + 1];
  if (count % 2) even[count / 2] = from[count - 1];
}

// The rows of one map that an output's rows from `first` on meet.
INLINE void fill(real *buffer, const layout *l, const real *from, num first) {
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

// With a stride, each `step`-th row and column of the gradient of an input has its own taps.
typedef struct {
  num start, count;  // its taps
  num column, columns;
} phase;

// Several convolutions of one input, or the sum of one convolution of each of several inputs. Channels are of a group.
typedef struct {
  num branches;
  bool added;                 // the sum: for the gradient of an input, with sizes and weights as they were forward
  const sizes *sizes;         // of each branch: kernel, padding and dilation are its own
  const real *const *x;
  const normed *normed;       // what to make of x first, or NULL
  const real *const *weights, *const *scales, *const *shifts;
  bool relu;
  real *const *y, *const *sums;
  // By open_convolution:
  num batch;
  num groups, in, out, height, width, out_height, out_width;
  num count;                  // taps of all branches
  num step, block, band, bands;
  num samples, first, now;    // samples at one time, the first of them, and how many they are
  tap *taps;
  phase *phases;
  layout l;
  uint32_t *at, *places;
  real *packed, *partial;
  loop steps;
} convolution;

bool NAME(open_convolution)(convolution *w, num samples, num threads);
bool NAME(convolve_samples)(convolution *w, num first, num count, num threads);
void NAME(close_convolution)(convolution *w);
