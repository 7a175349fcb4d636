// Dense convolutions of small maps (one group, stride 1, an odd kernel, padded to keep the size) by Fourier transforms
// of tiles: TILE x TILE outputs see size x size inputs, size = TILE + kernel - 1, and a correlation is then one product
// for each frequency, of matrices of tiles, input and output channels.
//
// Positions count from the middle of a tile, frequencies and positions come in pairs p and -p, of which one is kept: a
// cosine transform of x(p) + x(-p) and a sine transform of x(p) - x(-p), both products with small matrices, hold the
// whole spectrum. With (a, b) of the inputs and (c, d) of the weights, what is wanted is ac + bd and bc - ad, by three
// products: P1 = (a + b) c, P2 = -a (c + d), P3 = b (c - d); ac + bd = P1 - P3 and bc - ad = P1 + P2.
#include "tiles.h"

#define TILE 7             // side of a tile of outputs
#define BLOCK (3 * WIDE)   // channels that lie together in spectra: whole tiles of products in either direction
#define LONG (6 * BLOCK)   // of a product's sum at one time
#define AREA (TILE * TILE)

// Cosines and sines of a set of positions at all frequencies, or the other way round: panels of 6 rows.
typedef struct {
  const real *cosines, *sines;
} waves;

typedef struct {
  num batch, in, out, height, width, kernel;
} sizes;

typedef struct {
  sizes s;
  num size, pairs;                    // of a tile of input: its side, and its pairs of positions or frequencies
  num down, across;                   // tiles of a map
  num first;                          // of the maps at hand
  num tiles, rows;                    // of these maps; the same with zeros up to a whole panel
  const real *x, *gradient, *weight;  // what there is
  num weight_out, weight_in;          // from a kernel of the weight to the next
  const real *scale, *shift;          // of outputs
  bool relu;
  real *y, *totals;                   // totals: what each map of outputs adds up to
  waves inputs, kernels, outputs;  // transforms: of inputs, of kernels; back
  waves gradients, back;           // of gradients as kernels; back to kernels
  real *spectra, *others;          // of inputs, of gradients: (3, pairs, blocks of channels, rows, BLOCK)
  loop steps;
} convolution;

// 6 x 16 numbers of a product of spectra, whose rows lie in blocks of channels, `next` numbers apart.
INLINE void tile_of_blocks(real *to, const real *a, num next, const real *b, num deep) {
  vec sum[TALL][2];
  UNROLL for (int i = 0; i < TALL; i++) sum[i][0] = sum[i][1] = broadcast(0);
  for (; deep > 0; deep -= BLOCK, a += next, b += BLOCK * WIDE) {
    for (num i = 0; i < TALL * BLOCK; i += 64 / (num)sizeof(real)) __builtin_prefetch(a + TALL * BLOCK + i);
    add_products(sum, a, BLOCK, 1, b, WIDE, min(BLOCK, deep));
  }
  UNROLL for (int i = 0; i < TALL; i++) {
    store(to + i * WIDE, sum[i][0]);
    store(to + i * WIDE + LANES, sum[i][1]);
  }
}

// Numbers at positions of `side` x `side`, 16 channels each, become sums and differences of pairs.
static void fold(real *even, real *odd, const real *at, num side) {
  num pairs = (side * side + 1) / 2;
  const real *middle = at + (pairs - 1) * WIDE;
  for (num i = 0; i < WIDE; i++) even[i] = middle[i], odd[i] = 0;
  for (num q = 1; q < pairs; q++)
    UNROLL for (int j = 0; j < WIDE; j += LANES) {
      vec after = load(middle + q * WIDE + j), before = load(middle - q * WIDE + j);
      store(even + q * WIDE + j, after + before);
      store(odd + q * WIDE + j, after - before);
    }
}

// The spectrum of `count` pairs at 6 frequencies from `first` on: what its three products need, `plane` apart.
INLINE void transform(real *to, num plane, num frequency, const real *even, const real *odd, waves w, num count,
                      num first, num pairs, const bool kernel) {
  real c[TALL * WIDE], s[TALL * WIDE];
  tile(c, WIDE, w.cosines + first * count, 1, TALL, even, WIDE, count, false);
  tile(s, WIDE, w.sines + first * count, 1, TALL, odd, WIDE, count, false);
  for (num i = 0; i < min(TALL, pairs - first); i++)
    UNROLL for (int j = 0; j < WIDE; j += LANES) {
      vec a = load(c + i * WIDE + j), b = load(s + i * WIDE + j);
      real *at = to + i * frequency + j;
      store(at, kernel ? a : a + b);
      store(at + plane, kernel ? -(a + b) : a);
      store(at + 2 * plane, kernel ? a - b : b);
    }
}

