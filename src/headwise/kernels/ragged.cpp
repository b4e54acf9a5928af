// Attention of new tokens over ragged storage and a dense tail, on the CPU, in one call.
//
// The tokens of every segment are cut into chunks of nearly equal size, which threads take one after the other: a head
// with many tokens keeps all threads busy. A chunk is read once, TILE tokens at a time, for all queries that read its
// segment (online softmax). Parts are merged by their running maximum and sum at the end. All sums are float32.
//
// Quantised entries (quantised.py) are read a block of keys at a time. The scales of a block's channels are multiplied
// into the queries; the codes of a value become numbers in registers.
//
// No header but the standard library's: native.py compiles this file with -march=native and calls it through ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // the compiler splits them where registers are shorter
#endif
template <class T> constexpr int TILE = 128 / sizeof(T);  // tokens whose logits are held at a time
constexpr int64_t MIN_CHUNK = 256, CHUNKS_PER_THREAD = 8;
constexpr int64_t FEW = 1 << 14;     // numbers in all queries: so few are quicker done than shared out
constexpr float UNSEEN = -1e30f;  // finite: a query that sees nothing of the tail gets no NaN

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class To, class From> inline To read_as(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof(To));
  return to;
}

inline Floats load(const float* from) { return read_as<Floats>(from); }

