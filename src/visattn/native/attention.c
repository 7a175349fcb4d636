// Softmax attention and its gradients. Some rows of the matrix exist at a time: all their scores, so that the softmax
// is the plain one, few enough to stay in a core's cache. Products are of packed panels, 6 x 16 numbers in registers.
//
// Names: a score belongs to a query (its row) and a key. `width` numbers make a query or key, `values` a value.

#include <math.h>

#include "common.h"

#define TALL 6            // rows of a tile
#define WIDE (2 * LANES)  // its columns, and those of a panel
#define DEEP 256          // of a product's sum at one time: such a part of a panel stays in the first cache
#define SCORES 49152      // of a block of rows: in the second cache, beside panels
#define ROWS 96           // of a block at most,
#define FEWEST 48         // and at least
#define GROUP 24          // columns of a gathered product at one time: with 16 of the scores, in the first cache
#define PANELS 8          // of keys, that a thread takes together
#define PIECE 96          // about so many rows whose scores are kept until they enter the gradients of keys and values

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE num round_up(num x, num step) { return ceil_div(x, step) * step; }

// ---- copies --------------------------------------------------------------------------------------------------------

// A matrix in memory: where its first number is, and how far apart rows and columns are.
typedef struct {
  real *at;
  num row, column;
} matrix;

INLINE matrix flipped(matrix x) { return (matrix){x.at, x.column, x.row}; }

// to = factor * from, of whatever layout.
static void copy(matrix to, matrix from, num rows, num columns, real factor) {
  if (from.row == 1 && from.column != 1) {
    to = flipped(to);
    from = flipped(from);
    num swap = rows;
    rows = columns;
    columns = swap;
  }
  num row = 0, wide = columns - columns % LANES;
  if (from.column == 1 && to.column == 1) {
    for (; row < rows; row++) {
      real *into = to.at + row * to.row;
      const real *x = from.at + row * from.row;
      for (num i = 0; i < wide; i += LANES) store(into + i, factor * load(x + i));
      for (num i = wide; i < columns; i++) into[i] = factor * x[i];
    }
  } else if (from.column == 1 && to.row == 1) {
    for (; row + LANES <= rows; row += LANES) {
      const real *x = from.at + row * from.row;
      real *into = to.at + row;
      for (num i = 0; i < wide; i += LANES) {
        vec part[8];
        UNROLL for (int j = 0; j < 8; j++) part[j] = factor * load(x + j * from.row + i);
        transpose(part);
        UNROLL for (int j = 0; j < 8; j++) store(into + (i + j) * to.column, part[j]);
      }
      for (num i = wide; i < columns; i++)
        for (num j = 0; j < LANES; j++) into[i * to.column + j] = factor * x[j * from.row + i];
    }
  }
  for (; row < rows; row++)
    for (num i = 0; i < columns; i++)
      to.at[row * to.row + i * to.column] = factor * from.at[row * from.row + i * from.column];
}

// Panel of 16 rows of a matrix: panel[column][16], zero where there are fewer rows.
static void pack(real *panel, matrix from, num rows, num columns) {
  if (rows < WIDE) memset(panel, 0, sizeof(real) * (size_t)(WIDE * columns));
  copy((matrix){panel, 1, WIDE}, from, min(rows, WIDE), columns, 1);
}

// Rows one after the other, `line` numbers apart: up to whole tiles of zeros.
static void pack_rows(real *to, num line, matrix from, num rows, num columns, real factor) {
  for (num row = 0; row < rows; row++) memset(to + row * line + columns, 0, sizeof(real) * (size_t)((line - columns)));
  memset(to + rows * line, 0, sizeof(real) * (size_t)(line * (round_up(rows, TALL) - rows)));
  copy((matrix){to, line, 1}, from, rows, columns, factor);
}

// ---- products ------------------------------------------------------------------------------------------------------