// Sums of three products become those of spectra, (2, frequencies, ...), `plane` apart.
INLINE void combine(real *to, num plane, const real *products, const bool add) {
  UNROLL for (int i = 0; i < TALL * WIDE; i += LANES) {
    vec p1 = load(products + i), p2 = load(products + TALL * WIDE + i), p3 = load(products + 2 * TALL * WIDE + i);
    vec r = p1 - p3, s = p1 + p2;
    store(to + i, add ? load(to + i) + r : r);
    store(to + plane + i, add ? load(to + plane + i) + s : s);
  }
}

// Back: 16 channels at side x side positions, of spectra `frequency` apart.
static void transform_back(real *to, num side, const real *real_part, const real *other, num frequency, waves w,
                           num pairs) {
  num count = (side * side + 1) / 2;
  real *middle = to + (count - 1) * WIDE, c[TALL * WIDE], s[TALL * WIDE];
  for (num q = 0; q < count; q += TALL) {
    tile(c, WIDE, w.cosines + q * pairs, 1, TALL, real_part, frequency, pairs, false);
    tile(s, WIDE, w.sines + q * pairs, 1, TALL, other, frequency, pairs, false);
    for (num i = 0; i < min(TALL, count - q); i++)
      UNROLL for (int j = 0; j < WIDE; j += LANES) {
        vec even = load(c + i * WIDE + j), odd = load(s + i * WIDE + j);
        store(middle - (q + i) * WIDE + j, even - odd);
        store(middle + (q + i) * WIDE + j, even + odd);
      }
  }
}

// Where a tile begins in its map.
INLINE num corner(const convolution *w, num index, num *row, num *column) {
  num map = index / (w->down * w->across), inside = index % (w->down * w->across);
  *row = inside / w->across * TILE;
  *column = inside % w->across * TILE;
  return w->first + map;
}

// 16 channels of a tile and `around` positions beside it, zero outside of the map.
static void gather(real *to, const convolution *w, const real *x, num channels, num index, num channel, num around) {
  num row, column, sample = corner(w, index, &row, &column), side = TILE + 2 * around, width = w->s.width;
  memset(to, 0, sizeof(real) * (size_t)(side * side * WIDE));
  num top = max(0, around - row), left = max(0, around - column);
  num bottom = min(side, w->s.height - row + around), right = min(side, width - column + around);
  for (num c = 0; c < min(WIDE, channels - channel); c++) {
    const real *map = x + (sample * channels + channel + c) * w->s.height * width;
    for (num i = top; i < bottom; i++)
      for (num j = left; j < right; j++)
        to[(i * side + j) * WIDE + c] = map[(row + i - around) * width + column + j - around];
  }
}

static void spectra_of(const convolution *w, const real *x, num channels, num index, const bool kernel, real *memory) {
  num blocks = ceil_div(channels, WIDE), tile_at = index / blocks, channel = index % blocks * WIDE;
  num side = kernel ? TILE : w->size, count = (side * side + 1) / 2;
  num frequency = ceil_div(channels, BLOCK) * w->rows * BLOCK, plane = w->pairs * frequency;
  real *even = memory + side * side * WIDE, *odd = even + count * WIDE;
  real *to = (kernel ? w->others : w->spectra) + (channel / BLOCK * w->rows + tile_at) * BLOCK + channel % BLOCK;
  if (tile_at < w->tiles) gather(memory, w, x, channels, tile_at, channel, kernel ? 0 : (w->s.kernel - 1) / 2);
  else memset(memory, 0, sizeof(real) * (size_t)(side * side * WIDE));
  fold(even, odd, memory, side);
  for (num f = 0; f < w->pairs; f += TALL) {
    if (kernel) transform(to + f * frequency, plane, frequency, even, odd, w->gradients, count, f, w->pairs, true);
    else transform(to + f * frequency, plane, frequency, even, odd, w->inputs, count, f, w->pairs, false);
  }
}

static void transform_steps(void *data) {
  convolution *w = data;
  real *memory = allocate((2 * w->size * w->size + 2) * WIDE);
  num of_inputs = w->rows * ceil_div(w->s.in, WIDE);
  if (memory == NULL) __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  else
    for (num i; (i = next_step(&w->steps)) < w->steps.count;) {
      if (i < of_inputs) spectra_of(w, w->x, w->s.in, i, false, memory);
      else spectra_of(w, w->gradient, w->s.out, i - of_inputs, true, memory);
    }
  release(memory);
}

