// The AVX-512 intrinsics that ragged.cpp uses, made of what every x86 CPU with AVX2 and F16C has. With it in front,
// the code for AVX-512 with bfloat16 dot products runs on CPUs that have neither.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

template <class To, class From> inline To read_as(const From& from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

struct Words { uint16_t at[32]; };
struct Numbers { float at[16]; };

inline float widened(uint16_t bits) { return read_as<float>(uint32_t(bits) << 16); }

inline __m512 dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  Numbers out = read_as<Numbers>(sum);
  const Words x = read_as<Words>(a), y = read_as<Words>(b);
  for (int i = 0; i < 16; i++)
    out.at[i] += widened(x.at[2 * i]) * widened(y.at[2 * i]) + widened(x.at[2 * i + 1]) * widened(y.at[2 * i + 1]);
  return read_as<__m512>(out);
}

inline __m512i load(const void* from) {
  Words out;
  std::memcpy(&out, from, sizeof out);
  return read_as<__m512i>(out);
}

inline __m512 from_halves(__m256i halves) {
  struct { __m256 low, high; } out = {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                                      _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
  return read_as<__m512>(out);
}

}  // namespace emulated

#define _mm512_dpbf16_ps emulated::dpbf16
#define _mm512_loadu_si512 emulated::load
#define _mm512_cvtph_ps emulated::from_halves
#undef __AVX512F__
#define __AVX512F__ 1
#undef __AVX512BF16__
#define __AVX512BF16__ 1