// 6 x 16 numbers of c (+)= a b.
INLINE void tile(real *c, num c_row, const real *a, num a_row, num a_deep, const real *b, num b_deep, num deep,
                 bool add) {
  vec sum[TALL][2];
  UNROLL for (int i = 0; i < TALL; i++) {
    sum[i][0] = sum[i][1] = broadcast(0);
    __builtin_prefetch(c + i * c_row, 1);
  }
  for (num k = 0; k < deep; k++) {
    vec left = load(b + k * b_deep), right = load(b + k * b_deep + LANES);
    UNROLL for (int i = 0; i < TALL; i++) {
      vec x = broadcast(a[i * a_row + k * a_deep]);
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
  if (add) {
    UNROLL for (int i = 0; i < TALL; i++) {
      sum[i][0] += load(c + i * c_row);
      sum[i][1] += load(c + i * c_row + LANES);
    }
  }
  UNROLL for (int i = 0; i < TALL; i++) {
    store(c + i * c_row, sum[i][0]);
    store(c + i * c_row + LANES, sum[i][1]);
  }
}

// c = a b: rows of a one after the other, b in panels.
static void multiply(real *c, num c_row, const real *a, num a_row, const real *b, num rows, num panels, num deep) {
  num step = ceil_div(deep, ceil_div(deep, DEEP));
  for (num from = 0; from < deep; from += step) {
    num part = min(step, deep - from);
    for (num panel = 0; panel < panels; panel++)
      for (num row = 0; row < rows; row += TALL)
        tile(c + row * c_row + panel * WIDE, c_row, a + row * a_row + from, a_row, 1, b + (panel * deep + from) * WIDE,
             WIDE, part, from > 0);
  }
}

// c (+)= a^T b: sums over rows. c in panels of so many lines of 16, b in columns.
static void multiply_transposed(real *c, num lines, const real *a, num a_row, const real *b, num b_row, num rows,
                                num columns, num panels, bool add) {
  for (num group = 0; group < columns; group += GROUP)
    for (num panel = 0; panel < panels; panel++)
      for (num column = group; column < min(columns, group + GROUP); column += TALL)
        tile(c + (panel * lines + column) * WIDE, WIDE, a + column, 1, a_row, b + panel * WIDE, b_row, rows, add);
}

// ---- softmax -------------------------------------------------------------------------------------------------------

INLINE vec choose(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

// exp of x <= 0 to about one unit in the last place; what float32 holds only denormalised is zero. NaN stays.
#ifdef DOUBLE
INLINE vec exponential(vec x) {
  for (int i = 0; i < LANES; i++) x[i] = exp(x[i]);
  return x;
}
#else
INLINE vec exponential(vec x) {
  vec shifted = x * broadcast(1.44269504f) + broadcast(12582912.f);  // whole powers of two are the last digits now
  vec power = shifted - broadcast(12582912.f);
  vec r = x - power * broadcast(0.693147182f);  // in one step with the product: ln 2 is split for that
  r = r + power * broadcast(1.90465421e-9f);
  vec p = broadcast(0.00139402284f);
  p = p * r + broadcast(0.00836650189f);
  p = p * r + broadcast(0.0416663662f);
  p = p * r + broadcast(0.166665435f);
  p = p * r + broadcast(0.5f);
  vec y = (p * r) * r + r + broadcast(1.f);
  y *= (vec)(((ivec)shifted << 23) + 0x3f800000);
  return (vec)((ivec)y & ~(x < broadcast(-87.3f)));
}
#endif


typedef struct {
  const void *at;  // NULL where there is none
  num sample, head, row, column;
} array;

typedef struct {
  num samples, heads, queries, keys, width, values;
  array query, key, value, weights, mask, out;  // `out` is the gradient of the result in the backward pass
  array d_query, d_key, d_value;
  real scale;
  num threads;
  num key_panels, line;          // panels of keys; numbers from a row of scores to the next
  num value_line, width_line;    // the same of rows of values, of queries
  num value_lines, width_lines;  // of the panels of their gradients
  num rows, piece;               // of a block; of the blocks that are at hand at one time
  bool maps;                     // keys and values lie as channels of positions, and are read so
} problem;

INLINE matrix head_of(array x, num sample, num head, num row) {
  return (matrix){(real *)x.at + sample * x.sample + head * x.head + row * x.row, x.row, x.column};
}

// Scores of a row are multiplied and masked, and become exp(score - maximum), zero beyond the last key. Returns what
// makes them probabilities: 1 / sum.
static real softmax(const problem *p, real *row, const real *weight, const uint8_t *mask) {
  num keys = p->keys, whole = round_up(keys, LANES);
  bool empty = mask != NULL;
  if (weight != NULL) {
    num step = p->weights.column, i = 0;
    if (step == 1)
      for (; i + LANES <= keys; i += LANES) store(row + i, load(row + i) * load(weight + i));
    for (; i < keys; i++) row[i] *= weight[i * step];
  }
  if (mask != NULL) {
    num step = p->mask.column, i = 0;
    ivec kept = (ivec){0};
    if (step == 1)
      for (; i + LANES <= keys; i += LANES) {
        ivec seen = __builtin_convertvector(*(const bytes *)(mask + i), ivec) == 0;
        kept |= seen;
        store(row + i, choose(seen, load(row + i), broadcast(-INFINITY)));
      }
    for (int j = 0; j < LANES; j++) empty &= kept[j] == 0;
    for (; i < keys; i++) {
      empty &= mask[i * step] != 0;
      if (mask[i * step]) row[i] = -INFINITY;
    }
  }
  if (empty) {
    memset(row, 0, sizeof(real) * (size_t)(p->line));
    return 1;
  }
  for (num i = keys; i < whole; i++) row[i] = -INFINITY;
  vec high[4] = {broadcast(-INFINITY), broadcast(-INFINITY), broadcast(-INFINITY), broadcast(-INFINITY)};
  num i = 0;
  for (; i + 4 * LANES <= whole; i += 4 * LANES)
    UNROLL for (int j = 0; j < 4; j++) high[j] = larger(load(row + i + j * LANES), high[j]);
  for (; i < whole; i += LANES) high[0] = larger(load(row + i), high[0]);
  vec most_of = larger(larger(high[0], high[1]), larger(high[2], high[3]));
  real maximum = most_of[0];
  for (int j = 1; j < LANES; j++) maximum = most_of[j] > maximum ? most_of[j] : maximum;
  vec sum[2] = {broadcast(0), broadcast(0)};
  for (i = 0; i + 2 * LANES <= whole; i += 2 * LANES)
    UNROLL for (int j = 0; j < 2; j++) {
      vec e = exponential(load(row + i + j * LANES) - maximum);
      store(row + i + j * LANES, e);
      sum[j] += e;
    }
  for (; i < whole; i += LANES) {
    vec e = exponential(load(row + i) - maximum);
    store(row + i, e);
    sum[0] += e;
  }
  return 1 / horizontal_sum(sum[0] + sum[1]);
}

// Softmax down the columns of a panel.
static void softmax_columns(real *scores, num keys) {
  vec high[2] = {broadcast(-INFINITY), broadcast(-INFINITY)}, sum[2] = {broadcast(0), broadcast(0)};
  for (num key = 0; key < keys; key++)
    UNROLL for (int j = 0; j < 2; j++) high[j] = larger(load(scores + key * WIDE + j * LANES), high[j]);
  for (num from = 0; from < keys; from += DEEP) {
    vec part[2] = {broadcast(0), broadcast(0)};
    for (num key = from; key < min(keys, from + DEEP); key++)
      UNROLL for (int j = 0; j < 2; j++) {
        vec e = exponential(load(scores + key * WIDE + j * LANES) - high[j]);
        store(scores + key * WIDE + j * LANES, e);
        part[j] += e;
      }
    UNROLL for (int j = 0; j < 2; j++) sum[j] += part[j];
  }
  UNROLL for (int j = 0; j < 2; j++) sum[j] = broadcast(1) / sum[j];
  for (num key = 0; key < keys; key++)
    UNROLL for (int j = 0; j < 2; j++)
      store(scores + key * WIDE + j * LANES, load(scores + key * WIDE + j * LANES) * sum[j]);
}

// Gradient of a row of scores from that of its probabilities; `row` becomes the probabilities.
static void softmax_backward(const problem *p, real *row, real *gradient, real inverse_sum, const real *weight) {
  num whole = round_up(p->keys, LANES), i = 0;
  vec sum[4] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
  for (; i + 4 * LANES <= whole; i += 4 * LANES)
    UNROLL for (int j = 0; j < 4; j++) sum[j] += load(row + i + j * LANES) * load(gradient + i + j * LANES);
  for (; i < whole; i += LANES) sum[0] += load(row + i) * load(gradient + i);
  vec mean = broadcast(inverse_sum * horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])));
  for (i = 0; i < whole; i += LANES) {
    vec x = load(row + i) * inverse_sum;
    store(row + i, x);
    store(gradient + i, x * (load(gradient + i) - mean));
  }
  if (weight != NULL) {
    num step = p->weights.column;
    i = 0;
    if (step == 1)
      for (; i + LANES <= p->keys; i += LANES) store(gradient + i, load(gradient + i) * load(weight + i));
    for (; i < p->keys; i++) gradient[i] *= weight[i * step];
  }
}

