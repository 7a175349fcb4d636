// Matrix products with one short side, as the memories of external attention make them, with what is done to them in
// the end (large ones without that are in matrices.c):
//
//   out[i] = a[i] b[i] (+ addend[i] + bias[:, None], and relu), or their sum over i.
//
// A block of b is packed once, so that a tile of 4 rows and up to 3 vectors of columns reads it in one stream; a is
// read as it lies, one number at a time. Sums over the depth are made of parts of DEPTH terms.
#include "common.h"

enum { TALL = 4, WIDE = 3, DEPTH = 256, ROWS = 64, WIDTH = 4 * WIDE * LANES, AHEAD = 8, LINE = 64 / sizeof(real) };

typedef struct {
  num count, rows, columns, depth;
  const real *a;
  num a_next, a_row;
  const real *b;
  num b_next, b_row;
  bool b_turned;  // b[i] is given as (columns, depth)
  real *out;
  const real *addend, *bias;
  bool relu, adds, symmetric;  // adds: to what the output holds; symmetric: half of the output follows from the other
  num parts, chunks, blocks, width;  // parts of all chunks of the depth, each with an output; blocks of columns
  loop steps;
} product;

// What a tile of the output becomes of its sums; `first`: nothing has been added up yet.
typedef struct {
  real *out;
  const real *addend, *bias;
  num row;  // from one row of the output to the next
  bool first, relu;
  const real *coming;  // where in b the columns of a panel are that is packed next, or NULL
  num coming_row;
} target;

INLINE num vectors(num left) { return left == WIDE + 1 ? 2 : min(left, WIDE); }  // one alone would leave units idle

// Panels of up to WIDE vectors, each (depth, width of the panel), filled up with zeros.
static void pack(real *to, const real *b, num row, num depth, num columns) {
  for (num k = 0; k < depth; k++, b += row) {
    real *panel = to + k * WIDE * LANES;
    for (num i = 0; i < columns + LINE; i += LINE) __builtin_prefetch(b + AHEAD * row + min(i, columns - 1));
    num left = columns;
    for (; left > (WIDE + 1) * LANES; left -= WIDE * LANES, panel += depth * WIDE * LANES)
      UNROLL for (int v = 0; v < WIDE; v++) store(panel + v * LANES, load(b + columns - left + v * LANES));
    panel -= k * WIDE * LANES;
    while (left > 0) {
      num wide = vectors(ceil_div(left, LANES));
      for (num v = 0; v < wide; v++)
        store(panel + (k * wide + v) * LANES, load_some(b + columns - left + v * LANES, left - v * LANES));
      panel += depth * wide * LANES;
      left -= wide * LANES;
    }
  }
}

static void pack_turned(real *to, const real *b, num row, num depth, num columns) {
  for (num left = columns; left > 0;) {
    num wide = vectors(ceil_div(left, LANES));
    for (num v = 0; v < wide; v++) {
      num have = min(LANES, left - v * LANES);
      for (num k = 0; k < depth; k += LANES) {
        vec x[LANES];
        UNROLL for (int j = 0; j < LANES; j++)
          x[j] = j < have ? load_some(b + (v * LANES + j) * row + k, depth - k) : broadcast(0);
        transpose(x);
        UNROLL for (int j = 0; j < LANES; j++) if (k + j < depth) store(to + ((k + j) * wide + v) * LANES, x[j]);
      }
    }
    to += depth * wide * LANES;
    b += wide * LANES * row;
    left -= wide * LANES;
  }
}

