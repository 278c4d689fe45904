/* One-bit slopes on CPUs: taken from a tensor, and applied to a gradient, without a byte per element in between.
 *
 * Same bits as masks.py. One pass over memory each way: eight elements to a byte, least significant bit first.
 */

#include <stdint.h>

#include "common.h"

enum { SLICE = 1 << 16 };

static uint8_t byte_at(const void *x, int64_t i, int count, int dtype, float low, float high) {
    unsigned byte = 0;
    for (int j = 0; j < count; j++) {
        float v = value_at(x, i + j, dtype);
        byte |= (unsigned)!(v <= low || v >= high) << j;
    }
    return (uint8_t)byte;
}

static void between_plain(const void *x, uint8_t *out, int64_t first, int64_t last, int dtype, float low, float high) {
    for (int64_t i = first; i < last; i += 8)
        out[i / 8] = byte_at(x, i, last - i < 8 ? (int)(last - i) : 8, dtype, low, high);
}

static void apply_plain(const uint8_t *bits, const float *grad, float *out, int64_t first, int64_t last, float off) {
    for (int64_t i = first; i < last; i++) {
        int set = bits[i / 8] >> (i % 8) & 1;
        out[i] = set ? grad[i] : off == 0 ? 0 : grad[i] * off;
    }
}

static void apply16_plain(const uint8_t *bits, const uint16_t *grad, uint16_t *out, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) out[i] = (uint16_t)(bits[i / 8] >> (i % 8) & 1 ? grad[i] : 0);
}

#if defined(X86)
#define VECTOR __attribute__((target("avx2"))) static

VECTOR void between_avx2(const void *x, uint8_t *out, int64_t first, int64_t last, int dtype, float low, float high) {
    __m256 l = _mm256_set1_ps(low), h = _mm256_set1_ps(high);
    int64_t i = first;
    for (; i + 8 <= last; i += 8) {
        __m256 v = dtype == F32 ? _mm256_loadu_ps((const float *)x + i)
                                : _mm256_castsi256_ps(_mm256_slli_epi32(
                                      _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)((const uint16_t *)x + i))),
                                      16));
        __m256 outside = _mm256_or_ps(_mm256_cmp_ps(v, l, _CMP_LE_OQ), _mm256_cmp_ps(v, h, _CMP_GE_OQ));
        out[i / 8] = (uint8_t)~_mm256_movemask_ps(outside);
    }
    between_plain(x, out, i, last, dtype, low, high);
}

VECTOR void apply_avx2(const uint8_t *bits, const float *grad, float *out, int64_t first, int64_t last, float off) {
    const __m256i which = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256 factor = _mm256_set1_ps(off), some = _mm256_castsi256_ps(_mm256_set1_epi32(off == 0 ? 0 : -1));
    int64_t i = first;
    for (; i + 8 <= last; i += 8) {
        __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), which);
        __m256 g = _mm256_loadu_ps(grad + i), m = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, which));
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_and_ps(_mm256_mul_ps(g, factor), some), g, m));
    }
    apply_plain(bits, grad, out, i, last, off);
}

VECTOR void apply16_avx2(const uint8_t *bits, const uint16_t *grad, uint16_t *out, int64_t first, int64_t last) {
    const __m128i which = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
    int64_t i = first;
    for (; i + 8 <= last; i += 8) {
        __m128i m = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(bits[i / 8]), which), which);
        _mm_storeu_si128((void *)(out + i), _mm_and_si128(_mm_loadu_si128((const void *)(grad + i)), m));
    }
    apply16_plain(bits, grad, out, i, last);
}
#endif

EXPORT void dropit_between(const void *x, uint8_t *out, int64_t numel, int dtype, float low, float high, int threads) {
    int64_t slices = (numel + SLICE - 1) / SLICE;
#pragma omp parallel for num_threads(threads) if (slices > 1)
    for (int64_t s = 0; s < slices; s++) {
        int64_t first = s * SLICE, last = first + SLICE < numel ? first + SLICE : numel;
        BEST(between)(x, out, first, last, dtype, low, high);
    }
}

EXPORT void dropit_apply(const uint8_t *bits, const void *grad, void *out, int64_t numel, int dtype, float off,
                         int threads) {
    int64_t slices = (numel + SLICE - 1) / SLICE;
#pragma omp parallel for num_threads(threads) if (slices > 1)
    for (int64_t s = 0; s < slices; s++) {
        int64_t first = s * SLICE, last = first + SLICE < numel ? first + SLICE : numel;
        if (dtype == F32)
            BEST(apply)(bits, grad, out, first, last, off);
        else
            BEST(apply16)(bits, grad, out, first, last);
    }
}