// ---- one head ------------------------------------------------------------------------------------------------------

// Memory for a head, and the threads that work on it: one where each thread has a head of its own.
typedef struct {
  const problem *p;
  num threads, sample, head;
  real *memory;
  real *keys_deep;              // panels of keys, for scores
  real *keys_wide;              // panels of their width, for gradients of queries
  real *values;                 // panels of their width in the forward pass, of keys in the backward pass
  real *d_keys, *d_values;      // panels of keys
  real *scores, *gradients;     // rows of scores: of a block for each thread forward, of a piece backward
  real *queries, *outs, *rest;  // of those rows: queries, gradients of results, results or gradients of queries
  num first;                     // row of the piece
} work;

typedef struct {
  work *w;
  void (*step)(work *, num slot, num index);
  loop steps;
  num slot;
} region;

static void in_region(void *data) {
  region *r = data;
  num slot = __atomic_fetch_add(&r->slot, 1, __ATOMIC_RELAXED);
  for (num index; (index = next_step(&r->steps)) < r->steps.count;) r->step(r->w, slot, index);
}

static void run(work *w, void (*step)(work *, num, num), num count) {
  region r = {w, step, {count, 0, false}, 0};
  if (w->threads > 1)
    GOMP_parallel(in_region, &r, (unsigned)w->threads, 0);
  else
    in_region(&r);
}

