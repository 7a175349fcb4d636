// Products of two large matrices of any layout: panels of b and, where it has to be turned, blocks of a are packed.
#include "tiles.h"

#define ROWS 96      // of a at one time: with so many columns of b in the second cache
#define COLUMNS 256
#define LINE (DEEP + WIDE)  // numbers from a row of a packed block to the next

typedef struct {
  num rows, columns, deep;
  matrix a, b, out;  // rows of the output lie in one piece
  matrix bias;  // NULL where there is none
  bool add;
  num tall, wide;  // of a step
  loop steps;
} product;

// A tile of the output, whole or not.
static void part(matrix out, num rows, num columns, const real *a, num a_row, const real *b, num deep, bool add) {
  if (rows >= TALL && columns >= WIDE) {
    tile(out.at, out.row, a, a_row, 1, b, WIDE, deep, add);
    return;
  }
  real whole[TALL * WIDE];
  tile(whole, WIDE, a, a_row, 1, b, WIDE, deep, false);
  for (num i = 0; i < min(rows, TALL); i++)
    for (num j = 0; j < min(columns, WIDE); j++) {
      real *to = out.at + i * out.row + j;
      *to = add ? *to + whole[i * WIDE + j] : whole[i * WIDE + j];
    }
}

static void rows_of(const product *p, num row, num rows, num column, num columns, num k, num deep, const real *panels,
                    real *packed) {
  matrix a = part_of(p->a, row, k);
  num tall = a.column == 1 ? rows - rows % TALL : 0;  // rows that are read as they lie
  if (tall < rows) pack_rows(packed, LINE, part_of(a, tall, 0), rows - tall, deep, 1);
  for (num j = 0; j < columns; j += WIDE)
    for (num i = 0; i < rows; i += TALL) {
      bool lying = i < tall;
      const real *from = lying ? a.at + i * a.row : packed + (i - tall) * LINE;
      part(part_of(p->out, row + i, column + j), rows - i, columns - j, from, lying ? a.row : LINE, panels + j * deep,
           deep, p->add || k > 0);
    }
  if (p->bias.at == NULL || k + deep < p->deep) return;
  matrix to = part_of(p->out, row, column), from = part_of(p->bias, row, column);
  for (num i = 0; i < rows; i++)
    for (num j = 0; j < columns; j++) to.at[i * to.row + j] += from.at[i * from.row + j * from.column];
}

static void block(const product *p, num row, num rows, num column, num columns, real *panels, real *packed) {
  num step = ceil_div(p->deep, ceil_div(p->deep, DEEP));
  for (num k = 0; k < p->deep; k += step) {
    num deep = min(step, p->deep - k);
    matrix b = part_of(p->b, k, column);
    if (b.column == 1)
      pack_wide(panels, deep * WIDE, b, deep, columns);
    else
      for (num j = 0; j < columns; j += WIDE) pack(panels + j * deep, flipped(part_of(b, 0, j)), columns - j, deep);
    for (num i = 0; i < rows; i += ROWS)
      rows_of(p, row + i, min(ROWS, rows - i), column, columns, k, deep, panels, packed);
  }
}

static void work(void *data) {
  product *p = data;
  num across = ceil_div(p->columns, p->wide);
  real *panels = allocate(DEEP * COLUMNS), *packed = allocate(ROWS * LINE);
  if (panels == NULL || packed == NULL) {
    __atomic_store_n(&p->steps.failed, true, __ATOMIC_RELAXED);
  } else {
    for (num step; (step = next_step(&p->steps)) < p->steps.count;) {
      num row = step / across * p->tall, start = step % across * p->wide;
      for (num j = start; j < min(start + p->wide, p->columns); j += COLUMNS)
        block(p, row, min(p->tall, p->rows - row), j, min(min(start + p->wide, p->columns) - j, COLUMNS), panels,
              packed);
    }
  }
  release(panels);
  release(packed);
}

// out (rows, columns) (+)= a b + bias. strides: of a, b, out and bias, of rows and of columns.
PUBLIC int NAME(multiply_matrices)(num rows, num columns, num deep, const real *a, const real *b, const real *bias,
                                   real *out, const num *strides, num add, num threads) {
  product p = {rows, columns, deep, {(real *)a, strides[0], strides[1]}, {(real *)b, strides[2], strides[3]},
               {out, strides[4], strides[5]}, {(real *)bias, strides[6], strides[7]}, add, rows, columns, {0}};
  // Threads share the longer side, so that little is packed twice.
  if (rows > columns)
    p.tall = round_up(ceil_div(rows, threads), TALL);
  else
    p.wide = round_up(ceil_div(columns, threads), WIDE);
  p.steps.count = ceil_div(rows, p.tall) * ceil_div(columns, p.wide);
  GOMP_parallel(work, &p, (unsigned)min(threads, p.steps.count), 0);
  return p.steps.failed;
}
