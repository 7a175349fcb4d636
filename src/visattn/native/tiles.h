// Copies of matrices, and products of them by tiles of 6 x 16 numbers in registers.
#pragma once

#include "common.h"

#define TALL 6            // rows of a tile
#define WIDE (2 * LANES)  // its columns, and those of a panel
#define DEEP 256          // of a product's sum at one time: such a part of a panel stays in the first cache
#define FEW 48            // rows of a product at one time whose sums are short
#define GROUP 32          // columns of a transposed product at one time

INLINE num round_up(num x, num step) { return ceil_div(x, step) * step; }

// A matrix in memory: where its first number is, and how far apart rows and columns are.
typedef struct {
  real *at;
  num row, column;
} matrix;

INLINE matrix flipped(matrix x) { return (matrix){x.at, x.column, x.row}; }
INLINE matrix part_of(matrix x, num row, num column) {
  return (matrix){x.at + row * x.row + column * x.column, x.row, x.column};
}

// Asks for a part of a matrix before it is copied: tokens of a head are far apart, which processors do not foresee.
static inline void foresee(matrix x, num rows, num columns) {
  if (x.column != 1) {
    x = flipped(x);
    num swap = rows;
    rows = columns;
    columns = swap;
  }
  if (x.column != 1) return;
  for (num row = 0; row < rows; row++)
    for (num i = 0; i < columns; i += 64 / (num)sizeof(real)) __builtin_prefetch(x.at + row * x.row + i);
}

// to = factor * from, of whatever layout.
static inline void copy(matrix to, matrix from, num rows, num columns, real factor) {
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
static inline void pack(real *panel, matrix from, num rows, num columns) {
  if (rows < WIDE) memset(panel, 0, sizeof(real) * (size_t)(WIDE * columns));
  copy((matrix){panel, 1, WIDE}, from, min(rows, WIDE), columns, 1);
}

// Up to 16 rows in panels of 16 columns, each `panel` numbers after the one before: zero where there are fewer columns.
static inline void pack_wide(real *to, num panel, matrix from, num rows, num columns) {
  num whole = from.column == 1 ? columns - columns % WIDE : 0;
  for (num row = 0; row < rows && whole > 0; row++) {
    const real *x = from.at + row * from.row;
    real *into = to + row * WIDE;
    for (num column = 0; column < whole; column += WIDE, into += panel) {
      store(into, load(x + column));
      store(into + LANES, load(x + column + LANES));
    }
  }
  to += whole / WIDE * panel;
  for (num column = whole; column < columns; column += WIDE, to += panel) {
    if (columns - column < WIDE) memset(to, 0, sizeof(real) * (size_t)(WIDE * rows));
    copy((matrix){to, WIDE, 1}, part_of(from, 0, column), rows, min(WIDE, columns - column), 1);
  }
}

// Rows one after the other, `line` numbers apart: up to whole tiles of zeros.
static inline void pack_rows(real *to, num line, matrix from, num rows, num columns, real factor) {
  for (num row = 0; row < rows; row++) memset(to + row * line + columns, 0, sizeof(real) * (size_t)((line - columns)));
  memset(to + rows * line, 0, sizeof(real) * (size_t)(line * (round_up(rows, TALL) - rows)));
  copy((matrix){to, line, 1}, from, rows, columns, factor);
}

// The sums of 6 x 16 numbers of a product.
INLINE void add_products(vec sum[TALL][2], const real *a, num a_row, num a_deep, const real *b, num b_deep, num deep) {
  for (num k = 0; k < deep; k++) {
    vec left = load(b + k * b_deep), right = load(b + k * b_deep + LANES);
    UNROLL for (int i = 0; i < TALL; i++) {
      vec x = broadcast(a[i * a_row + k * a_deep]);
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
}

// 6 x 16 numbers of c (+)= a b.
INLINE void tile(real *c, num c_row, const real *a, num a_row, num a_deep, const real *b, num b_deep, num deep,
                 bool add) {
  vec sum[TALL][2];
  UNROLL for (int i = 0; i < TALL; i++) {
    sum[i][0] = sum[i][1] = broadcast(0);
    __builtin_prefetch(c + i * c_row, 1);
  }
  add_products(sum, a, a_row, a_deep, b, b_deep, deep);
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

// c (+)= a b: rows of a one after the other, b in panels, each `panel` numbers after the one before. Short sums take so
// few rows of a at a time that these stay in the first cache, long ones a panel's part.
static inline void multiply(real *c, num c_row, const real *a, num a_row, const real *b, num panel, num rows,
                            num columns, num deep, bool add) {
  num step = ceil_div(deep, ceil_div(deep, DEEP)), some = step > DEEP / 2 ? rows : FEW;
  for (num from = 0; from < deep; from += step)
    for (num group = 0; group < rows; group += some)
      for (num column = 0; column < columns; column += WIDE)
        for (num row = group; row < min(rows, group + some); row += TALL)
          tile(c + row * c_row + column, c_row, a + row * a_row + from, a_row, 1,
               b + column / WIDE * panel + from * WIDE, WIDE, min(step, deep - from), add || from > 0);
}

// c (+)= a^T b: sums over so many rows of both.
static inline void multiply_transposed(real *c, num c_row, const real *a, num a_row, const real *b, num b_row,
                                       num rows, num tall, num columns, bool add) {
  num step = ceil_div(rows, ceil_div(rows, DEEP));
  for (num group = 0; group < columns; group += GROUP)
    for (num from = 0; from < rows; from += step)
      for (num row = 0; row < tall; row += TALL)
        for (num column = group; column < min(columns, group + GROUP); column += WIDE)
          tile(c + row * c_row + column, c_row, a + from * a_row + row, 1, a_row, b + from * b_row + column, b_row,
               min(step, rows - from), add || from > 0);
}
