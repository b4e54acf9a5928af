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

inline __m512i bytes_to_words(__m256i bytes) {
  struct { uint8_t at[32]; } from = read_as<decltype(from)>(bytes);
  Words out;
  for (int i = 0; i < 32; i++) out.at[i] = from.at[i];
  return read_as<__m512i>(out);
}

inline __m512i bytes_to_numbers(__m128i bytes) {
  struct { uint8_t at[16]; } from = read_as<decltype(from)>(bytes);
  struct { int32_t at[16]; } out;
  for (int i = 0; i < 16; i++) out.at[i] = from.at[i];
  return read_as<__m512i>(out);
}

inline __m512i shifted(__m512i words, int count) {
  Words out = read_as<Words>(words);
  for (auto& word : out.at) word >>= count;
  return read_as<__m512i>(out);
}

inline __m512i dpwssd(__m512i sum, __m512i a, __m512i b) {
  struct { int32_t at[16]; } out = read_as<decltype(out)>(sum);
  struct { int16_t at[32]; } x = read_as<decltype(x)>(a), y = read_as<decltype(y)>(b);
  for (int i = 0; i < 16; i++) out.at[i] += x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1];
  return read_as<__m512i>(out);
}

inline __m512i to_whole(__m512 numbers) {
  struct { __m256 low, high; } x = read_as<decltype(x)>(numbers);
  struct { __m256i low, high; } out = {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
  return read_as<__m512i>(out);
}

inline __m256i to_words(__m512i whole) {
  struct { int32_t at[16]; } x = read_as<decltype(x)>(whole);
  struct { int16_t at[16]; } out;
  for (int i = 0; i < 16; i++) out.at[i] = int16_t(x.at[i] > 32767 ? 32767 : x.at[i] < -32768 ? -32768 : x.at[i]);
  return read_as<__m256i>(out);
}

}  // namespace emulated

#define _mm512_dpbf16_ps emulated::dpbf16
#define _mm512_loadu_si512 emulated::load
#define _mm512_cvtph_ps emulated::from_halves
#define _mm512_cvtepu8_epi16 emulated::bytes_to_words
#define _mm512_cvtepu8_epi32 emulated::bytes_to_numbers
#define _mm512_srli_epi16 emulated::shifted
#define _mm512_dpwssd_epi32 emulated::dpwssd
#define _mm512_cvtps_epi32 emulated::to_whole
#define _mm512_cvtsepi32_epi16 emulated::to_words
#undef __AVX512BW__
#define __AVX512BW__ 1
#undef __AVX512VNNI__
#define __AVX512VNNI__ 1
#undef __AVX512F__
#define __AVX512F__ 1
#undef __AVX512BF16__
#define __AVX512BF16__ 1