// ---- Forward, and the gradient of the input

static void outputs_of(const convolution *w, num channel, real *folded, real *panel, real *sums, real *map) {
  num k = w->s.kernel, area = k * k, count = (area + 1) / 2, in = w->s.in, some = min(WIDE, w->s.out - channel);
  num next = w->rows * BLOCK, frequency = ceil_div(in, BLOCK) * next, odd = count * in * WIDE;
  num rows = (w->rows + 1) * WIDE;  // an odd count of cache lines, that spectra do not compete for the same places
  for (num c = 0; c < in; c++) {
    if (some < WIDE) memset(map, 0, sizeof(real) * (size_t)(area * WIDE));
    for (num o = 0; o < some; o++) {
      const real *from = w->weight + (channel + o) * w->weight_out + c * w->weight_in;
      for (num t = 0; t < area; t++) map[t * WIDE + o] = from[t];
    }
    fold(folded + c * count * WIDE, folded + odd + c * count * WIDE, map, k);
  }
  for (num first = 0; first < w->pairs; first += TALL) {
    for (num c = 0; c < in; c++)
      transform(panel + c * WIDE, TALL * in * WIDE, in * WIDE, folded + c * count * WIDE,
                folded + odd + c * count * WIDE, w->kernels, count, first, w->pairs, true);
    for (num f = first; f < min(w->pairs, first + TALL); f++)
      for (num row = 0; row < w->rows; row += TALL)
        for (num c = 0; c < in; c += LONG) {
          real products[3 * TALL * WIDE];
          for (num p = 0; p < 3; p++)
            tile_of_blocks(products + p * TALL * WIDE,
                           w->spectra + (p * w->pairs + f) * frequency + c * w->rows + row * BLOCK, next,
                           panel + ((p * TALL + f - first) * in + c) * WIDE, min(LONG, in - c));
          if (c == 0) combine(sums + f * rows + row * WIDE, w->pairs * rows, products, false);
          else combine(sums + f * rows + row * WIDE, w->pairs * rows, products, true);
        }
  }
  for (num t = 0; t < w->tiles; t++) {
    num row, column, sample = corner(w, t, &row, &column), height = w->s.height, width = w->s.width;
    transform_back(map, TILE, sums + t * WIDE, sums + w->pairs * rows + t * WIDE, rows, w->outputs, w->pairs);
    for (num o = 0; o < some; o++) {
      num at = sample * w->s.out + channel + o;
      real *to = w->y + (at * height + row) * width + column, total = 0;
      real scale = w->scale ? w->scale[channel + o] : 1, shift = w->shift ? w->shift[channel + o] : 0;
      for (num i = 0; i < min(TILE, height - row); i++)
        for (num j = 0; j < min(TILE, width - column); j++) {
          real y = map[(i * TILE + j) * WIDE + o] * scale + shift;
          total += to[i * width + j] = w->relu && y < 0 ? 0 : y;
        }
      if (w->totals) w->totals[at] = row || column ? w->totals[at] + total : total;
    }
  }
}

static void output_steps(void *data) {
  convolution *w = data;
  num area = w->s.kernel * w->s.kernel, folded = (area + 1) * w->s.in * WIDE, panel = 3 * TALL * w->s.in * WIDE;
  num sums = 2 * w->pairs * (w->rows + 1) * WIDE;
  real *memory = allocate(folded + panel + sums + max(area, AREA) * WIDE);
  if (memory == NULL) __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  else
    for (num i; (i = next_step(&w->steps)) < w->steps.count;)
      outputs_of(w, i * WIDE, memory, memory + folded, memory + folded + panel, memory + folded + panel + sums);
  release(memory);
}

// ---- Gradient of the weight: 16 outputs and some inputs

static void weights_of(const convolution *w, num index, real *sums, real *map) {
  num in = w->s.in, blocks = ceil_div(in, BLOCK), channel = index / blocks * WIDE, block = index % blocks;
  num some = min(BLOCK, in - block * BLOCK), area = w->s.kernel * w->s.kernel, lines = w->rows * BLOCK;
  num frequency = (BLOCK + 1) * WIDE, plane = w->pairs * frequency, out_blocks = ceil_div(w->s.out, BLOCK);
  for (num f = 0; f < w->pairs; f++)
    for (num c = 0; c < some; c += TALL) {
      real products[3 * TALL * WIDE];
      for (num p = 0; p < 3; p++)
        tile(products + p * TALL * WIDE, WIDE, w->spectra + ((p * w->pairs + f) * blocks + block) * lines + c, 1, BLOCK,
             w->others + ((p * w->pairs + f) * out_blocks + channel / BLOCK) * lines + channel % BLOCK, BLOCK,
             w->tiles, false);
      combine(sums + f * frequency + c * WIDE, plane, products, false);
    }
  for (num c = 0; c < some; c++) {
    transform_back(map, w->s.kernel, sums + c * WIDE, sums + plane + c * WIDE, frequency, w->back, w->pairs);
    for (num o = 0; o < min(WIDE, w->s.out - channel); o++) {
      real *to = w->y + (channel + o) * w->weight_out + (block * BLOCK + c) * w->weight_in;
      for (num t = 0; t < area; t++) to[t] = w->first ? to[t] + map[t * WIDE + o] : map[t * WIDE + o];
    }
  }
}