static const real *weights_of(const work *w, num row) {
  return w->p->weights.at == NULL ? NULL : head_of(w->p->weights, w->sample, w->head, row).at;
}

static const uint8_t *mask_of(const work *w, num row) {
  array x = w->p->mask;
  return x.at == NULL ? NULL : (const uint8_t *)x.at + w->sample * x.sample + w->head * x.head + row * x.row;
}

static void pack_keys(work *w, num slot, num panel) {
  (void)slot;
  const problem *p = w->p;
  num key = panel * WIDE;
  pack(w->keys_deep + key * p->width, head_of(p->key, w->sample, w->head, key), p->keys - key, p->width);
}

static void pack_forward(work *w, num slot, num index) {
  const problem *p = w->p;
  if (index < p->key_panels) {
    pack_keys(w, slot, index);
    return;
  }
  num column = (index - p->key_panels) * WIDE;
  matrix from = flipped(head_of(p->value, w->sample, w->head, 0));
  from.at += column * from.row;
  pack(w->values + column * p->keys, from, p->values - column, p->keys);
}

static void pack_backward(work *w, num slot, num index) {
  const problem *p = w->p;
  if (index < p->key_panels) {
    pack_keys(w, slot, index);
    num key = index * WIDE;
    pack(w->values + key * p->values, head_of(p->value, w->sample, w->head, key), p->keys - key, p->values);
    return;
  }
  num column = (index - p->key_panels) * WIDE;
  matrix from = flipped(head_of(p->key, w->sample, w->head, 0));
  from.at += column * from.row;
  pack(w->keys_wide + column * p->keys, from, p->width - column, p->keys);
}

