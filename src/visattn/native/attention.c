// Softmax attention and its gradients. Scores exist for a block of queries and of keys at a time, in a core's cache: a
// row's maximum and sum are carried from one block of keys to the next.
//
// Names: a score belongs to a query (its row) and a key. `width` numbers make a query or key, `values` a value.

#include "common.h"
#include "softmax.h"
#include "tiles.h"

#define KEYS 240  // of a block: whole tiles and panels, and no more than a tile sums up at one time
#define ROWS 104  // of a block at most

typedef struct {
  const void *at;  // NULL where there is none
  num sample, head, row, column;
} array;

typedef struct {
  num samples, heads, queries, keys, width, values;
  array query, key, value, weights, mask, out;  // `out` is the gradient of the result in the backward pass
  array d_query, d_key, d_value;
  real scale, share;  // of scores; of exponentials, so that sums of values never exceed the largest value
  num threads;
  num key_panels, key_blocks, block, line;  // panels and blocks of keys; keys of a block; between rows of scores
  num value_line, width_line;               // the same of rows of values, of queries
  num value_wide, width_wide;               // their length in whole panels
  num rows, piece;                          // of a block; of the blocks that are at hand at one time
  bool maps;                                // keys and values lie as channels of positions, and are read so
} problem;

INLINE matrix head_of(array x, num sample, num head, num row) {
  return (matrix){(real *)x.at + sample * x.sample + head * x.head + row * x.row, x.row, x.column};
}

// What is known of 16 queries whose scores lie side by side.
typedef struct {
  vec top[2], sum[2];
} columns;

// Scores of some keys become exponentials relative to the largest so far. Returns by what earlier ones are too large.
static void raise_columns(real *scores, num keys, real share, columns *of, vec *factor) {
  vec shift[2], part[2] = {broadcast(0), broadcast(0)};
  UNROLL for (int j = 0; j < 2; j++) factor[j] = of->top[j];
  for (num key = 0; key < keys; key++)
    UNROLL for (int j = 0; j < 2; j++) of->top[j] = larger(load(scores + key * WIDE + j * LANES), of->top[j]);
  UNROLL for (int j = 0; j < 2; j++) {
    shift[j] = choose(of->top[j] == broadcast(-INFINITY), broadcast(0), of->top[j]);
    factor[j] -= shift[j];
  }
  exponentials(factor, 2);
  for (num key = 0; key < keys; key++) {
    vec x[2] = {load(scores + key * WIDE) - shift[0], load(scores + key * WIDE + LANES) - shift[1]};
    exponentials(x, 2);
    UNROLL for (int j = 0; j < 2; j++) {
      x[j] *= share;
      store(scores + key * WIDE + j * LANES, x[j]);
      part[j] += x[j];
    }
  }
  UNROLL for (int j = 0; j < 2; j++) of->sum[j] = of->sum[j] * factor[j] + part[j];
}