static void weight_steps(void *data) {
  convolution *w = data;
  num sums = 2 * w->pairs * (BLOCK + 1) * WIDE;
  real *memory = allocate(sums + w->s.kernel * w->s.kernel * WIDE);
  if (memory == NULL) __atomic_store_n(&w->steps.failed, true, __ATOMIC_RELAXED);
  else
    for (num i; (i = next_step(&w->steps)) < w->steps.count;) weights_of(w, i, memory, memory + sums);
  release(memory);
}

// ---- Threads, and maps that are at hand at one time

static bool share(convolution *w, void (*work)(void *), num count, num threads) {
  w->steps = (loop){.count = count};
  GOMP_parallel(work, w, (unsigned)min(threads, count), 0);
  return w->steps.failed;
}

// So many maps at one time that their spectra stay below `most` numbers.
static int run(convolution *w, num most, num threads) {
  sizes *s = &w->s;
  w->size = TILE + s->kernel - 1;
  w->pairs = (w->size * w->size + 1) / 2;
  w->down = ceil_div(s->height, TILE);
  w->across = ceil_div(s->width, TILE);
  num in = ceil_div(s->in, WIDE), out = ceil_div(s->out, WIDE), each = w->down * w->across;
  num in_line = ceil_div(s->in, BLOCK) * BLOCK, out_line = w->gradient ? ceil_div(s->out, BLOCK) * BLOCK : 0;
  num maps = max(1, min(s->batch, most / (3 * w->pairs * each * (in_line + out_line))));
  num numbers = 3 * w->pairs * round_up(maps * each, TALL);
  w->spectra = allocate(numbers * in_line);
  w->others = w->gradient ? allocate(numbers * out_line) : NULL;
  bool failed = w->spectra == NULL || (w->gradient && w->others == NULL);
  for (w->first = 0; w->first < s->batch && !failed; w->first += maps) {
    w->tiles = min(maps, s->batch - w->first) * each;
    w->rows = round_up(w->tiles, TALL);
    failed = share(w, transform_steps, w->rows * (w->gradient ? in + out : in), threads) ||
             (w->gradient ? share(w, weight_steps, out * ceil_div(s->in, BLOCK), threads)
                          : share(w, output_steps, out, threads));
  }
  release(w->spectra);
  release(w->others);
  return failed;
}

// y (batch, out, height, width) = x (batch, in, height, width) with kernels `weight_out` and `weight_in` apart. The
// waves are (cosines, sines) of inputs, kernels, outputs; the sines of kernels negative for an input's gradient.
PUBLIC int NAME(fourier_convolve)(const real *x, const real *weight, const real *scale, const real *shift, real *y,
                                  real *totals, const real *c_in, const real *s_in, const real *c_kernel,
                                  const real *s_kernel, const real *c_out, const real *s_out, const sizes *s,
                                  num weight_out, num weight_in, num relu, num most, num threads) {
  convolution w = {.s = *s, .x = x, .weight = weight, .weight_out = weight_out, .weight_in = weight_in, .scale = scale,
                   .shift = shift, .relu = relu, .y = y, .totals = totals, .inputs = {c_in, s_in},
                   .kernels = {c_kernel, s_kernel}, .outputs = {c_out, s_out}};
  return run(&w, most, threads);
}

PUBLIC int NAME(fourier_weight_gradient)(const real *x, const real *gradient, real *d_weight, const real *c_in,
                                         const real *s_in, const real *c_out, const real *s_out, const real *c_back,
                                         const real *s_back, const sizes *s, num most, num threads) {
  num area = s->kernel * s->kernel;
  convolution w = {.s = *s, .x = x, .gradient = gradient, .weight_out = s->in * area, .weight_in = area, .y = d_weight,
                   .inputs = {c_in, s_in}, .gradients = {c_out, s_out}, .back = {c_back, s_back}};
  return run(&w, most, threads);
}