static void forward_rows(work *w, num slot, num index) {
  const problem *p = w->p;
  num row = index * p->rows, rows = min(p->rows, p->queries - row), tall = round_up(rows, TALL);
  num out_line = round_up(p->values, WIDE);
  real *queries = w->queries + slot * p->rows * p->width_line, *scores = w->scores + slot * p->rows * p->line;
  real *out = w->rest + slot * p->rows * out_line;
  pack_rows(queries, p->width_line, head_of(p->query, w->sample, w->head, row), rows, p->width, p->scale);
  multiply(scores, p->line, queries, p->width_line, w->keys_deep, tall, p->key_panels, p->width);
  for (num i = 0; i < rows; i++) {
    real *probabilities = scores + i * p->line;
    real inverse = softmax(p, probabilities, weights_of(w, row + i), mask_of(w, row + i));
    for (num j = 0; j < p->keys; j += LANES) store(probabilities + j, load(probabilities + j) * inverse);
  }
  multiply(out, out_line, scores, p->line, w->values, tall, ceil_div(p->values, WIDE), p->keys);
  copy(head_of(p->out, w->sample, w->head, row), (matrix){out, out_line, 1}, rows, p->values, 1);
}

// The same for keys and values that are maps: scores of 16 queries side by side, a line for each key, so that nothing
// but the queries is packed and the output comes out as a map too. The last tile of keys or channels begins early.
static void forward_columns(work *w, num slot, num index) {
  const problem *p = w->p;
  num row = index * p->rows, rows = min(p->rows, p->queries - row), panels = ceil_div(rows, WIDE);
  num line = p->rows, lines = round_up(p->values, TALL), last = lines - TALL;
  real *queries = w->queries + slot * p->rows * p->width, *scores = w->scores + slot * p->rows * p->keys;
  real *out = w->rest + slot * p->rows * lines;
  matrix keys = head_of(p->key, w->sample, w->head, 0), values = head_of(p->value, w->sample, w->head, 0);
  for (num panel = 0; panel < panels; panel++) {
    real *q = queries + panel * WIDE * p->width, *s = scores + panel * WIDE * p->keys;
    num some = min(WIDE, rows - panel * WIDE);
    if (some < WIDE) memset(q, 0, sizeof(real) * (size_t)(WIDE * p->width));
    copy((matrix){q, 1, WIDE}, head_of(p->query, w->sample, w->head, row + panel * WIDE), some, p->width, p->scale);
    for (num t = 0; t < p->keys; t += TALL) {
      num key = min(t, p->keys - TALL);
      tile(s + key * WIDE, WIDE, keys.at + key, 1, keys.column, q, WIDE, p->width, false);
    }
    softmax_columns(s, p->keys);
  }
  num step = ceil_div(p->keys, ceil_div(p->keys, DEEP));
  for (num from = 0; from < p->keys; from += step)
    for (num t = 0; t < lines; t += TALL) {
      const real *from_values = values.at + (t < last ? t : p->values - TALL) * values.column + from;
      for (num panel = 0; panel < panels; panel++)
        tile(out + t * line + panel * WIDE, line, from_values, values.column, 1,
             scores + (panel * p->keys + from) * WIDE, WIDE, min(step, p->keys - from), from > 0);
    }
  matrix to = head_of(p->out, w->sample, w->head, row);
  copy(to, (matrix){out, 1, line}, rows, last, 1);
  to.at += (p->values - TALL) * to.column;
  copy(to, (matrix){out + last * line, 1, line}, rows, TALL, 1);
}

static void backward_rows(work *w, num slot, num index) {
  (void)slot;
  const problem *p = w->p;
  num inside = index * p->rows, row = w->first + inside, rows = min(p->rows, p->queries - row);
  num tall = round_up(rows, TALL), line = p->line, d_line = round_up(p->width, WIDE);
  real *queries = w->queries + inside * p->width_line, *outs = w->outs + inside * p->value_line;
  real *scores = w->scores + inside * line, *gradients = w->gradients + inside * line;
  real *d_queries = w->rest + inside * d_line;
  pack_rows(queries, p->width_line, head_of(p->query, w->sample, w->head, row), rows, p->width, p->scale);
  pack_rows(outs, p->value_line, head_of(p->out, w->sample, w->head, row), rows, p->values, 1);
  multiply(scores, line, queries, p->width_line, w->keys_deep, tall, p->key_panels, p->width);
  real inverse[ROWS];
  for (num i = 0; i < rows; i++)
    inverse[i] = softmax(p, scores + i * line, weights_of(w, row + i), mask_of(w, row + i));
  multiply(gradients, line, outs, p->value_line, w->values, tall, p->key_panels, p->values);
  for (num i = 0; i < rows; i++)
    softmax_backward(p, scores + i * line, gradients + i * line, inverse[i], weights_of(w, row + i));
  multiply(d_queries, d_line, gradients, line, w->keys_wide, tall, ceil_div(p->width, WIDE), p->keys);
  copy(head_of(p->d_query, w->sample, w->head, row), (matrix){d_queries, d_line, 1}, rows, p->width, p->scale);
}