// Numbers of 16 queries in each line are multiplied, if that changes them.
static void scale_columns(real *out, num line, num lines, const vec *factor) {
  ivec changes = (factor[0] != broadcast(1)) | (factor[1] != broadcast(1));
  bool any = false;
  for (int j = 0; j < LANES; j++) any |= changes[j] != 0;
  for (num i = 0; i < lines && any; i++)
    UNROLL for (int j = 0; j < 2; j++)
      store(out + i * line + j * LANES, load(out + i * line + j * LANES) * factor[j]);
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
  real *d_keys, *d_values;      // rows
  real *scores, *gradients;     // of a block for each thread forward; of blocks of keys, with a piece's rows, backward
  real *factors;                // of each of those rows in each block, what makes exponentials probabilities
  real *means;                  // of each of those rows, of the gradients of its probabilities
  real *queries, *outs, *rest;  // of those rows: queries, gradients of results, results or gradients of queries
  num first;                    // row of the piece
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

static adjustment adjustment_of(const work *w, num row, num key) {
  array weights = w->p->weights, mask = w->p->mask;
  num seen = w->sample * mask.sample + w->head * mask.head + row * mask.row + key * mask.column;
  return (adjustment){
      .weights = weights.at == NULL ? NULL : head_of(weights, w->sample, w->head, row).at + key * weights.column,
      .weight_step = weights.column,
      .mask = mask.at == NULL ? NULL : (const uint8_t *)mask.at + seen,
      .mask_step = mask.column,
  };
}

// Where packed rows of width or values are: block after block of keys, so that a block's panels are side by side.
INLINE real *in_block(const problem *p, real *packed, num key, num columns) {
  num from = key / p->block * p->block;
  return packed + from * columns + (key - from) * WIDE;
}

// From a panel of such a block to the next.
INLINE num block_panel(const problem *p, num key) {
  return min(p->block, p->keys - key / p->block * p->block) * WIDE;
}

// Keys and values of a panel, while those of the next one are on their way.
INLINE void pack_panel(work *w, num panel, const bool backward) {
  const problem *p = w->p;
  num key = panel * WIDE, keys = min(WIDE, p->keys - key), next = min(WIDE, p->keys - key - keys);
  matrix of_keys = head_of(p->key, w->sample, w->head, key), of_values = head_of(p->value, w->sample, w->head, key);
  foresee(part_of(of_keys, keys, 0), next, p->width);
  foresee(part_of(of_values, keys, 0), next, p->values);
  pack(w->keys_deep + key * p->width, of_keys, keys, p->width);
  if (backward) {
    pack_wide(in_block(p, w->keys_wide, key, p->width_wide), block_panel(p, key), of_keys, keys, p->width);
    pack(w->values + key * p->values, of_values, keys, p->values);
  } else {
    pack_wide(in_block(p, w->values, key, p->value_wide), block_panel(p, key), of_values, keys, p->values);
  }
}

static void pack_forward(work *w, num slot, num panel) {
  (void)slot;
  pack_panel(w, panel, false);
}

static void pack_backward(work *w, num slot, num panel) {
  (void)slot;
  pack_panel(w, panel, true);
}

// Scores of some rows and keys, weighed and masked, become exponentials relative to the largest of their row. `top` is
// at least that already, and what it is in the end; `sum` is of these keys; `any` tells rows that have a key.
static void exponentials_of(const work *w, real *scores, const real *queries, num row, num rows, num key, real *top,
                            real *sum, bool *any) {
  const problem *p = w->p;
  num keys = min(p->block, p->keys - key), line = p->line;
  multiply(scores, line, queries, p->width_line, w->keys_deep + key * p->width, p->width * WIDE,
           round_up(rows, TALL), keys, p->width, false);
  for (num i = 0; i < rows; i++) {
    adjustment by = adjustment_of(w, row + i, key);
    if (by.weights != NULL) weigh(scores + i * line, keys, by.weights, by.weight_step);
    if (by.mask == NULL || hide(scores + i * line, keys, by.mask, by.mask_step)) any[i] = true;
    top[i] = largest(scores + i * line, keys, top[i]);
  }
  for (num i = 0; i < rows; i++) sum[i] = raise(scores + i * line, keys, top[i], p->share);
}

static void forward_rows(work *w, num slot, num index) {
  const problem *p = w->p;
  num row = index * p->rows, rows = min(p->rows, p->queries - row), out_line = p->value_wide;
  real *queries = w->queries + slot * p->rows * p->width_line, *scores = w->scores + slot * p->rows * p->line;
  real *out = w->rest + slot * p->rows * out_line;
  real top[ROWS], sum[ROWS];
  bool any[ROWS] = {false};
  for (num i = 0; i < rows; i++) top[i] = -INFINITY;
  foresee(head_of(p->query, w->sample, w->head, row), rows, p->width);
  pack_rows(queries, p->width_line, head_of(p->query, w->sample, w->head, row), rows, p->width, p->scale);
  for (num key = 0; key < p->keys; key += p->block) {
    real before[ROWS], more[ROWS];
    memcpy(before, top, sizeof top);
    exponentials_of(w, scores, queries, row, rows, key, top, more, any);
    for (num i = 0; i < rows; i++) {
      if (key > 0 && top[i] > before[i]) {
        real factor = exponential(before[i] - top[i]);
        sum[i] *= factor;
        scale_by(out + i * out_line, out_line, factor);
      }
      sum[i] = key > 0 ? sum[i] + more[i] : more[i];
    }
    multiply(out, out_line, scores, p->line, in_block(p, w->values, key, p->value_wide), block_panel(p, key),
             round_up(rows, TALL), p->values, min(p->block, p->keys - key), key > 0);
  }
  foresee(head_of(p->out, w->sample, w->head, row), rows, p->values);
  for (num i = 0; i < rows; i++) scale_by(out + i * out_line, out_line, any[i] ? 1 / sum[i] : 0);
  copy(head_of(p->out, w->sample, w->head, row), (matrix){out, out_line, 1}, rows, p->values, 1);
}

// Keys of a block that lie as a map, six side by side: zeros behind the last.
static void pack_columns(work *w, num slot, num index) {
  (void)slot;
  const problem *p = w->p;
  num from = index * p->block, keys = min(p->block, p->keys - from);
  for (num i = 0; i < p->width; i++) {
    const real *x = head_of(p->key, w->sample, w->head, from).at + i * p->key.column;
    real *to = w->keys_deep + from * p->width + i * TALL;
    for (num key = 0; key < keys; key += TALL, to += TALL * p->width)
      for (num j = 0; j < TALL; j++) to[j] = key + j < keys ? x[key + j] : 0;
  }
}

// The same for keys and values that are maps: scores of 16 queries side by side, a line for each key, so that values
// are not packed and the output comes out as a map too. The last tile of channels begins early.
static void forward_columns(work *w, num slot, num index) {
  const problem *p = w->p;
  num row = index * p->rows, rows = min(p->rows, p->queries - row), panels = ceil_div(rows, WIDE);
  num line = p->rows, lines = round_up(p->values, TALL), last = lines - TALL;
  real *queries = w->queries + slot * p->rows * p->width, *scores = w->scores + slot * p->rows * p->block;
  real *out = w->rest + slot * p->rows * lines;
  matrix values = flipped(head_of(p->value, w->sample, w->head, 0));
  columns of[ROWS / WIDE];
  for (num panel = 0; panel < panels; panel++) {
    UNROLL for (int j = 0; j < 2; j++) {
      of[panel].top[j] = broadcast(-INFINITY);
      of[panel].sum[j] = broadcast(0);
    }
    real *q = queries + panel * WIDE * p->width;
    num some = min(WIDE, rows - panel * WIDE);
    if (some < WIDE) memset(q, 0, sizeof(real) * (size_t)(WIDE * p->width));
    copy((matrix){q, 1, WIDE}, head_of(p->query, w->sample, w->head, row + panel * WIDE), some, p->width, p->scale);
  }
  for (num from = 0; from < p->keys; from += p->block) {
    num keys = min(p->block, p->keys - from);
    for (num panel = 0; panel < panels; panel++) {
      real *s = scores + panel * WIDE * p->block;
      for (num key = 0; key < keys; key += TALL)
        tile(s + key * WIDE, WIDE, w->keys_deep + (from + key) * p->width, 1, TALL, queries + panel * WIDE * p->width,
             WIDE, p->width, false);
      vec factor[2];
      raise_columns(s, keys, p->share, of + panel, factor);
      if (from > 0) scale_columns(out + panel * WIDE, line, lines, factor);
    }
    for (num group = 0; group < lines; group += FEW)
      for (num panel = 0; panel < panels; panel++)
        for (num t = group; t < min(lines, group + FEW); t += TALL) {
          matrix x = part_of(values, t < last ? t : p->values - TALL, from);
          if (panel == 0 && t + TALL < last) foresee(part_of(x, TALL, 0), TALL, keys);
          tile(out + t * line + panel * WIDE, line, x.at, x.row, 1, scores + panel * WIDE * p->block, WIDE, keys,
               from > 0);
        }
  }
  for (num panel = 0; panel < panels; panel++) {
    UNROLL for (int j = 0; j < 2; j++) of[panel].sum[j] = broadcast(1) / of[panel].sum[j];
    scale_columns(out + panel * WIDE, line, lines, of[panel].sum);
  }
  matrix to = head_of(p->out, w->sample, w->head, row);
  copy(to, (matrix){out, 1, line}, rows, last, 1);
  copy(part_of(to, 0, p->values - TALL), (matrix){out + last * line, 1, line}, rows, TALL, 1);
}

// Exponentials of some rows and gradients of their probabilities, block after block of keys.
static void backward_rows(work *w, num slot, num index) {
  (void)slot;
  const problem *p = w->p;
  num inside = index * p->rows, row = w->first + inside, rows = min(p->rows, p->queries - row);
  real *queries = w->queries + inside * p->width_line, *outs = w->outs + inside * p->value_line;
  foresee(head_of(p->query, w->sample, w->head, row), rows, p->width);
  foresee(head_of(p->out, w->sample, w->head, row), rows, p->values);
  pack_rows(queries, p->width_line, head_of(p->query, w->sample, w->head, row), rows, p->width, p->scale);
  pack_rows(outs, p->value_line, head_of(p->out, w->sample, w->head, row), rows, p->values, 1);
  real high[ROWS], total[ROWS], mean[ROWS];
  bool any[ROWS] = {false};
  for (num i = 0; i < rows; i++) high[i] = -INFINITY, total[i] = mean[i] = 0;
  for (num b = 0; b < p->key_blocks; b++) {
    num key = b * p->block, keys = min(p->block, p->keys - key), at = (b * p->piece + inside) * p->line;
    real *scores = w->scores + at, *gradients = w->gradients + at, *top = w->factors + b * p->piece + inside;
    real sum[ROWS];
    for (num i = 0; i < rows; i++) top[i] = -INFINITY;
    exponentials_of(w, scores, queries, row, rows, key, top, sum, any);
    multiply(gradients, p->line, outs, p->value_line, w->values + key * p->values, p->values * WIDE,
             round_up(rows, TALL), keys, p->values, false);
    for (num i = 0; i < rows; i++) {
      real most = top[i] > high[i] ? top[i] : high[i];
      real old = most > high[i] ? exponential(high[i] - most) : 1, new = most > top[i] ? exponential(top[i] - most) : 1;
      high[i] = most;
      total[i] = total[i] * old + sum[i] * new;
      mean[i] = mean[i] * old + dot(scores + i * p->line, gradients + i * p->line, keys) * new;
    }
  }
  for (num i = 0; i < rows; i++) {
    w->means[inside + i] = any[i] ? mean[i] / total[i] : 0;
    for (num b = 0; b < p->key_blocks; b++) {
      real *top = w->factors + b * p->piece + inside + i;
      *top = any[i] ? (*top < high[i] ? exponential(*top - high[i]) : 1) / total[i] : 0;
    }
  }
}

// Exponentials of a block of keys become probabilities, and the gradients of these those of scores.
static void finish(const work *w, num b) {
  const problem *p = w->p;
  num key = b * p->block, keys = min(p->block, p->keys - key), rows = min(p->piece, p->queries - w->first);
  for (num row = 0; row < rows; row++) {
    real *x = w->scores + (b * p->piece + row) * p->line, *gradient = w->gradients + (b * p->piece + row) * p->line;
    vec factor = broadcast(w->factors[b * p->piece + row]), mean = broadcast(w->means[row]);
    for (num i = 0; i < round_up(keys, LANES); i += LANES) {
      vec probability = load(x + i) * factor;
      store(x + i, probability);
      store(gradient + i, probability * (load(gradient + i) - mean));
    }
    adjustment by = adjustment_of(w, w->first + row, key);
    if (by.weights != NULL) weigh(gradient, keys, by.weights, by.weight_step);
  }
}

static void d_queries_of(const work *w, num b, num row, num rows) {
  const problem *p = w->p;
  num key = b * p->block, keys = min(p->block, p->keys - key), line = p->width_wide;
  multiply(w->rest + row * line, line, w->gradients + (b * p->piece + row) * p->line, p->line,
           in_block(p, w->keys_wide, key, p->width_wide), block_panel(p, key), round_up(rows, TALL), p->width, keys,
           b > 0);
}

static void copy_d_queries(const work *w, num row, num rows) {
  const problem *p = w->p;
  matrix from = {w->rest + row * p->width_wide, p->width_wide, 1};
  copy(head_of(p->d_query, w->sample, w->head, w->first + row), from, rows, p->width, p->scale);
}

static void backward_queries(work *w, num slot, num index) {
  (void)slot;
  const problem *p = w->p;
  num row = index * p->rows, rows = min(p->rows, p->queries - w->first - row);
  for (num b = 0; b < p->key_blocks; b++) d_queries_of(w, b, row, rows);
  copy_d_queries(w, row, rows);
}

static void backward_keys(work *w, num slot, num b) {
  (void)slot;
  const problem *p = w->p;
  num key = b * p->block, keys = min(p->block, p->keys - key), rows = min(p->piece, p->queries - w->first);
  bool add = w->first > 0, last = w->first + rows == p->queries;
  matrix d_keys = {w->d_keys + key * p->width_wide, p->width_wide, 1};
  matrix d_values = {w->d_values + key * p->value_wide, p->value_wide, 1};
  finish(w, b);
  num at = b * p->piece * p->line;
  if (w->threads == 1) d_queries_of(w, b, 0, rows);
  multiply_transposed(d_values.at, d_values.row, w->scores + at, p->line, w->outs, p->value_line, rows, keys,
                      p->values, add);
  multiply_transposed(d_keys.at, d_keys.row, w->gradients + at, p->line, w->queries, p->width_line, rows, keys,
                      p->width, add);
  if (!last) return;
  copy(head_of(p->d_value, w->sample, w->head, key), d_values, keys, p->values, 1);
  copy(head_of(p->d_key, w->sample, w->head, key), d_keys, keys, p->width, 1);
}

static void forward_head(work *w) {
  const problem *p = w->p;
  if (p->maps) {
    run(w, pack_columns, p->key_blocks);
    run(w, forward_columns, ceil_div(p->queries, p->rows));
    return;
  }
  run(w, pack_forward, p->key_panels);
  run(w, forward_rows, ceil_div(p->queries, p->rows));
}

static void backward_head(work *w) {
  const problem *p = w->p;
  run(w, pack_backward, p->key_panels);
  for (w->first = 0; w->first < p->queries; w->first += p->piece) {
    num rows = min(p->piece, p->queries - w->first), blocks = ceil_div(rows, p->rows);
    run(w, backward_rows, blocks);
    run(w, backward_keys, p->key_blocks);
    if (w->threads > 1)
      run(w, backward_queries, blocks);
    else
      copy_d_queries(w, 0, rows);
  }
}

static bool prepare(work *w, const problem *p, num threads, bool backward) {
  num keys = p->key_panels * WIDE, rows = backward ? p->piece : threads * p->rows;
  num blocks = backward ? p->key_blocks : 1, d_keys = backward ? round_up(p->keys, TALL) : 0;
  num of_maps[] = {round_up(p->keys, TALL) * p->width, 0, 0, 0, 0, rows * p->block, 0, 0, 0, rows * p->width, 0,
                   rows * round_up(p->values, TALL)};
  num of_rows[] = {
      keys * p->width,
      backward ? p->keys * p->width_wide : 0,
      backward ? keys * p->values : p->keys * p->value_wide,
      d_keys * p->width_wide,
      d_keys * p->value_wide,
      blocks * rows * p->line,
      backward ? blocks * rows * p->line : 0,
      backward ? blocks * rows : 0,
      backward ? rows : 0,
      rows * p->width_line,
      backward ? rows * p->value_line : 0,
      rows * (backward ? p->width_wide : p->value_wide),
  };
  real **parts[] = {&w->keys_deep, &w->keys_wide, &w->values, &w->d_keys,  &w->d_values, &w->scores,
                    &w->gradients, &w->factors,   &w->means,  &w->queries, &w->outs,     &w->rest};
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
  p->share = 1;
  while (p->share * (real)p->keys > 1) p->share /= 2;  // a power of two: nothing is rounded
  num whole = TALL * WIDE / 2;  // of both tiles and panels
  p->key_panels = ceil_div(p->keys, WIDE);
  p->block = round_up(ceil_div(p->keys, ceil_div(p->keys, KEYS)), whole);
  p->key_blocks = ceil_div(p->keys, p->block);
  p->line = (p->block / WIDE | 1) * WIDE;  // an odd number of cache lines: rows do not compete for the same places
  p->width_wide = round_up(p->width, WIDE);
  p->value_wide = round_up(p->values, WIDE);
  p->width_line = (p->width_wide / WIDE | 1) * WIDE;
  p->value_line = (p->value_wide / WIDE | 1) * WIDE;
  num count = p->samples * p->heads;
  bool alone = count % p->threads == 0 || count >= 4 * p->threads;  // each thread has its own heads
  num most = alone ? ROWS : min(ROWS, ceil_div(p->queries, 2 * p->threads));
  p->maps = !backward && p->weights.at == NULL && p->mask.at == NULL && p->key.row == 1 && p->value.row == 1 &&
            p->width <= DEEP && p->values >= TALL;
  num step = p->maps ? WIDE : TALL;
  p->rows = round_up(ceil_div(p->queries, ceil_div(p->queries, max(step, most / step * step))), step);
  num blocks = alone ? 1 : p->threads;
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