// A tile of `rows` by `columns`, both constants where it is a whole one.
INLINE void tile(const int wide, const real *a, num a_row, const real *panel, num depth, const target *t,
                 const num rows, const num columns) {
  vec sums[TALL * WIDE];
  UNROLL for (int i = 0; i < TALL * WIDE; i++) sums[i] = broadcast(0);
  const real *lines[TALL];  // of rows that are not there: the last one again
  UNROLL for (int r = 0; r < TALL; r++) lines[r] = a + min(r, rows - 1) * a_row;
  num ahead = t->addend ? TALL : 0;  // two maps are waited for longer
  UNROLL for (int r = 0; r < TALL; r++) {
    num at = (min(r, rows - 1) + ahead) * t->row;
    UNROLL for (int i = 0; i <= wide; i++) {  // a line may end anywhere
      __builtin_prefetch(t->out + at + min(i * LANES, wide * LANES - 1), 1);
      if (t->addend) __builtin_prefetch(t->addend + at + min(i * LANES, wide * LANES - 1));
    }
  }
  const real *coming = t->coming;
  for (num k = 0; k < depth;) {
    if (coming) {
      __builtin_prefetch(coming, 0, 2);
      __builtin_prefetch(coming + LINE, 0, 2);
      coming += t->coming_row;
    }
    UNROLL for (int r = 0; r < TALL; r++) __builtin_prefetch(lines[r] + TALL * a_row + k);
    for (num stop = min(k + LINE, depth); k < stop; k++) {
      vec b[WIDE];
      UNROLL for (int v = 0; v < wide; v++) b[v] = load(panel + (k * wide + v) * LANES);
      UNROLL for (int r = 0; r < TALL; r++) {
        vec x = broadcast(lines[r][k]);
        UNROLL for (int v = 0; v < wide; v++) sums[r * WIDE + v] += x * b[v];
      }
    }
  }
  // Every pass over the tile is one of constant bounds, so that the sums stay in registers.
#define EACH(change)                                                                         \
  UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int v = 0; v < wide; v++) {              \
    vec *x = &sums[r * WIDE + v];                                                            \
    if (r < rows) change;                                                                    \
  }
  num row = t->row;
  if (!t->first) EACH(*x += load_some(t->out + r * row + v * LANES, columns - v * LANES))
  if (t->bias) EACH(*x += broadcast(t->bias[r]))
  if (t->addend) EACH(*x += load_some(t->addend + r * row + v * LANES, columns - v * LANES))
  if (t->relu) EACH(*x = positive(*x))
  EACH(store_some(t->out + r * row + v * LANES, *x, columns - v * LANES))
#undef EACH
}

static void tiles(num wide, const real *a, num a_row, const real *panel, num depth, target t, num rows, num columns) {
  for (; rows > 0; rows -= TALL, a += TALL * a_row) {
    num tall = min(TALL, rows);
    bool whole = tall == TALL && columns >= wide * LANES;
    if (whole && wide == 3) tile(3, a, a_row, panel, depth, &t, TALL, 3 * LANES);
    else if (whole && wide == 2) tile(2, a, a_row, panel, depth, &t, TALL, 2 * LANES);
    else if (wide == 3) tile(3, a, a_row, panel, depth, &t, tall, columns);
    else if (wide == 2) tile(2, a, a_row, panel, depth, &t, tall, columns);
    else tile(1, a, a_row, panel, depth, &t, tall, columns);
    t.out += TALL * t.row;
    if (t.addend) t.addend += TALL * t.row;
    if (t.bias) t.bias += TALL;
    if (t.coming) t.coming += ceil_div(depth, LINE) * t.coming_row;
  }
}

// The columns of b from `start` on, in a chunk of the depth.
static const real *piece(const product *p, num chunk, num start) {
  num per = ceil_div(p->depth, DEPTH);
  return p->b + chunk / per * p->b_next + chunk % per * DEPTH * p->b_row + start;
}

// Where a step begins.
static void place(const product *p, num step, num *part, num *start, num *chunk) {
  *part = step / p->blocks;
  *start = (p->blocks - 1 - step % p->blocks) * p->width;  // the longest first
  *chunk = *part * p->chunks / p->parts;
}