static void backward_keys(work *w, num slot, num index) {
  (void)slot;
  const problem *p = w->p;
  num panel = index * PANELS, panels = min(PANELS, p->key_panels - panel), key = panel * WIDE;
  num rows = min(p->piece, p->queries - w->first), keys = min(panels * WIDE, p->keys - key);
  bool add = w->first > 0, last = w->first + rows == p->queries;
  real *d_keys = w->d_keys + key * p->width_lines, *d_values = w->d_values + key * p->value_lines;
  multiply_transposed(d_values, p->value_lines, w->outs, p->value_line, w->scores + key, p->line, rows, p->values,
                      panels, add);
  multiply_transposed(d_keys, p->width_lines, w->queries, p->width_line, w->gradients + key, p->line, rows, p->width,
                      panels, add);
  if (!last) return;
  for (num i = 0; i < keys; i += WIDE) {
    matrix from = {d_values + i * p->value_lines, 1, WIDE};
    copy(head_of(p->d_value, w->sample, w->head, key + i), from, min(WIDE, keys - i), p->values, 1);
    from.at = d_keys + i * p->width_lines;
    copy(head_of(p->d_key, w->sample, w->head, key + i), from, min(WIDE, keys - i), p->width, 1);
  }
}

static void forward_head(work *w) {
  if (w->p->maps) {
    run(w, forward_columns, ceil_div(w->p->queries, w->p->rows));
    return;
  }
  run(w, pack_forward, w->p->key_panels + ceil_div(w->p->values, WIDE));
  run(w, forward_rows, ceil_div(w->p->queries, w->p->rows));
}

static void backward_head(work *w) {
  const problem *p = w->p;
  run(w, pack_backward, p->key_panels + ceil_div(p->width, WIDE));
  for (w->first = 0; w->first < p->queries; w->first += p->piece) {
    run(w, backward_rows, ceil_div(min(p->piece, p->queries - w->first), p->rows));
    run(w, backward_keys, ceil_div(p->key_panels, PANELS));
  }
}

static bool prepare(work *w, const problem *p, num threads, bool backward) {
  num keys = p->key_panels * WIDE, rows = backward ? p->piece + TALL : threads * p->rows;
  num of_maps[] = {0, 0, 0, 0, 0, rows * p->keys, 0, rows * p->width, 0, rows * round_up(p->values, TALL)};
  num of_rows[] = {
      keys * p->width,
      backward ? p->keys * round_up(p->width, WIDE) : 0,
      backward ? keys * p->values : p->keys * round_up(p->values, WIDE),
      backward ? keys * p->width_lines : 0,
      backward ? keys * p->value_lines : 0,
      rows * p->line,
      backward ? rows * p->line : 0,
      rows * p->width_line,
      backward ? rows * p->value_line : 0,
      rows * round_up(backward ? p->width : p->values, WIDE),
  };
  real **parts[] = {&w->keys_deep, &w->keys_wide, &w->values,  &w->d_keys, &w->d_values,
                     &w->scores,    &w->gradients, &w->queries, &w->outs,   &w->rest};
  const num *sizes = p->maps ? of_maps : of_rows;
  num count = 0, parts_of = sizeof of_rows / sizeof *of_rows;
  for (num i = 0; i < parts_of; i++) count += round_up(sizes[i], WIDE);
  w->p = p;
  w->threads = threads;
  w->memory = allocate(count);
  if (w->memory == NULL) return false;
  real *next = w->memory;
  for (num i = 0; i < parts_of; i++) {
    *parts[i] = next;
    next += round_up(sizes[i], WIDE);
  }
  return true;
}