inline Floats load(const BFloat16* from) {
  return (Floats)(__builtin_convertvector(read_as<Halves>(from), Words) << 16);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline void put(float* to, float x) { *to = x; }

inline void put(BFloat16* to, float x) {
  uint32_t bits = read_as<uint32_t>(&x);
  const bool nan = x != x;
  to->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
#define HAS_FLOAT16 1
#if defined(__AVX512F__)
inline Floats load(const Float16* from) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
#else
inline Floats load(const Float16* from) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
#endif
inline void put(Float16* to, float x) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline float number(Float16 x) { return _cvtsh_ss(x.bits); }
#elif defined(__ARM_FP16_FORMAT_IEEE)
#define HAS_FLOAT16 1
typedef __fp16 Fp16s __attribute__((vector_size(2 * LANES)));
inline Floats load(const Float16* from) { return __builtin_convertvector(read_as<Fp16s>(from), Floats); }
inline void put(Float16* to, float x) {
  const __fp16 half = x;
  std::memcpy(to, &half, sizeof half);
}
inline float number(Float16 x) { return float(read_as<__fp16>(&x)); }
#else
#define HAS_FLOAT16 0
#endif

// e to the x, for x <= 0 (Cephes' expf); 0 where the result would be no normal number.
inline Floats exp_of(Floats x) {
  const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
  const Floats found = p * (Floats)exponent;
  return x < -87.0f ? Floats{} : found;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lane i of the result is the sum of the lanes of a[i]: of Floats or Ints.
template <class Numbers> inline Numbers sums_of(const Numbers* a) {
#if defined(__AVX512F__)
  Numbers b[8], c[4], d[2];
  for (int i = 0; i < 8; i++)
    b[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           SHUFFLE(a[2 * i], a[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  for (int i = 0; i < 4; i++)
    c[i] = SHUFFLE(b[2 * i], b[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(b[2 * i], b[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  for (int i = 0; i < 2; i++)
    d[i] = SHUFFLE(c[2 * i], c[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(c[2 * i], c[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  return SHUFFLE(d[0], d[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         SHUFFLE(d[0], d[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#else
  Numbers b[4], c[2];
  for (int i = 0; i < 4; i++)
    b[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
           SHUFFLE(a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  for (int i = 0; i < 2; i++)
    c[i] = SHUFFLE(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           SHUFFLE(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return SHUFFLE(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         SHUFFLE(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}

// The other half of the lanes, then of these the other half, ...
template <class Use> inline Floats over_lanes(Floats x, Use use) {
#if defined(__AVX512F__)
  x = use(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = use(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = use(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return use(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
  x = use(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = use(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  return use(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#endif
}

inline float sum_of(Floats x) { return over_lanes(x, [](Floats a, Floats b) { return a + b; })[0]; }

inline float largest_of(Floats x) { return over_lanes(x, [](Floats a, Floats b) { return a > b ? a : b; })[0]; }

// What will be read next: while keys are multiplied the values of the same tile, while values are added the next keys.
template <class T> inline void prefetch(const T* from, int64_t count) {
  for (int64_t at = 0; at < count * int64_t(sizeof(T)); at += 64) __builtin_prefetch((const char*)from + at);
}

// What queries are multiplied with keys as: float32, or bfloat16 where the CPU has its dot product.
template <class T> struct Multiplied {
  using Query = float;
  static constexpr int STEP = LANES;
  using Vector = Floats;
  static Vector key(const T* from) { return load(from); }
  static Vector query(const float* from) { return load(from); }
  static void multiply(Floats& sum, Vector key, Vector query) { sum += key * query; }
  static bool fits(int) { return true; }
};

#if defined(__AVX512BF16__)
struct DotProducts {
  using Query = BFloat16;
  static constexpr int STEP = 2 * LANES;
  using Vector = __m512bh;
  static Vector key(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Vector query(const BFloat16* from) { return key(from); }
  static void multiply(Floats& sum, Vector key, Vector query) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, key, query);
  }
  static bool fits(int dim) { return dim % STEP == 0; }
};
#endif

// logits[t][q] of QUERIES queries and `tokens` keys.
template <class How, int QUERIES, class T>
inline void multiply_keys(const typename How::Query* queries, const T* keys, const T* values, int tokens, int dim,
                          float* logits) {
  constexpr int TOKENS = LANES / QUERIES;
  for (int t = 0; t < tokens; t += TOKENS) {
    const int last = tokens - 1;
    const T* rows[TOKENS];
    for (int j = 0; j < TOKENS; j++) {
      rows[j] = keys + int64_t(std::min(t + j, last)) * dim;  // logits beyond the last token are overwritten
      prefetch(values + int64_t(t + j) * dim, dim);
    }
    Floats sums[LANES] = {};
    for (int d = 0; d < dim; d += How::STEP) {
      typename How::Vector q[QUERIES];
#pragma GCC unroll 4
      for (int g = 0; g < QUERIES; g++) q[g] = How::query(queries + g * dim + d);
#pragma GCC unroll 16
      for (int j = 0; j < TOKENS; j++) {
        const typename How::Vector k = How::key(rows[j] + d);
#pragma GCC unroll 4
        for (int g = 0; g < QUERIES; g++) How::multiply(sums[j * QUERIES + g], k, q[g]);
      }
    }
    store(logits + t * QUERIES, sums_of(sums));
  }
}

// out[q][d] += sum over t of weights[t][q] values[t][d], for VECTORS vectors of d at a time.
template <int QUERIES, int VECTORS, class T>
inline void add_values(const float* weights, const T* values, const T* keys, int tokens, int dim, int from,
                       float* out) {
  for (; from + VECTORS * LANES <= dim; from += VECTORS * LANES) {
    const T* next = keys + int64_t(from) * tokens;
    Floats sums[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
      for (int i = 0; i < VECTORS; i++) sums[g][i] = load(out + g * dim + from + i * LANES);
    for (int t = 0; t < tokens; t++) {
      const T* row = values + int64_t(t) * dim + from;
      prefetch(next + t * VECTORS * LANES, VECTORS * LANES);
      Floats v[VECTORS];
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; i++) v[i] = load(row + i * LANES);
#pragma GCC unroll 4
      for (int g = 0; g < QUERIES; g++) {
        const float weight = weights[t * QUERIES + g];
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) sums[g][i] += v[i] * weight;
      }
    }
    for (int g = 0; g < QUERIES; g++)
      for (int i = 0; i < VECTORS; i++) store(out + g * dim + from + i * LANES, sums[g][i]);
  }
  if constexpr (VECTORS > 1) {
    if (from < dim) add_values<QUERIES, VECTORS / 2>(weights, values, keys, tokens, dim, from, out);
  }
}

// Where a part of the tokens is seen from: running maximum, sum of weights, weighted sum of values.
struct Part {
  float *top, *sum, *out;
  Part from(int64_t query, int dim) const { return {top + query, sum + query, out + query * dim}; }
  void clear(int64_t queries, int dim) const {
    std::fill(top, top + queries, -std::numeric_limits<float>::infinity());
    std::fill(sum, sum + queries, 0.0f);
    std::fill(out, out + queries * dim, 0.0f);
  }
};

struct Mask {
  const uint8_t* seen;  // null: everything is
  int64_t new_stride, token_stride;
  int64_t new_tokens;
};

// What products of queries and keys are multiplied by, and what their size is then kept below; 0: nothing.
struct Scale {
  float factor, cap;
};

// cap * tanh(x / cap). Small numbers go through the series of tanh: 1 - exp would lose their digits.
inline Floats capped(Floats x, float cap) {
  const Floats y = x / cap, size = y < 0 ? -y : y, square = y * y;
  const Floats e = exp_of(size * -2.0f), large = (1.0f - e) / (1.0f + e);
  Floats small = square * 2.1869488e-2f - 5.3968254e-2f;
  small = ((small * square + 1.3333333e-1f) * square - 3.3333333e-1f) * square * size + size;
  const Floats found = size < 0.25f ? small : large;
  return (y < 0 ? -found : found) * cap;
}

// Logits of one tile become weights of the running softmax; `first` is the number of the first of QUERIES queries among
// those of their row and head. What was summed up so far shrinks where a logit is larger than all before it.
template <int QUERIES>
inline void soften(float* weights, int tokens, int dim, const Scale& scale, const Mask& mask, int64_t first, int64_t token,
                   Part part) {
  const int count = tokens * QUERIES, padded = (count + LANES - 1) / LANES * LANES;
  const float scaling = scale.cap > 0 ? 1.0f : scale.factor;
  if (scale.cap > 0)
    for (int i = 0; i < padded; i += LANES) store(weights + i, capped(load(weights + i) * scale.factor, scale.cap));
  for (int i = count; i < padded; i++) weights[i] = -std::numeric_limits<float>::infinity();
  if (mask.seen)
    for (int g = 0; g < QUERIES; g++) {
      const uint8_t* seen = mask.seen + (first + g) % mask.new_tokens * mask.new_stride + token * mask.token_stride;
      for (int t = 0; t < tokens; t++)
        if (!seen[t * mask.token_stride]) weights[t * QUERIES + g] = UNSEEN / scaling;
    }
  Floats most = load(weights) * scaling;
  for (int i = 0; i < padded; i += LANES) {
    const Floats x = load(weights + i) * scaling;
    store(weights + i, x);
    most = most > x ? most : x;
  }
  float top[QUERIES], shrunk[QUERIES];
  bool changed = false;
  for (int g = 0; g < QUERIES; g++) {
    top[g] = most[g];
    for (int i = g + QUERIES; i < LANES; i += QUERIES) top[g] = std::max(top[g], most[i]);
    top[g] = std::max(part.top[g], top[g]);
    shrunk[g] = part.top[g] == top[g] ? 1.0f : std::exp(part.top[g] - top[g]);
    changed |= part.top[g] != top[g];
    part.top[g] = top[g];
  }
  if (changed)
    for (int g = 0; g < QUERIES; g++)
      for (int d = 0; d < dim; d += LANES) store(part.out + g * dim + d, load(part.out + g * dim + d) * shrunk[g]);
  Floats tops, total = {};
  for (int i = 0; i < LANES; i++) tops[i] = top[i % QUERIES];
  for (int i = 0; i < padded; i += LANES) {
    const Floats weight = exp_of(load(weights + i) - tops);
    store(weights + i, weight);
    total += weight;
  }
  for (int g = 0; g < QUERIES; g++) {
    float sum = 0;
    for (int i = g; i < LANES; i += QUERIES) sum += total[i];
    part.sum[g] = part.sum[g] * shrunk[g] + sum;
  }
}

// One tile of tokens, seen by QUERIES queries.
template <class How, int QUERIES, class T>
void see_tile(const typename How::Query* queries, const T* keys, const T* values, int tokens, int dim, const Scale& scale,
              const Mask& mask, int64_t first, int64_t token, Part part) {
  alignas(64) float weights[(TILE<T> + LANES) * QUERIES];
  multiply_keys<How, QUERIES>(queries, keys, values, tokens, dim, weights);
  soften<QUERIES>(weights, tokens, dim, scale, mask, first, token, part);
  add_values<QUERIES, (LANES == 16 ? 16 : 8) / QUERIES>(weights, values, keys + int64_t(tokens) * dim, tokens, dim, 0,
                                                     part.out);
}

template <class How, class T>
void see(const typename How::Query* queries, int64_t num_queries, const T* keys, const T* values, int64_t tokens,
         int dim, const Scale& scale, const Mask& mask, Part part) {
  part.clear(num_queries, dim);
  for (int64_t t = 0; t < tokens; t += TILE<T>) {
    const int count = int(std::min<int64_t>(TILE<T>, tokens - t));
    const T *k = keys + t * dim, *v = values + t * dim;
    int64_t q = 0;
    for (; q + 4 <= num_queries; q += 4)
      see_tile<How, 4>(queries + q * dim, k, v, count, dim, scale, mask, q, t, part.from(q, dim));
    for (; q + 2 <= num_queries; q += 2)
      see_tile<How, 2>(queries + q * dim, k, v, count, dim, scale, mask, q, t, part.from(q, dim));
    if (q < num_queries)
      see_tile<How, 1>(queries + q * dim, k, v, count, dim, scale, mask, q, t, part.from(q, dim));
  }
}

#if HAS_FLOAT16
inline Ints widened(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return __builtin_convertvector(read_as<Bytes>(from), Ints);
#endif
}

// Codes are computed with less the middle one: their products with what is large then do not have to cancel out.
template <int BITS> constexpr float MIDDLE = 1 << (BITS - 1);

template <int BITS> inline Floats centred(Ints codes) {
  return __builtin_convertvector(codes - (1 << (BITS - 1)), Floats);
}

constexpr int BLOCK = 64;        // keys that share scales, at most
constexpr int MOST_GROUPS = 16;  // of 16 channels or more, in heads of 256 at most

// Quantised entries of one kind, from a first row and block on. `groups` of channels of a value share a scale.
struct Codes {
  const uint8_t *keys, *values;
  const Float16 *key_scales, *value_scales;
  int64_t key_bytes, value_bytes;  // of a row
  int groups;
  Codes from(int64_t rows, int64_t blocks, int dim) const {
    return {keys + rows * key_bytes,          values + rows * value_bytes, key_scales + blocks * 2 * dim,
            value_scales + rows * 2 * groups, key_bytes, value_bytes, groups};
  }
};

// Queries times the scales of a block of keys; and what is added to every logit where codes are less `middle`.
template <int QUERIES, class Query>
inline void scale_queries(const Query* queries, const Float16* scales, int dim, float middle, float* scaled,
                          float* zeros) {
  for (int g = 0; g < QUERIES; g++) {
    Floats sum = {};
    for (int d = 0; d < dim; d += LANES) {
      const Floats q = load(queries + g * dim + d), scale = load(scales + d);
      store(scaled + g * dim + d, q * scale);
      sum += q * (load(scales + dim + d) + scale * middle);
    }
    zeros[g] = sum_of(sum);
  }
}

template <int QUERIES, int BITS>
inline void multiply_codes(const float* queries, const float* zeros, const Codes& codes, int tokens, int dim,
                           float* logits) {
  constexpr int TOKENS = LANES / QUERIES;
  Floats base;
  for (int i = 0; i < LANES; i++) base[i] = zeros[i % QUERIES];
  for (int t = 0; t < tokens; t += TOKENS) {
    const uint8_t* rows[TOKENS];
    for (int j = 0; j < TOKENS; j++) rows[j] = codes.keys + std::min(t + j, tokens - 1) * codes.key_bytes;
    prefetch(codes.values + t * codes.value_bytes, TOKENS * codes.value_bytes);
    Floats sums[LANES] = {};
    if constexpr (BITS == 8) {
      for (int d = 0; d < dim; d += LANES) {
        Floats q[QUERIES];
#pragma GCC unroll 4
        for (int g = 0; g < QUERIES; g++) q[g] = load(queries + g * dim + d);
#pragma GCC unroll 16
        for (int j = 0; j < TOKENS; j++) {
          const Floats k = centred<8>(widened(rows[j] + d));
#pragma GCC unroll 4
          for (int g = 0; g < QUERIES; g++) sums[j * QUERIES + g] += k * q[g];
        }
      }
    } else {
      const int half = dim / 2;
      for (int d = 0; d < half; d += LANES) {
        Floats low[QUERIES], high[QUERIES];
#pragma GCC unroll 4
        for (int g = 0; g < QUERIES; g++) {
          low[g] = load(queries + g * dim + d);
          high[g] = load(queries + g * dim + half + d);
        }
#pragma GCC unroll 16
        for (int j = 0; j < TOKENS; j++) {
          const Ints pairs = widened(rows[j] + d);
          const Floats a = centred<4>(pairs & 15), b = centred<4>(pairs >> 4);
#pragma GCC unroll 4
          for (int g = 0; g < QUERIES; g++) sums[j * QUERIES + g] += a * low[g] + b * high[g];
        }
      }
    }
    store(logits + t * QUERIES, sums_of(sums) + base);
  }
}

// out[q][d] += sum over t of weights[t][q] values[t][d], for channels from:until of one half. `scales` are those of the
// values, as floats: of every token the scales of its groups, then their zeros.
template <int QUERIES, int BITS, int VECTORS>
inline void add_codes(const float* weights, const Codes& codes, const float* scales, int tokens, int dim, int from,
                      int until, float* out) {
  const int size = dim / codes.groups;
  for (; from + VECTORS * LANES <= until; from += VECTORS * LANES) {
    Floats sums[QUERIES][VECTORS];
    int group[VECTORS];
    for (int i = 0; i < VECTORS; i++) group[i] = (from + i * LANES) / size;
    for (int g = 0; g < QUERIES; g++)
      for (int i = 0; i < VECTORS; i++) sums[g][i] = load(out + g * dim + from + i * LANES);
    const bool high = BITS == 4 && from >= dim / 2;
    const uint8_t *row = codes.values + from - (high ? dim / 2 : 0), *next = codes.keys + tokens * codes.key_bytes;
    for (int t = 0; t < tokens; t++, row += codes.value_bytes) {
      if (from == 0) prefetch(next + t * codes.key_bytes, codes.key_bytes);
      const float *scale = scales + t * 2 * codes.groups, *zero = scale + codes.groups;
      Floats v[VECTORS];
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; i++) {
        const Ints bytes = widened(row + i * LANES);
        const Ints code = BITS == 8 ? bytes : high ? bytes >> 4 : bytes & 15;
        v[i] = __builtin_convertvector(code, Floats) * scale[group[i]] + zero[group[i]];
      }
#pragma GCC unroll 4
      for (int g = 0; g < QUERIES; g++) {
        const float weight = weights[t * QUERIES + g];
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) sums[g][i] += v[i] * weight;
      }
    }
    for (int g = 0; g < QUERIES; g++)
      for (int i = 0; i < VECTORS; i++) store(out + g * dim + from + i * LANES, sums[g][i]);
  }
  if constexpr (VECTORS > 1) {
    if (from < until) add_codes<QUERIES, BITS, VECTORS / 2>(weights, codes, scales, tokens, dim, from, until, out);
  }
}

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define HAS_WHOLE_PRODUCTS 1
#if defined(__AVX512BW__)
struct Whole {  // vectors of 16-bit numbers, and of the 32-bit sums of products of pairs of them
  using Vector = __m512i;
  static constexpr int SIZE = 32;
  static Vector read(const int16_t* from) { return _mm512_loadu_si512(from); }
  static Vector widened(const uint8_t* from) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
  static Vector high(Vector bytes) { return _mm512_srli_epi16(bytes, 4); }
  // Bytes of SIZE places of two rows, side by side; `ordered` puts sums over them into the order of places.
  static void pair(const uint8_t* a, const uint8_t* b, Vector* pairs) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)a), y = _mm256_loadu_si256((const __m256i*)b);
    pairs[0] = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(x, y));
    pairs[1] = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(x, y));
  }
  static void ordered(const Floats* sums, Floats* places) {
    places[0] = SHUFFLE(sums[0], sums[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    places[1] = SHUFFLE(sums[0], sums[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#if defined(__AVX512VNNI__)
  static Vector add(Vector sum, Vector a, Vector b) { return _mm512_dpwssd_epi32(sum, a, b); }
#else
  static Vector add(Vector sum, Vector a, Vector b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif
  static void round(Floats x, int16_t* to) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)x)));
  }
};
#else
struct Whole {
  using Vector = __m256i;
  static constexpr int SIZE = 16;
  static Vector read(const int16_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
  static Vector widened(const uint8_t* from) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from)); }
  static Vector high(Vector bytes) { return _mm256_srli_epi16(bytes, 4); }
  static void pair(const uint8_t* a, const uint8_t* b, Vector* pairs) {
    const __m128i x = _mm_loadu_si128((const __m128i*)a), y = _mm_loadu_si128((const __m128i*)b);
    pairs[0] = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(x, y));
    pairs[1] = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(x, y));
  }
  static void ordered(const Floats* sums, Floats* places) { places[0] = sums[0], places[1] = sums[1]; }
#if defined(__AVXVNNI__)
  static Vector add(Vector sum, Vector a, Vector b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
#else
  static Vector add(Vector sum, Vector a, Vector b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#endif
  static void round(Floats x, int16_t* to) {
    const __m256i whole = _mm256_cvtps_epi32((__m256)x);
    _mm_storeu_si128((__m128i*)to, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
  }
};
#endif

// The low halves of bytes that were widened; `Whole::high` has the high ones.
inline Whole::Vector low_of(Whole::Vector bytes) { return (Whole::Vector)((Words)bytes & 0x000f000fu); }

// Logits from queries in 15 bits: whole numbers, whose products with codes are exact. Their rounding is finer than that
// of the queries themselves where these have 16 bits.
template <int QUERIES, int BITS>
inline void multiply_whole(const float* scaled, const float* zeros, const Codes& codes, int tokens, int dim,
                           float* logits) {
  constexpr int TOKENS = LANES / QUERIES, SIZE = Whole::SIZE;
  const float most = dim <= 128 ? 32767.0f : 16383.0f;  // sums of products stay within 32 bits
  alignas(64) int16_t rounded[256 * QUERIES];
  Floats base, worth;
  for (int g = 0; g < QUERIES; g++) {
    Floats tops = {};
    for (int d = 0; d < dim; d += LANES) {
      const Floats x = load(scaled + g * dim + d);
      tops = tops > x ? tops : x;
      tops = tops > -x ? tops : -x;
    }
    const float top = largest_of(tops), times = top > 0 ? most / top : 0;
    for (int d = 0; d < dim; d += LANES) Whole::round(load(scaled + g * dim + d) * times, rounded + g * dim + d);
    for (int i = g; i < LANES; i += QUERIES) base[i] = zeros[g], worth[i] = top / most;
  }
  for (int t = 0; t < tokens; t += TOKENS) {
    const uint8_t* rows[TOKENS];
    for (int j = 0; j < TOKENS; j++) rows[j] = codes.keys + std::min(t + j, tokens - 1) * codes.key_bytes;
    prefetch(codes.values + t * codes.value_bytes, TOKENS * codes.value_bytes);
    Whole::Vector sums[LANES] = {};
    for (int d = 0; d < dim * BITS / 8; d += SIZE) {
      Whole::Vector q[QUERIES], more[QUERIES];
#pragma GCC unroll 4
      for (int g = 0; g < QUERIES; g++) {
        q[g] = Whole::read(rounded + g * dim + d);
        if (BITS == 4) more[g] = Whole::read(rounded + g * dim + dim / 2 + d);
      }
#pragma GCC unroll 16
      for (int j = 0; j < TOKENS; j++) {
        const Whole::Vector bytes = Whole::widened(rows[j] + d), k = BITS == 8 ? bytes : low_of(bytes);
#pragma GCC unroll 4
        for (int g = 0; g < QUERIES; g++) sums[j * QUERIES + g] = Whole::add(sums[j * QUERIES + g], k, q[g]);
        if constexpr (BITS == 4) {
          const Whole::Vector high = Whole::high(bytes);
#pragma GCC unroll 4
          for (int g = 0; g < QUERIES; g++) sums[j * QUERIES + g] = Whole::add(sums[j * QUERIES + g], high, more[g]);
        }
      }
    }
    Ints found[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) found[i] = (Ints)sums[i];
    store(logits + t * QUERIES, __builtin_convertvector(sums_of(found), Floats) * worth + base);
  }
}

#if defined(__AVX512F__)
#define EACH_LANE(of) of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12), \
                      of(13), of(14), of(15)
#else
#define EACH_LANE(of) of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)
#endif

// Weights of a block of values as whole numbers of 15 bits, for every query and group of channels: the weight is times
// the group's scale. Token t and token t + half are a pair, the two halves of a word.
struct Rounded {
  static constexpr int MOST = 32;  // queries times groups
  alignas(64) int32_t pairs[BLOCK / 2 * MOST];
  alignas(64) float worth[MOST], zeros[MOST];  // what 1 stands for; sums of weights times zeros
  int half, stride;
};

// `weights` and `scales` as `add_codes` has them. Lanes are [query][group].
template <int QUERIES, int GROUPS>
inline void round_weights(const float* weights, const float* scales, int tokens, Rounded& to) {
  constexpr int STRIDE = std::max(QUERIES * GROUPS, LANES), VECTORS = STRIDE / LANES;
  constexpr auto query_of = [](int lane) { return lane / GROUPS; };
  constexpr auto group_of = [](int lane) { return lane % GROUPS; };
  alignas(64) float scaled[(BLOCK + 1) * STRIDE];
  Floats tops[VECTORS] = {}, zeros[VECTORS] = {};
  for (int t = 0; t < tokens; t++) {
    const Floats own = load(scales + 2 * t * GROUPS), others = load(scales + (2 * t + 1) * GROUPS);
    const Floats scale = SHUFFLE(own, own, EACH_LANE(group_of)), zero = SHUFFLE(others, others, EACH_LANE(group_of));
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
      const Floats some = load(weights + t * QUERIES + i * LANES / GROUPS);
      const Floats weight = SHUFFLE(some, some, EACH_LANE(query_of)), x = weight * scale;
      store(scaled + t * STRIDE + i * LANES, x);
      tops[i] = tops[i] > x ? tops[i] : x;
      zeros[i] += weight * zero;
    }
  }
  std::fill(scaled + tokens * STRIDE, scaled + (tokens + 1) * STRIDE, 0.0f);  // the other one of an odd token
  to.half = (tokens + 1) / 2;
  to.stride = STRIDE;
  for (int i = 0; i < STRIDE; i += LANES) {
    const Floats top = tops[i / LANES], times = top > 0.0f ? 32767.0f / top : Floats{};
    store(to.worth + i, top / 32767.0f);
    store(to.zeros + i, zeros[i / LANES]);
    for (int t = 0; t < to.half; t++) {
      const Ints a = __builtin_convertvector(load(scaled + t * STRIDE + i) * times + 0.5f, Ints);
      const Ints b = __builtin_convertvector(load(scaled + (t + to.half) * STRIDE + i) * times + 0.5f, Ints);
      const Ints pair = a | b << 16;
      std::memcpy(to.pairs + t * STRIDE + i, &pair, sizeof pair);
    }
  }
}

// As add_codes does, but in whole numbers, for bytes of a value from `from` on: SIZE * CHUNKS at a time.
template <int QUERIES, int BITS, int CHUNKS>
inline void add_whole(const Rounded& weights, const Codes& codes, int tokens, int dim, int from, float* out) {
  constexpr int SIZE = Whole::SIZE, PARTS = 8 / BITS;  // of a byte
  const int size = dim / codes.groups, bytes = int(codes.value_bytes);
  for (; from + SIZE * CHUNKS <= bytes; from += SIZE * CHUNKS) {
    Whole::Vector sums[PARTS][CHUNKS][QUERIES][2] = {};
    int group[PARTS][CHUNKS];
    for (int p = 0; p < PARTS; p++)
      for (int c = 0; c < CHUNKS; c++) group[p][c] = (p * bytes + from + c * SIZE) / size;
    // Of the next keys a share for every pair, by those passes that begin a line of the processor's cache.
    const int64_t share = from % 64 ? 0 : 2 * codes.key_bytes * std::min(bytes, 64) / bytes;
    const uint8_t *first = codes.values + from, *next = codes.keys + tokens * codes.key_bytes * (bytes + from) / bytes;
    for (int t = 0; t < weights.half; t++) {
      const uint8_t *a = first + t * bytes, *b = first + std::min(t + weights.half, tokens - 1) * bytes;
      prefetch(next + t * share, share);
#pragma GCC unroll 2
      for (int c = 0; c < CHUNKS; c++) {
        Whole::Vector both[2], x[PARTS][2];
        Whole::pair(a + c * SIZE, b + c * SIZE, both);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          x[0][i] = BITS == 8 ? both[i] : low_of(both[i]);
          if (BITS == 4) x[PARTS - 1][i] = Whole::high(both[i]);
        }
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 4
          for (int g = 0; g < QUERIES; g++) {
            const int32_t pair = weights.pairs[t * weights.stride + g * codes.groups + group[p][c]];
            const auto weight = (Whole::Vector)(Ints{} + pair);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) sums[p][c][g][i] = Whole::add(sums[p][c][g][i], x[p][i], weight);
          }
      }
    }
    for (int p = 0; p < PARTS; p++)
      for (int c = 0; c < CHUNKS; c++)
        for (int g = 0; g < QUERIES; g++) {
          const int place = g * codes.groups + group[p][c];
          Floats found[2], places[2];
          for (int i = 0; i < 2; i++) found[i] = __builtin_convertvector((Ints)sums[p][c][g][i], Floats);
          Whole::ordered(found, places);
          for (int i = 0; i < 2; i++) {
            float* to = out + g * dim + p * bytes + from + c * SIZE + i * LANES;
            store(to, load(to) + places[i] * weights.worth[place] + weights.zeros[place]);
          }
        }
  }
  if constexpr (CHUNKS > 1) {
    if (from < bytes) add_whole<QUERIES, BITS, CHUNKS / 2>(weights, codes, tokens, dim, from, out);
  }
}
#else
#define HAS_WHOLE_PRODUCTS 0
#endif

// Logits of a block of keys. WHOLE: as whole numbers, where the model's numbers have 16 bits anyway.
template <int QUERIES, int BITS, bool WHOLE, class Query>
inline void multiply_block(const Query* queries, const Codes& codes, int tokens, int dim, float* logits) {
  alignas(64) float scaled[256 * QUERIES], zeros[QUERIES];
#if HAS_WHOLE_PRODUCTS
  if (WHOLE && dim * BITS / 8 % Whole::SIZE == 0) {
    scale_queries<QUERIES>(queries, codes.key_scales, dim, 0.0f, scaled, zeros);
    return multiply_whole<QUERIES, BITS>(scaled, zeros, codes, tokens, dim, logits);
  }
#endif
  scale_queries<QUERIES>(queries, codes.key_scales, dim, MIDDLE<BITS>, scaled, zeros);
  multiply_codes<QUERIES, BITS>(scaled, zeros, codes, tokens, dim, logits);
}

template <int QUERIES, int BITS, bool WHOLE>
inline void add_coded_values(const float* weights, const Codes& codes, int tokens, int dim, float* out) {
  alignas(64) float scales[BLOCK * 2 * MOST_GROUPS + LANES];
  const int count = tokens * 2 * codes.groups, whole = count / LANES * LANES;
  for (int i = 0; i < whole; i += LANES) store(scales + i, load(codes.value_scales + i));
  for (int i = whole; i < count; i++) scales[i] = number(codes.value_scales[i]);
#if HAS_WHOLE_PRODUCTS
  const bool known = codes.groups == 2 || codes.groups == 4 || codes.groups == 8;
  if (WHOLE && known && dim / codes.groups % Whole::SIZE == 0 && codes.value_bytes % Whole::SIZE == 0) {
    Rounded rounded;
    switch (codes.groups) {
      case 2: round_weights<QUERIES, 2>(weights, scales, tokens, rounded); break;
      case 4: round_weights<QUERIES, 4>(weights, scales, tokens, rounded); break;
      default: round_weights<QUERIES, 8>(weights, scales, tokens, rounded);
    }
    return add_whole<QUERIES, BITS, LANES == 16 && BITS == 8 ? 2 : 1>(rounded, codes, tokens, dim, 0, out);
  }
#endif
  const int half = BITS == 4 ? dim / 2 : dim;
  constexpr int VECTORS = QUERIES == 4 && LANES == 8 ? 2 : 4;
  for (int from = 0; from < dim; from += half)
    add_codes<QUERIES, BITS, VECTORS>(weights, codes, scales, tokens, dim, from, from + half, out);
}

template <int QUERIES, bool WHOLE, class Query>
void see_block(const Query* queries, const Codes& codes, int tokens, int dim, const Scale& scale, Part part) {
  alignas(64) float weights[(BLOCK + LANES) * QUERIES];
  prefetch(codes.value_scales, tokens * 2 * codes.groups);
  prefetch(codes.key_scales + 2 * dim, 2 * dim);  // of the next block
  if (codes.key_bytes < dim)
    multiply_block<QUERIES, 4, WHOLE>(queries, codes, tokens, dim, weights);
  else
    multiply_block<QUERIES, 8, WHOLE>(queries, codes, tokens, dim, weights);
  soften<QUERIES>(weights, tokens, dim, scale, Mask{}, 0, 0, part);
  if (codes.value_bytes < dim)
    add_coded_values<QUERIES, 4, WHOLE>(weights, codes, tokens, dim, part.out);
  else
    add_coded_values<QUERIES, 8, WHOLE>(weights, codes, tokens, dim, part.out);
}

template <bool WHOLE, class Query>
void see_codes(const Query* queries, int64_t num_queries, const Codes& codes, int64_t tokens, int block, int dim,
               const Scale& scale, Part part) {
  part.clear(num_queries, dim);
  for (int64_t t = 0; t < tokens; t += block) {
    const int count = int(std::min<int64_t>(block, tokens - t));
    const Codes here = codes.from(t, t / block, dim);
    int64_t q = 0;
    for (; q + 4 <= num_queries; q += 4)
      see_block<4, WHOLE>(queries + q * dim, here, count, dim, scale, part.from(q, dim));
    for (; q + 2 <= num_queries; q += 2)
      see_block<2, WHOLE>(queries + q * dim, here, count, dim, scale, part.from(q, dim));
    if (q < num_queries) see_block<1, WHOLE>(queries + q * dim, here, count, dim, scale, part.from(q, dim));
  }
}
#endif

// The arguments, in the order in which native.py gives them. Strides count elements; the last axis is dense everywhere.
struct Call {
  int64_t query, keys, values, starts, lengths, rows, tail_keys, tail_values, seen, out;  // addresses
  int64_t batch, heads, group, new_tokens, dim, contexts, tail, num_keys;
  int64_t query_row, query_head, query_group, query_new;
  int64_t tail_key_row, tail_key_head, tail_value_row, tail_value_head;
  int64_t seen_row, seen_new, seen_token;
  int64_t threads;
  int64_t stored, num_stored;  // address of what describes quantised entries, and of how many kinds there are
  int64_t sinks;  // address of a float for every query head: the logit of a key whose value is nothing
};

// Quantised entries of one kind, of all segments.
struct Stored {
  int64_t keys, key_scales, values, value_scales, starts, lengths, first_blocks;  // addresses
  int64_t key_bytes, value_bytes, groups, block, num_rows, num_blocks;
};

template <class T> T* at(int64_t address) { return reinterpret_cast<T*>(address); }

inline bool is_span(int64_t start, int64_t length, int64_t count) {
  return start >= 0 && length >= 0 && start <= count && length <= count - start;
}

// Whether rows name contexts and segments lie within the keys. All else of a call native.py has seen to.
bool is_within(const Call& call) {
  const int64_t *starts = at<const int64_t>(call.starts), *lengths = at<const int64_t>(call.lengths);
  const int64_t* rows = at<const int64_t>(call.rows);
  bool within = true;
  for (int64_t b = 0; b < call.batch; b++) within &= rows[b] >= 0 && rows[b] < call.contexts;
  for (int64_t s = 0; s < call.contexts * call.heads; s++)
    within &= is_span(starts[s], lengths[s], call.num_keys);
  for (int64_t i = 0; i < call.num_stored; i++) {
    const Stored& x = at<const Stored>(call.stored)[i];
    const int64_t *first = at<const int64_t>(x.starts), *count = at<const int64_t>(x.lengths);
    const int64_t* block = at<const int64_t>(x.first_blocks);
    for (int64_t s = 0; s < call.contexts * call.heads; s++)
      within &= is_span(first[s], count[s], x.num_rows) &&
                is_span(block[s], (count[s] + x.block - 1) / x.block, x.num_blocks);
  }
  return within;
}

struct Item {
  int64_t context, row, head, start, tokens;  // row < 0: of the frozen part
  int64_t query, num_queries, part;           // first of the packed queries; first of the parts
  int64_t stored = -1, block = 0;             // which quantised entries, and their first block; -1: none of them
};

inline void pack(const float* from, int dim, float* to) { std::memcpy(to, from, dim * sizeof(float)); }
inline void pack(const BFloat16* from, int dim, BFloat16* to) { std::memcpy(to, from, dim * sizeof(BFloat16)); }
template <class T> inline void pack(const T* from, int dim, float* to) {
  for (int d = 0; d < dim; d += LANES) store(to + d, load(from + d));
}

template <class How, class T> void attend(const Call& call, const Scale& scale) {
  const int64_t *starts = at<const int64_t>(call.starts), *lengths = at<const int64_t>(call.lengths);
  const int64_t* rows = at<const int64_t>(call.rows);
  const int64_t own = call.group * call.new_tokens;  // queries of a row and head
  const int dim = int(call.dim);
  const int threads = int(call.threads);

  // Queries that read one segment lie together: [context][head][slot of the row][own].
  std::vector<int64_t> readers(call.contexts, 0), slot(call.batch), offset(call.contexts + 1, 0);
  for (int64_t b = 0; b < call.batch; b++) slot[b] = readers[rows[b]]++;
  for (int64_t c = 0; c < call.contexts; c++) offset[c + 1] = offset[c] + readers[c] * own * call.heads;
  auto place = [&](int64_t b, int64_t h) {
    return offset[rows[b]] + (h * readers[rows[b]] + slot[b]) * own;
  };

  std::vector<Item> items;
  int64_t total = 0, parts = 0;
  for (int64_t c = 0; c < call.contexts; c++)
    for (int64_t h = 0; readers[c] && h < call.heads; h++) {
      total += lengths[c * call.heads + h];
      for (int64_t i = 0; i < call.num_stored; i++)
        total += at<const int64_t>(at<const Stored>(call.stored)[i].lengths)[c * call.heads + h];
    }
  const int64_t chunk = threads == 1 ? std::max<int64_t>(total, 1)
                                     : std::max(MIN_CHUNK, total / (threads * CHUNKS_PER_THREAD));
  std::vector<int64_t> first(call.contexts * call.heads + 1, 0);  // item of every segment
  for (int64_t s = 0; s < call.contexts * call.heads; s++) {
    const int64_t c = s / call.heads, h = s % call.heads, queries = readers[c] * own;
    first[s] = int64_t(items.size());
    const int64_t count = queries ? (lengths[s] + chunk - 1) / chunk : 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = lengths[s] * i / count, end = lengths[s] * (i + 1) / count;
      items.push_back({c, -1, h, starts[s] + begin, end - begin, offset[c] + h * queries, queries, parts});
      parts += queries;
    }
    for (int64_t n = 0; queries && n < call.num_stored; n++) {
      const Stored& x = at<const Stored>(call.stored)[n];
      const int64_t length = at<const int64_t>(x.lengths)[s], blocks = (length + x.block - 1) / x.block;
      const int64_t pieces = std::min(blocks, (length + chunk - 1) / chunk);
      for (int64_t i = 0; i < pieces; i++) {
        const int64_t begin = blocks * i / pieces, end = blocks * (i + 1) / pieces;
        items.push_back({c, -1, h, at<const int64_t>(x.starts)[s] + begin * x.block,
                         std::min(length, end * x.block) - begin * x.block, offset[c] + h * queries, queries, parts, n,
                         at<const int64_t>(x.first_blocks)[s] + begin});
        parts += queries;
      }
    }
  }
  const int64_t frozen = first[call.contexts * call.heads] = int64_t(items.size());
  for (int64_t b = 0; call.tail && b < call.batch; b++)
    for (int64_t h = 0; h < call.heads; h++) {
      items.push_back({rows[b], b, h, 0, call.tail, place(b, h), own, parts});
      parts += own;
    }

  std::vector<typename How::Query> packed(offset[call.contexts] * dim);
  std::vector<float> tops(parts), sums(parts), outs(parts * dim);
  const T *query = at<const T>(call.query), *keys = at<const T>(call.keys), *values = at<const T>(call.values);
  const T *tail_keys = at<const T>(call.tail_keys), *tail_values = at<const T>(call.tail_values);
  T* out = at<T>(call.out);

  // Threads wait for one another as seldom as can be: a wait is long where another process has a core.
  const bool few = threads == 1 || call.batch * call.heads * own * dim <= FEW;
#pragma omp parallel for schedule(static) num_threads(threads) if (!few)
  for (int64_t i = 0; i < call.batch * call.heads; i++) {
    const int64_t b = i / call.heads, h = i % call.heads;
    for (int64_t q = 0; q < own; q++)
      pack(query + b * call.query_row + h * call.query_head + q / call.new_tokens * call.query_group +
               q % call.new_tokens * call.query_new,
           dim, packed.data() + (place(b, h) + q) * dim);
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < int64_t(items.size()); i++) {
    const Item& x = items[i];
    const Part part{tops.data() + x.part, sums.data() + x.part, outs.data() + x.part * dim};
#if HAS_FLOAT16
    if (x.stored >= 0) {
      const Stored& of = at<const Stored>(call.stored)[x.stored];
      const Codes codes{at<const uint8_t>(of.keys), at<const uint8_t>(of.values), at<const Float16>(of.key_scales),
                        at<const Float16>(of.value_scales), of.key_bytes, of.value_bytes, int(of.groups)};
      see_codes<sizeof(T) == 2>(packed.data() + x.query * dim, x.num_queries, codes.from(x.start, x.block, dim), x.tokens,
                int(of.block), dim, scale, part);
      continue;
    }
#endif
    const bool tail = x.row >= 0;
    const T* k = tail ? tail_keys + x.row * call.tail_key_row + x.head * call.tail_key_head : keys + x.start * dim;
    const T* v =
        tail ? tail_values + x.row * call.tail_value_row + x.head * call.tail_value_head : values + x.start * dim;
    const uint8_t* seen = tail && call.seen ? at<const uint8_t>(call.seen) + x.row * call.seen_row : nullptr;
    see<How>(packed.data() + x.query * dim, x.num_queries, k, v, x.tokens, dim, scale,
             Mask{seen, call.seen_new, call.seen_token, call.new_tokens}, part);
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (!few)
  for (int64_t i = 0; i < call.batch * call.heads; i++) {
    const int64_t b = i / call.heads, h = i % call.heads, segment = rows[b] * call.heads + h;
    const int64_t tail = frozen + i;
    for (int64_t q = 0; q < own; q++) {
      auto part_of = [&](int64_t item) { return items[item].part + (item < frozen ? slot[b] * own : 0) + q; };
      float top = -std::numeric_limits<float>::infinity(), sum = 0;
      alignas(64) float mean[256] = {};
      auto each = [&](auto&& use) {
        for (int64_t item = first[segment]; item < first[segment + 1]; item++) use(part_of(item));
        if (call.tail) use(part_of(tail));
      };
      if (call.sinks) top = at<const float>(call.sinks)[h * call.group + q / call.new_tokens];
      const float sink = top;
      each([&](int64_t part) { top = std::max(top, tops[part]); });
      if (call.sinks) sum = std::exp(sink - top);
      each([&](int64_t part) {
        const float weight = std::exp(tops[part] - top);
        sum += weight * sums[part];
        for (int d = 0; d < dim; d += LANES)
          store(mean + d, load(mean + d) + load(outs.data() + part * dim + d) * weight);
      });
      T* to = out + (i * own + q) * dim;
      for (int d = 0; d < dim; d++) put(to + d, mean[d] / sum);
    }
  }
}

}  // namespace

// 0: done. 1: out of memory. 2: a dtype that this CPU's build does not have. 3: rows or segments that are not there.
extern "C" int headwise_attend(const int64_t* arguments, double scaling, double softcap, int dtype) {
  const Call call = read_as<Call>(arguments);
  const Scale scale{float(scaling), float(softcap)};
  if (!is_within(call)) return 3;
  if (call.num_stored && !HAS_FLOAT16) return 2;
  try {
    switch (dtype) {
      case 0:
        attend<Multiplied<float>, float>(call, scale);
        return 0;
      case 1:
#if defined(__AVX512BF16__)
        if (DotProducts::fits(int(call.dim))) {
          attend<DotProducts, BFloat16>(call, scale);
          return 0;
        }
#endif
        attend<Multiplied<BFloat16>, BFloat16>(call, scale);
        return 0;
#if HAS_FLOAT16
      case 2:
        attend<Multiplied<Float16>, Float16>(call, scale);
        return 0;
#endif
      default:
        return 2;
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// How many floats are computed with at a time: heads of codes of 4 bits are read in halves of as many.
extern "C" int headwise_lanes() { return LANES; }

// Whether float16 is served: not where the CPU cannot convert it.
extern "C" int headwise_has_float16() { return HAS_FLOAT16; }

// What the build makes use of, for `headwise doctor`.
extern "C" const char* headwise_features() {
#if defined(__AVX512BF16__)
  return "AVX-512, bfloat16 dot products";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "the compiler's vectors";
#endif
}

// Sum of so many words: what reading them costs is the floor of any kernel that must.
extern "C" int64_t headwise_read(const int64_t* words, int64_t count, int threads) {
  int64_t sum = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += words[i];
  return sum;
}