// `next`: what is packed after this block, or NULL. The first tiles fetch what comes, a row with each line of the
// depth, as packing would otherwise wait for memory a quarter of the time; short sums leave no time for it.
static void block(const product *p, num part, num start, num from, const real *next, real *packed) {
  num columns = min(p->width, p->columns - start), per = ceil_div(p->depth, DEPTH);
  num rows = p->symmetric ? start + columns : p->rows;
  num to = (part + 1) * p->chunks / p->parts;
  for (num chunk = from; chunk < to; chunk++) {
    num item = chunk / per, k = chunk % per * DEPTH, depth = min(DEPTH, p->depth - k);
    const real *a = p->a + item * p->a_next + k, *b = p->b + item * p->b_next;
    if (p->b_turned) pack_turned(packed, b + start * p->b_row + k, p->b_row, depth, columns);
    else pack(packed, piece(p, chunk, start), p->b_row, depth, columns);
    const real *coming = chunk + 1 < to ? piece(p, chunk + 1, start) : next;
    if (p->b_turned || depth < DEPTH / 2) coming = NULL;
    for (num i = 0; i < rows; i += ROWS) {
      num at = (part * p->rows + i) * p->columns + start;
      const real *panel = packed;
      for (num left = columns; left > 0;) {
        num wide = vectors(ceil_div(left, LANES)), here = at + columns - left;
        target t = {p->out + here, NULL, NULL, p->columns, chunk == from && !p->adds, false, NULL, p->b_row};
        if (coming && i == 0) t.coming = coming + columns - left;
        if (chunk == to - 1) {
          t.addend = p->addend ? p->addend + here : NULL;
          t.bias = p->bias ? p->bias + i : NULL;
          t.relu = p->relu;
        }
        tiles(wide, a + i * p->a_row, p->a_row, panel, depth, t, min(ROWS, rows - i), left);
        panel += depth * wide * LANES;
        left -= wide * LANES;
      }
    }
  }
  real *out = p->out + part * p->rows * p->columns;
  if (p->symmetric)
    for (num j = start; j < start + columns; j++)
      for (num i = 0; i < start; i++) out[j * p->columns + i] = out[i * p->columns + j];
}

static void work(void *data) {
  product *p = data;
  real *packed = allocate(min(DEPTH, p->depth) * (p->width + LANES));
  if (packed == NULL) __atomic_store_n(&p->steps.failed, true, __ATOMIC_RELAXED);
  else
    for (num step = next_step(&p->steps), following; step < p->steps.count; step = following) {
      num part, start, chunk, other, coming_start, coming_chunk;
      following = next_step(&p->steps);
      place(p, step, &part, &start, &chunk);
      place(p, following, &other, &coming_start, &coming_chunk);
      const real *next = following < p->steps.count ? piece(p, coming_chunk, coming_start) : NULL;
      block(p, part, start, chunk, next, packed);
    }
  release(packed);
}

static bool run(product *p, num threads) {
  p->chunks = p->count * ceil_div(p->depth, DEPTH);
  num wanted = min(ceil_div(2 * threads, p->parts), ceil_div(p->columns, WIDE * LANES));
  p->blocks = max(wanted, ceil_div(p->columns, WIDTH));
  p->width = ceil_div(ceil_div(p->columns, p->blocks), LANES) * LANES;
  p->blocks = ceil_div(p->columns, p->width);
  p->steps = (loop){.count = p->parts * p->blocks};
  GOMP_parallel(work, p, (unsigned)min(threads, p->steps.count), 0);
  return p->steps.failed;
}

// out (count, rows, columns) = a (count, rows, depth) b (count, depth, columns) + addend + bias; addend may be out.
PUBLIC int NAME(product_each)(num count, num rows, num columns, num depth, const real *a, num a_next, num a_row,
                        const real *b, num b_next, num b_row, num b_turned, real *out, const real *addend,
                        const real *bias, num relu, num symmetric, num threads) {
  product p = {count, rows, columns, depth, a, a_next, a_row, b, b_next, b_row, b_turned,
               out, addend == out ? NULL : addend, bias, relu, addend == out, symmetric, .parts = count};
  return run(&p, threads);
}

// out (rows, columns) = sum over i of a[i] b[i], made of as many parts as keep all threads at work.
PUBLIC int NAME(product_sum)(num count, num rows, num columns, num depth, const real *a, num a_next, num a_row,
                       const real *b, num b_next, num b_row, num b_turned, real *out, num threads) {
  product p = {count, rows, columns, depth, a, a_next, a_row, b, b_next, b_row, b_turned,
               .parts = min(2 * threads, count * ceil_div(depth, DEPTH))};
  num size = rows * columns;
  p.out = allocate(p.parts * size);
  if (p.out == NULL) return 1;
  bool failed = run(&p, threads);
  for (num i = 0; i < size && !failed; i++) {
    real sum = p.out[i];
    for (num part = 1; part < p.parts; part++) sum += p.out[part * size + i];
    out[i] = sum;
  }
  release(p.out);
  return failed;
}