typedef struct {
  const problem *p;
  loop steps;
  num threads;  // of each head
  bool backward;
} heads;

static void some_heads(void *data) {
  heads *h = data;
  work w;
  if (!prepare(&w, h->p, h->threads, h->backward)) {
    __atomic_store_n(&h->steps.failed, true, __ATOMIC_RELAXED);
    return;
  }
  for (num step; (step = next_step(&h->steps)) < h->steps.count;) {
    w.sample = step / h->p->heads;
    w.head = step % h->p->heads;
    (h->backward ? backward_head : forward_head)(&w);
  }
  release(w.memory);
}

static int attend(problem *p, bool backward) {
  p->key_panels = ceil_div(p->keys, WIDE);
  p->line = (p->key_panels | 1) * WIDE;  // an odd number of cache lines: rows do not compete for the same places
  p->width_lines = round_up(p->width, TALL);
  p->value_lines = round_up(p->values, TALL);
  p->width_line = (ceil_div(p->width_lines, WIDE) | 1) * WIDE;
  p->value_line = (ceil_div(p->value_lines, WIDE) | 1) * WIDE;
  num most_rows = max(FEWEST, min(ROWS, SCORES / p->line));
  num count = p->samples * p->heads;
  bool alone = count % p->threads == 0 || count >= 4 * p->threads;  // each thread has its own heads
  if (!alone) most_rows = min(most_rows, ceil_div(p->queries, 2 * p->threads));
  p->maps = !backward && p->weights.at == NULL && p->mask.at == NULL && p->key.row == 1 && p->value.row == 1 &&
            p->width <= DEEP && p->keys >= TALL && p->values >= TALL;
  p->rows = round_up(ceil_div(p->queries, ceil_div(p->queries, p->maps ? ROWS : most_rows)), p->maps ? WIDE : TALL);
  num blocks = max(alone ? 1 : 4 * p->threads, PIECE / p->rows);
  p->piece = p->rows * min(blocks, ceil_div(p->queries, p->rows));
  heads h = {p, {count, 0, false}, alone ? 1 : p->threads, backward};
  if (alone && p->threads > 1)
    GOMP_parallel(some_heads, &h, (unsigned)p->threads, 0);
  else
    some_heads(&h);
  return h.steps.failed;
}

// sizes: samples, heads, queries, keys, width, values. strides: 4 of each array, in the order of arguments.
static int attend_to(const num *sizes, const num *strides, const void *const *arrays, double scale, num threads,
                     bool backward) {
  problem p = {.samples = sizes[0], .heads = sizes[1], .queries = sizes[2], .keys = sizes[3],
               .width = sizes[4], .values = sizes[5], .scale = (real)scale, .threads = threads};
  array *places[] = {&p.query, &p.key, &p.value, &p.weights, &p.mask, &p.out, &p.d_query, &p.d_key, &p.d_value};
  for (num i = 0; i < (backward ? 9 : 6); i++, strides += 4)
    *places[i] = (array){arrays[i], strides[0], strides[1], strides[2], strides[3]};
  return attend(&p, backward);
}

PUBLIC int NAME(attention_forward)(const num *sizes, const num *strides, const real *query, const real *key,
                                   const real *value, const real *weights, const uint8_t *mask, real *out,
                                   double scale, num threads) {
  const void *arrays[] = {query, key, value, weights, mask, out};
  return attend_to(sizes, strides, arrays, scale, threads, false);
}

PUBLIC int NAME(attention_backward)(const num *sizes, const num *strides, const real *query, const real *key,
                                    const real *value, const real *weights, const uint8_t *mask, const real *gradient,
                                    real *d_query, real *d_key, real *d_value, double scale, num threads) {
  const void *arrays[] = {query, key, value, weights, mask, gradient, d_query, d_key, d_value};
  return attend_to(sizes, strides, arrays, scale, threads, true);
}
