// What convolutions and their gradients share: the taps of a kernel, and buffers of rows of the input.
//
// The maps of a group are copied, some rows at a time, into a buffer with zeros beside each row, where a tap of the
// kernel is an offset. Rows above and below a map are not stored: taps that lie there are left out. With a stride the
// buffer holds every `split`-th row and column apart from the others, so that its rows are read one by one.
#pragma once
#include "common.h"

#define BUFFER 24576  // numbers of input in a buffer: a part of the cache that a core has for itself
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

typedef struct {
  num split;
  uint64_t used_rows;           // which of the parts a tap meets
  num height, width;            // of the input
  num left, row, map, channel;  // zeros before a row; numbers of a row, a part, a channel
  num first, rows;              // rows of a part in the buffer: the first, from the output's, and how many
} layout;

INLINE num floor_div(num a, num b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
INLINE num part_of(num a, num b) { return a - b * floor_div(a, b); }

INLINE tap *taps_of(const sizes *s) {
  num k = s->kernel;
  tap *taps = malloc(sizeof(tap) * k * k);
  for (num t = 0; taps && t < k * k; t++)
    taps[t] = (tap){.weight = t, .row = t / k * s->dilation - s->padding, .column = t % k * s->dilation - s->padding};
  return taps;
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
