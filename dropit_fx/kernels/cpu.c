/* The packed format on CPUs. Plain C11 with OpenMP: no torch or Python headers; loaded by cpu.py.
 *
 * Same bits as reference.py and coder.py, which say what is computed; this file says how to do it fast.
 *
 * - Selection: the k-th largest key of a block is found by counting how many keys reach a guess, a loop that
 *   compilers turn into vector compares. The guesses start at the threshold of the block before and close in by
 *   interpolation; with a few hundred candidates between two floats of the same octave, about eight counts do.
 * - Every hot loop is straight-line C over one block, which stays in the first-level cache. `WORKER` compiles it
 *   for baseline x86-64, AVX2 and AVX-512, and the first call picks one; other machines have the one plain version.
 * - Where compilers do badly (bit streams, tables, narrowing to bytes) a function in AVX2 does as many elements as
 *   come in whole vectors, and the C beside it the rest.
 * - Float operations are single IEEE operations (build with -ffp-contract=off), the sums are of integers.
 *
 * Little-endian machines only: the loader refuses others.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#if defined(__GNUC__)
#define LOWEST_BIT(v) __builtin_ctzll(v)
#else
INLINE int LOWEST_BIT(uint64_t v) {
    int i = 0;
    while (!(v >> i & 1)) i++;
    return i;
}
#endif

enum { SYMMETRIC = 0, AFFINE = 1, UNIFORM = 2 };
enum { INFINITY_BITS = 0x7F800000, TOP_BITS = 0x7F7F0000, CHUNK = 16384 };
enum { SLICE = 1 << 15, STRIP = 512 }; /* codes: multiples of 8, so that each slice of a stream is whole bytes */

typedef struct {
    const void *x;         /* input of sparsify, output of unsparsify */
    void *values;
    uint16_t *scale;       /* bfloat16 patterns */
    uint8_t *mask;
    int64_t numel, keep, block; /* block > 0 here: the caller replaces 0 by numel */
    int64_t k_full, k_tail;     /* kept in a full block and in the tail */
    int64_t blocks, nbytes;     /* the tail included; of `values`, where it holds codes */
    const int64_t *seed;   /* NULL: nearest */
    int dtype, bits, layout, is_sample, vector; /* vector: AVX2 may be used */
    const float *mean, *factor; /* of each channel, or NULL: sparsify takes (x - mean) factor, unsparsify gives x factor + mean */
    int64_t channels, inner;    /* run r of `inner` elements is of channel r % channels */
} Job;

/* ------------------------------------------------------------------------------------------- floats */

INLINE uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

INLINE float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* half -> single; scaling by 2^112 moves the exponent and is exact for subnormals too */
INLINE uint32_t half_to_single(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7FFF) << 13;
    uint32_t finite = bits_of(float_of(rest) * float_of(0x77800000));
    return sign | (rest >= 0x0F800000 ? (rest & 0x007FFFFF) | INFINITY_BITS : finite);
}

/* single -> half, to nearest even. Below the least normal half, adding 0.5 makes the adder round to units of 2^-24. */
INLINE uint16_t single_to_half(uint32_t u) {
    uint32_t sign = u >> 16 & 0x8000, a = u & 0x7FFFFFFF;
    uint32_t small = bits_of(float_of(a) + 0.5f) - 0x3F000000;
    uint32_t normal = (a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13;
    uint32_t h = a < 0x38800000 ? small : normal;
    h = a >= 0x47800000 ? 0x7C00 : h;
    h = a > INFINITY_BITS ? 0x7E00 : h;
    return (uint16_t)(sign | h);
}

INLINE uint16_t single_to_bfloat(uint32_t u) {
    uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7FFFFFFF) > INFINITY_BITS ? 0x7FC0 : rounded);
}

INLINE float round_down(float x) { return float_of(bits_of(x) & 0x7FFF0000); }

INLINE float round_up(float x) {
    uint32_t u = (bits_of(x) + 0xFFFF) & 0x7FFF0000;
    return float_of(u > TOP_BITS ? TOP_BITS : u);
}

/* The greatest bfloat16 <= x and the least >= x, never -0.0. */
INLINE float floor_bfloat(float x) { return x < 0 ? -round_up(-x) : round_down(x); }
INLINE float ceil_bfloat(float x) { return x < 0 ? 0.0f - round_down(-x) : round_up(x); }

INLINE float nearest_bfloat(float x) {
    return float_of((uint32_t)single_to_bfloat(bits_of(x)) << 16);
}

/* ------------------------------------------------------------------------------------- random numbers */

INLINE uint32_t mix(uint32_t v) {
    v = (v ^ v >> 16) * 0x7FEB352Du;
    v = (v ^ v >> 15) * 0x846CA68Bu;
    return v ^ v >> 16;
}

INLINE uint32_t draw(int64_t seed, uint32_t index) {
    return mix(mix(index ^ (uint32_t)seed) ^ (uint32_t)((uint64_t)seed >> 32));
}

INLINE float uniform(uint32_t drawn) { return (float)(drawn >> 8) * 0x1p-24f; }

/* --------------------------------------------------------------------------------- codes <-> bit streams */

/* 8 codes, one a byte, to 8*bits bits: fields of 8, 16 and 32 bits are joined in pairs. */
INLINE uint64_t join8(uint64_t v, int bits) {
    v = (v & 0x00FF00FF00FF00FFull) | (v & 0xFF00FF00FF00FF00ull) >> (8 - bits);
    v = (v & 0x0000FFFF0000FFFFull) | (v & 0xFFFF0000FFFF0000ull) >> (16 - 2 * bits);
    return (v & 0x00000000FFFFFFFFull) | (v & 0xFFFFFFFF00000000ull) >> (32 - 4 * bits);
}

INLINE uint64_t part8(uint64_t v, int bits) {
    uint64_t m4 = bits == 8 ? 0xFFFFFFFFull : (1ull << 4 * bits) - 1;
    uint64_t m2 = ((1ull << 2 * bits) - 1) * 0x0000000100000001ull;
    uint64_t m1 = ((1ull << bits) - 1) * 0x0001000100010001ull;
    v = (v & m4) | (v >> 4 * bits & m4) << 32;
    v = (v & m2) | (v >> 2 * bits & m2) << 16;
    return (v & m1) | (v >> bits & m1) << 8;
}

#ifdef X86
#define VECTOR __attribute__((target("avx2,bmi,bmi2,f16c,popcnt"))) static
#define VECTOR_INLINE VECTOR inline __attribute__((always_inline))
#define WITH_AVX2(name, ...) (vector ? name##_avx2(__VA_ARGS__) : 0)

/* The AVX2 functions do what they can in whole steps and return how many elements that was. */

/* `join8` on four words at once. */
VECTOR int64_t pack_codes_avx2(const uint8_t *codes, int64_t count, int bits, uint8_t *out, const uint8_t *end) {
    __m256i even8 = _mm256_set1_epi16(0x00FF), even16 = _mm256_set1_epi32(0x0000FFFF);
    __m256i even32 = _mm256_set1_epi64x(0x00000000FFFFFFFF);
    __m128i by8 = _mm_cvtsi32_si128(8 - bits), by16 = _mm_cvtsi32_si128(16 - 2 * bits);
    __m128i by32 = _mm_cvtsi32_si128(32 - 4 * bits);
    int64_t i = 0;
    for (; i + 32 <= count && out + 3 * bits + 8 <= end; i += 32, out += 4 * bits) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(codes + i));
        v = _mm256_or_si256(_mm256_and_si256(v, even8), _mm256_srl_epi64(_mm256_andnot_si256(even8, v), by8));
        v = _mm256_or_si256(_mm256_and_si256(v, even16), _mm256_srl_epi64(_mm256_andnot_si256(even16, v), by16));
        v = _mm256_or_si256(_mm256_and_si256(v, even32), _mm256_srl_epi64(_mm256_andnot_si256(even32, v), by32));
        __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        _mm_storel_epi64((__m128i *)out, low); /* beyond `bits` bytes are zeros, which the next word overwrites */
        _mm_storel_epi64((__m128i *)(out + bits), _mm_unpackhi_epi64(low, low));
        _mm_storel_epi64((__m128i *)(out + 2 * bits), high);
        _mm_storel_epi64((__m128i *)(out + 3 * bits), _mm_unpackhi_epi64(high, high));
    }
    return i;
}

/* `part8` on four words at once. */
VECTOR int64_t unpack_codes_avx2(const uint8_t *in, const uint8_t *end, int64_t count, int bits, uint8_t *codes) {
    __m256i low4 = _mm256_set1_epi64x(bits == 8 ? 0xFFFFFFFFll : (1ll << 4 * bits) - 1);
    __m256i low2 = _mm256_set1_epi32((1 << 2 * bits) - 1), low1 = _mm256_set1_epi16((int16_t)((1 << bits) - 1));
    __m128i by4 = _mm_cvtsi32_si128(4 * bits), by2 = _mm_cvtsi32_si128(2 * bits), by1 = _mm_cvtsi32_si128(bits);
    int64_t i = 0;
    for (; i + 32 <= count && in + 3 * bits + 8 <= end; i += 32, in += 4 * bits) {
        int64_t word[4];
        for (int j = 0; j < 4; j++) memcpy(word + j, in + j * bits, 8);
        __m256i v = _mm256_setr_epi64x(word[0], word[1], word[2], word[3]);
        __m256i upper = _mm256_and_si256(_mm256_srl_epi64(v, by4), low4);
        v = _mm256_or_si256(_mm256_and_si256(v, low4), _mm256_slli_epi64(upper, 32));
        upper = _mm256_and_si256(_mm256_srl_epi32(v, by2), low2);
        v = _mm256_or_si256(_mm256_and_si256(v, low2), _mm256_slli_epi32(upper, 16));
        upper = _mm256_and_si256(_mm256_srl_epi16(v, by1), low1);
        v = _mm256_or_si256(_mm256_and_si256(v, low1), _mm256_slli_epi16(upper, 8));
        _mm256_storeu_si256((__m256i *)(codes + i), v);
    }
    return i;
}

/* The entry of each code of 1..4 bits in a table of 16, to 4 bytes (`wide`) or 2. Below 4 bits the table repeats:
 * what lies above a code in its lane does no harm. */
VECTOR int64_t look_up_avx2(const uint8_t *in, const uint8_t *end, int64_t count, int bits, const uint32_t *table,
                            int wide, void *out) {
    __m256i first = _mm256_loadu_si256((const __m256i *)table), second = _mm256_loadu_si256((const __m256i *)table + 1);
    __m256i shift = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    int64_t i = 0;
    for (; i + 16 <= count && in + bits + 4 <= end; i += 16, in += 2 * bits) {
        __m256i pair[2];
        for (int j = 0; j < 2; j++) {
            int32_t word;
            memcpy(&word, in + j * bits, 4);
            __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
            pair[j] = _mm256_permutevar8x32_epi32(first, code);
            if (bits == 4) {
                __m256 upper = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(second, code));
                __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
                pair[j] = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(pair[j]), upper, which));
            }
        }
        if (wide) {
            _mm256_storeu_si256((__m256i *)((uint32_t *)out + i), pair[0]);
            _mm256_storeu_si256((__m256i *)((uint32_t *)out + i + 8), pair[1]);
        } else {
            __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(pair[0], pair[1]), 0xD8);
            _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), both);
        }
    }
    return i;
}

/* Values i..i+7 of a tensor of any dtype. */
VECTOR_INLINE __m256 load8(const void *x, int64_t i, int dtype) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)x + i);
    __m128i v = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (dtype == F16) return _mm256_cvtph_ps(v);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

/* `name`_as for each dtype. */
#define FOR_DTYPE(name, dtype, x, ...)                       \
    if (dtype == F32) return name(x, F32, __VA_ARGS__);      \
    if (dtype == BF16) return name(x, BF16, __VA_ARGS__);    \
    return name(x, F16, __VA_ARGS__)

/* The bytes of four vectors of 8 codes, in order. */
#define BYTES_OF(code)                                                                                          \
    _mm256_permutevar8x32_epi32(_mm256_packus_epi16(_mm256_packs_epi32(code[0], code[1]),                       \
                                                    _mm256_packs_epi32(code[2], code[3])),                      \
                                _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))

/* The codes of `border_codes` for 1..4 bits: the search of each lane takes its borders from one register. */
VECTOR_INLINE int64_t border_codes_as(const void *x, int dtype, int64_t n, const float *border, int bits,
                                      uint8_t *codes) {
    float level[4][8] = {{0}};
    for (int l = 0; l < bits; l++)
        for (int j = 0; j < 8; j++) level[l][j] = border[((2 * (j & ((1 << l) - 1)) + 1) << (bits - 1 - l)) - 1];
    __m256 root = _mm256_loadu_ps(level[0]), left = _mm256_set1_ps(level[1][0]), right = _mm256_set1_ps(level[1][1]);
    __m256 four = _mm256_loadu_ps(level[2]), eight = _mm256_loadu_ps(level[3]);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i code[4];
        for (int j = 0; j < 4; j++) {
            __m256 v = load8(x, i + 8 * j, dtype), reached = _mm256_cmp_ps(v, root, _CMP_GE_OQ);
            __m256i at = _mm256_srli_epi32(_mm256_castps_si256(reached), 31);
#define STEP(border)                                                                               \
    at = _mm256_sub_epi32(_mm256_add_epi32(at, at),                                                \
                          _mm256_castps_si256(_mm256_cmp_ps(v, border, _CMP_GE_OQ)))
            if (bits > 1) STEP(_mm256_blendv_ps(left, right, reached));
            if (bits > 2) STEP(_mm256_permutevar_ps(four, at));
            if (bits > 3) STEP(_mm256_permutevar8x32_ps(eight, at));
#undef STEP
            code[j] = at;
        }
        _mm256_storeu_si256((__m256i *)(codes + i), BYTES_OF(code));
    }
    return i;
}

VECTOR int64_t border_codes_avx2(const void *x, int dtype, int64_t n, const float *border, int bits, uint8_t *codes) {
    FOR_DTYPE(border_codes_as, dtype, x, n, border, bits, codes);
}
#else
#define WITH_AVX2(name, ...) ((void)vector, 0)
#endif

/* Zeros may be written after the codes, up to `room` bytes from `out` on. */
INLINE void pack_codes(const uint8_t *codes, int64_t count, int bits, int vector, uint8_t *out, int64_t room) {
    uint8_t *end = out + (count * bits + 7) / 8;
    int64_t i = WITH_AVX2(pack_codes, codes, count, bits, out, out + room);
    out += i / 8 * bits;
    for (; i + 8 <= count && out + 8 <= end; i += 8, out += bits) {
        uint64_t v;
        memcpy(&v, codes + i, 8);
        v = join8(v, bits);
        memcpy(out, &v, 8); /* beyond `bits` bytes are zeros, which the next group overwrites */
    }
    for (; i < count; i += 8, out += bits) {
        uint64_t v = 0;
        memcpy(&v, codes + i, (size_t)(count - i < 8 ? count - i : 8));
        v = join8(v, bits);
        memcpy(out, &v, (size_t)(end - out < bits ? end - out : bits));
    }
}

/* Writes 8 * ceil(count / 8) codes; `room` bytes from `in` on may be read. */
INLINE void unpack_codes(const uint8_t *in, int64_t room, int64_t count, int bits, int vector, uint8_t *codes) {
    const uint8_t *end = in + room;
    int64_t i = WITH_AVX2(unpack_codes, in, end, count, bits, codes);
    in += i / 8 * bits;
    for (; i < count; i += 8, in += bits) {
        uint64_t v = 0;
        if (in + 8 <= end)
            memcpy(&v, in, 8);
        else
            memcpy(&v, in, (size_t)(end - in < bits ? end - in : bits));
        v = part8(v, bits);
        memcpy(codes + i, &v, 8);
    }
}

/* 8 flags, 0 or 1 in each byte, to 8 bits */
INLINE uint8_t flags_to_byte(uint64_t flags) { return (uint8_t)(flags * 0x0102040810204080ull >> 56); }

#ifdef X86
VECTOR int64_t widen_avx2(const uint16_t *in, int64_t n, int dtype, float *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, dtype == BF16 ? load8(in, i, BF16) : load8(in, i, F16));
    return i;
}
#endif

/* Values from..n-1 as float32: in `room`, where they are not. */
INLINE const float *widened(const void *x, int64_t from, int64_t n, int dtype, int vector, float *room) {
    if (dtype == F32) return x;
    const uint16_t *in = (const uint16_t *)x + from;
    float *out = room + from;
    n -= from;
    for (int64_t i = WITH_AVX2(widen, in, n, dtype, out); i < n; i++)
        out[i] = float_of(dtype == BF16 ? (uint32_t)in[i] << 16 : half_to_single(in[i]));
    return room;
}

/* ----------------------------------------------------------------------------------------- selection */

#ifdef X86
/* The sum of 8 lanes, which fits into one. */
VECTOR_INLINE uint32_t total(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1));
    return (uint32_t)_mm_cvtsi128_si32(half);
}

VECTOR int64_t count32_avx2(const uint32_t *key, int64_t n, uint32_t least, int64_t *count) {
    __m256i from = _mm256_set1_epi32((int32_t)least), sum[4] = {_mm256_setzero_si256()};
    sum[1] = sum[2] = sum[3] = sum[0];
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 4; j++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(key + i + 8 * j));
            sum[j] = _mm256_sub_epi32(sum[j], _mm256_cmpeq_epi32(_mm256_max_epu32(v, from), v));
        }
    *count += total(_mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3])));
    return i;
}

VECTOR int64_t count16_avx2(const uint16_t *key, int64_t n, uint16_t least, int64_t *count) {
    __m256i from = _mm256_set1_epi16((int16_t)least), sum[2] = {_mm256_setzero_si256()};
    sum[1] = sum[0];
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 2; j++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(key + i + 16 * j));
            sum[j] = _mm256_sub_epi16(sum[j], _mm256_cmpeq_epi16(_mm256_max_epu16(v, from), v));
        }
    *count += total(_mm256_madd_epi16(_mm256_add_epi16(sum[0], sum[1]), _mm256_set1_epi16(1)));
    return i;
}

VECTOR int64_t mark32_avx2(const uint32_t *key, int64_t n, uint32_t least, uint8_t *mask) {
    __m256i from = _mm256_set1_epi32((int32_t)least);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(key + i));
        v = _mm256_cmpeq_epi32(_mm256_max_epu32(v, from), v);
        mask[i / 8] = (uint8_t)_mm256_movemask_ps(_mm256_castsi256_ps(v));
    }
    return i;
}

VECTOR int64_t mark16_avx2(const uint16_t *key, int64_t n, uint16_t least, uint8_t *mask) {
    __m128i from = _mm_set1_epi16((int16_t)least);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i v = _mm_loadu_si128((const __m128i *)(key + i));
        v = _mm_cmpeq_epi16(_mm_max_epu16(v, from), v);
        mask[i / 8] = (uint8_t)_mm_movemask_epi8(_mm_packs_epi16(v, _mm_setzero_si128()));
    }
    return i;
}
#endif

/* How many keys are at least `least`, and one bit a key that says so. */
#define REACH(width)                                                                                              \
    INLINE int64_t count##width(const uint##width##_t *key, int64_t n, uint##width##_t least, int vector) {       \
        int64_t total = 0;                                                                                        \
        for (int64_t i = 0; i < n; i += CHUNK) {                                                                  \
            int64_t m = n - i < CHUNK ? n - i : CHUNK;                                                            \
            uint##width##_t c = 0;                                                                                \
            for (int64_t j = WITH_AVX2(count##width, key + i, m, least, &total); j < m; j++)                      \
                c = (uint##width##_t)(c + (uint##width##_t)(key[i + j] >= least));                                \
            total += c;                                                                                           \
        }                                                                                                         \
        return total;                                                                                             \
    }                                                                                                             \
    INLINE void mark##width(const uint##width##_t *key, int64_t n, uint##width##_t least, int vector,             \
                            uint8_t *mask) {                                                                      \
        for (int64_t i = WITH_AVX2(mark##width, key, n, least, mask); i < n; i += 8) {                            \
            uint32_t byte = 0;                                                                                    \
            for (int64_t j = 0; j < 8 && i + j < n; j++) byte |= (uint32_t)(key[i + j] >= least) << j;            \
            mask[i / 8] = (uint8_t)byte;                                                                          \
        }                                                                                                         \
    }

REACH(32)
REACH(16)

/* A threshold that at least k keys reach, and the count that does; more than k only where keys are equal.
 * 0 < k < n. Invariant: `below` keys reach lo, `above` keys reach hi, below > k > above. */
INLINE uint32_t find_threshold(const void *key, int wide, int64_t n, int64_t k, int vector, uint32_t guess,
                               int64_t *reached) {
    int64_t lo = 0, hi = wide ? 0x100000000ll : 0x10000;
    int64_t below = n, above = 0, step = wide ? 1 << 18 : 4;
    int64_t at = guess;
    for (int round = 0; hi - lo > 1; round++) {
        if (at <= lo) at = lo + 1;
        if (at >= hi) at = hi - 1;
        int64_t count = wide ? count32(key, n, (uint32_t)at, vector) : count16(key, n, (uint16_t)at, vector);
        if (count == k) {
            lo = at;
            below = count;
            break;
        }
        if (count > k)
            lo = at, below = count;
        else
            hi = at, above = count;
        if (hi - lo > 64 * step) { /* still far: gallop away from the guess */
            at = count > k ? lo + step : hi - step;
            step *= 4;
        } else if (round & 1) {
            at = lo + (hi - lo) / 2;
        } else { /* between two near points counts fall about linearly */
            at = lo + (int64_t)((double)(hi - lo) * (double)(below - k) / (double)(below - above));
        }
    }
    *reached = below;
    return (uint32_t)lo;
}

/* ------------------------------------------------------------------------------------------ value coder */

typedef struct {
    float *x;          /* kept values as float32 */
    uint8_t *codes;
    uint32_t *index;   /* their flat indices, for stochastic rounding */
    uint32_t *key;     /* selection keys */
    float *standard;   /* the block with each channel around 0, in the dtype of x */
    uint32_t guess;
} Scratch;

INLINE int is_codebook(int bits, int layout) { return layout == SYMMETRIC && bits <= 3; }
INLINE int scale_columns(int bits, int layout) { return is_codebook(bits, layout) ? 1 << (bits - 1) : 2; }

INLINE float grid(float start, float width, float step) {
    float scaled = step * width;
    float root = start + scaled;
    return root * root;
}

/* `count` levels (magnitudes, where symmetric) between the two numbers of the scale. */
typedef struct {
    int count;
    float base, start, end, span, width;
    float zoom, inverse; /* 1 / width in two parts: alone, that of a tiny span would overflow */
} Grid;

INLINE Grid make_grid(int layout, int bits, float first, float last) {
    Grid g = {1 << (layout == SYMMETRIC ? bits - 1 : bits), 0, 0, last, 0, 0, 1, 0};
    if (layout == SYMMETRIC)
        g.start = first;
    else
        g.base = first;
    g.span = last - (layout == UNIFORM ? first : g.start);
    if (layout == UNIFORM && g.span < 0x1p-64f) g.zoom = 0x1p64f;
    if (g.span > 0) g.inverse = (float)(g.count - 1) / (g.span * g.zoom);
    g.width = g.span / (float)(g.count - 1);
    return g;
}

/* How far a level lies above the base. */
INLINE float above_base(const Grid *g, int is_uniform, float step) {
    if (!is_uniform) return grid(g->start, g->width, step);
    float above = step * g->width;
    return above > g->span ? g->span : above;
}

INLINE float level_of(const Grid *g, int is_uniform, float step) {
    if (!is_uniform) return g->base + grid(g->start, g->width, step);
    float scaled = step * g->width;
    float level = g->base + scaled;
    return level > g->end ? g->end : level;
}

#ifdef X86
/* Of what reaches a border: the sums of values and of the low and high halves of their squares. */
typedef struct {
    __m256i sum, low, high;
} Sums;

VECTOR_INLINE void add_masked(Sums *to, __m256i in, __m256i v, __m256i low, __m256i high) {
    to->sum = _mm256_add_epi32(to->sum, _mm256_and_si256(v, in));
    to->low = _mm256_add_epi32(to->low, _mm256_and_si256(low, in));
    to->high = _mm256_add_epi32(to->high, _mm256_and_si256(high, in));
}

VECTOR_INLINE int64_t codebook_as(const float *x, int64_t k, int count, const uint32_t *border, float unit, float rest,
                                  uint8_t *codes, int64_t *sum, int64_t *square) {
    __m256i magnitude = _mm256_set1_epi32(INT32_MAX), one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0xFFFF);
    __m256i sign = _mm256_set1_epi32(count);
    __m256 scale = _mm256_set1_ps(unit), scale2 = _mm256_set1_ps(rest);
    __m256i under[4]; /* one less than the border: the comparison is strict */
    Sums sums[4];
    for (int j = 0; j < count; j++) {
        under[j] = _mm256_set1_epi32((int32_t)border[j] - 1);
        sums[j].sum = sums[j].low = sums[j].high = _mm256_setzero_si256();
    }
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        __m256i code[4];
        for (int part = 0; part < 4; part++) {
            __m256i u = _mm256_loadu_si256((const __m256i *)(x + i + 8 * part)), m = _mm256_and_si256(u, magnitude);
            __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(_mm256_castsi256_ps(m), scale), scale2);
            __m256i v = _mm256_srli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(scaled), one), 1);
            __m256i q = _mm256_madd_epi16(v, v); /* right for 2^15 too, which is -2^15 there */
            __m256i low = _mm256_and_si256(q, half), high = _mm256_srli_epi32(q, 16);
            code[part] = _mm256_and_si256(_mm256_srai_epi32(u, 31), sign);
            sums[0].sum = _mm256_add_epi32(sums[0].sum, v);
            sums[0].low = _mm256_add_epi32(sums[0].low, low);
            sums[0].high = _mm256_add_epi32(sums[0].high, high);
            for (int j = 1; j < count; j++) {
                __m256i in = _mm256_cmpgt_epi32(m, under[j]);
                add_masked(&sums[j], in, v, low, high);
                code[part] = _mm256_sub_epi32(code[part], in);
            }
        }
        _mm256_storeu_si256((__m256i *)(codes + i), BYTES_OF(code));
    }
    for (int j = 0; j < count; j++) {
        sum[j] += total(sums[j].sum);
        square[j] += total(sums[j].low) + ((int64_t)total(sums[j].high) << 16);
    }
    return i;
}

VECTOR int64_t codebook_avx2(const float *x, int64_t k, int count, const uint32_t *border, float unit, float rest,
                             uint8_t *codes, int64_t *sum, int64_t *square) {
    if (count == 1) return codebook_as(x, k, 1, border, unit, rest, codes, sum, square);
    if (count == 2) return codebook_as(x, k, 2, border, unit, rest, codes, sum, square);
    return codebook_as(x, k, 4, border, unit, rest, codes, sum, square);
}
#endif

/* `share` neighbouring cells have one level. */
INLINE void encode_codebook(const float *x, int64_t k, int bits, int share, float low, float high, int vector,
                            uint8_t *codes, float *scale) {
    int count = 1 << (bits - 1);
    uint32_t border[4] = {0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF};
    float low_root = sqrtf(low), high_root = sqrtf(high);
    if (bits == 3) low_root = sqrtf(low_root), high_root = sqrtf(high_root);
    double first = low_root, last = high_root;
    for (int j = 1; j < count; j++) {
        double span = last - first;
        double part = span * ((double)j / count);
        double root = first + part;
        double b = root * root;
        if (bits == 3) b = b * b;
        border[j] = bits_of((float)b);
    }
    int32_t largest = (int32_t)(bits_of(high) >> 23);
    largest = largest > 0 ? largest : 1;
    /* |x| in units of 2^(largest - 141), integers up to 2^15, rounded half up: twice that is cut off, then halved.
     * The factor is a power of two, in two parts that no exponent can make overflow. */
    int32_t power = 142 - largest, part = power / 2;
    float unit = float_of((uint32_t)(127 + part) << 23), rest = float_of((uint32_t)(127 + power - part) << 23);
    int64_t sum[5] = {0}, square[5] = {0}; /* of what reaches border j */
    for (int64_t from = 0; from < k; from += CHUNK) {
        int64_t n = k - from < CHUNK ? k - from : CHUNK;
        const float *y = x + from;
        uint8_t *c = codes + from;
        for (int64_t i = WITH_AVX2(codebook, y, n, count, border, unit, rest, c, sum, square); i < n; i++) {
            uint32_t u = bits_of(y[i]), m = u & 0x7FFFFFFF, code = (u >> 31) * (uint32_t)count;
            float scaled = float_of(m) * unit;
            int64_t v = ((int32_t)(scaled * rest) + 1) >> 1;
            for (int j = 0; j < count; j++) {
                int64_t in = m >= border[j];
                sum[j] += in * v;
                square[j] += in * v * v;
                code += j > 0 && in;
            }
            c[i] = (uint8_t)code;
        }
    }
    for (int j = 0; j < count / share; j++) {
        int from = share * j, to = from + share;
        int64_t s = sum[from] - sum[to], q = square[from] - square[to];
        float level = (float)ldexp((double)q / (double)(s > 1 ? s : 1), largest - 141);
        uint32_t u = bits_of(nearest_bfloat(level));
        scale[j] = float_of(u > TOP_BITS ? TOP_BITS : u);
    }
    if (share == 1) return;
    for (int64_t i = 0; i < k; i++) codes[i] = (uint8_t)((codes[i] & count) | (codes[i] & (count - 1)) / share);
}

INLINE void encode_codebook_stochastic(const float *x, const uint32_t *index, int64_t seed, int64_t k, int bits,
                                       float low, float high, uint8_t *codes, float *scale) {
    int count = 1 << (bits - 1);
    if (bits == 1) {
        float top = round_up(high), twice = top + top;
        scale[0] = top;
        for (int64_t i = 0; i < k; i++) {
            float drawn = uniform(draw(seed, index[i])) * twice;
            codes[i] = drawn >= x[i] + top;
        }
        return;
    }
    scale[0] = round_down(low);
    scale[count - 1] = round_up(high);
    float start = sqrtf(low), width = (sqrtf(high) - start) / (float)(count - 1);
    for (int j = 1; j < count - 1; j++) {
        float level = nearest_bfloat(grid(start, width, (float)j));
        level = level < scale[0] ? scale[0] : level;
        scale[j] = level > scale[count - 1] ? scale[count - 1] : level;
    }
    for (int64_t i = 0; i < k; i++) {
        float m = fabsf(x[i]);
        int step = 0;
        for (int j = 1; j < count - 1; j++) step += m >= scale[j];
        float gap = scale[step + 1] - scale[step], above = m - scale[step];
        step += uniform(draw(seed, index[i])) * gap < above;
        codes[i] = (uint8_t)(step | (int)(bits_of(x[i]) >> 31) * count);
    }
}

#ifdef X86
VECTOR_INLINE int64_t encode_grid_as(const void *x, int dtype, int64_t k, int layout, const Grid *g, uint8_t *codes) {
    __m256 zero = _mm256_setzero_ps(), first = _mm256_set1_ps(g->start), less = _mm256_set1_ps(g->base);
    __m256 scale = _mm256_set1_ps(g->inverse), half = _mm256_set1_ps(0.5f), minus = _mm256_set1_ps(-0.0f);
    __m256 zoom = _mm256_set1_ps(g->zoom);
    __m256i top = _mm256_set1_epi32(g->count - 1), sign = _mm256_set1_epi32(g->count);
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        __m256i code[4];
        for (int j = 0; j < 4; j++) {
            __m256 v = load8(x, i + 8 * j, dtype);
            __m256 m = layout == SYMMETRIC ? _mm256_andnot_ps(minus, v) : _mm256_max_ps(_mm256_sub_ps(v, less), zero);
            m = layout == UNIFORM ? _mm256_mul_ps(m, zoom) : _mm256_sub_ps(_mm256_sqrt_ps(m), first);
            m = _mm256_add_ps(_mm256_mul_ps(m, scale), half);
            code[j] = _mm256_min_epi32(_mm256_cvttps_epi32(m), top);
            if (layout == SYMMETRIC)
                code[j] = _mm256_or_si256(code[j],
                                          _mm256_and_si256(_mm256_srai_epi32(_mm256_castps_si256(v), 31), sign));
        }
        _mm256_storeu_si256((__m256i *)(codes + i), BYTES_OF(code));
    }
    return i;
}

VECTOR int64_t encode_grid_avx2(const void *x, int dtype, int64_t k, int layout, const Grid *g, uint8_t *codes) {
    if (layout == UNIFORM) {
        FOR_DTYPE(encode_grid_as, dtype, x, k, UNIFORM, g, codes);
    }
    if (layout == AFFINE) {
        FOR_DTYPE(encode_grid_as, dtype, x, k, AFFINE, g, codes);
    }
    FOR_DTYPE(encode_grid_as, dtype, x, k, SYMMETRIC, g, codes);
}
#endif

INLINE float coded_part(const Grid *g, int layout, float x) {
    float m = layout == SYMMETRIC ? fabsf(x) : x - g->base;
    return m < 0 ? 0 : m;
}

INLINE float position_of(const Grid *g, int layout, float m) {
    float along = layout == UNIFORM ? m * g->zoom : sqrtf(m) - g->start;
    return along * g->inverse;
}

/* Equal steps of x, or of the square root of |x| or x - base. */
INLINE void encode_grid(const void *kept, int dtype, float *room, const uint32_t *index, const int64_t *seed, int64_t k,
                        int layout, const Grid *g, int vector, uint8_t *codes) {
    int32_t top = g->count - 1, sign = layout == SYMMETRIC ? g->count : 0;
    int is_uniform = layout == UNIFORM;
    int64_t done = seed ? 0 : WITH_AVX2(encode_grid, kept, dtype, k, layout, g, codes);
    const float *x = widened(kept, done, k, dtype, vector, room);
    if (!seed) {
        for (int64_t i = done; i < k; i++) {
            float m = coded_part(g, layout, x[i]);
            int32_t step = (int32_t)(position_of(g, layout, m) + 0.5f);
            step = step > top ? top : step;
            codes[i] = (uint8_t)(step + (int32_t)(bits_of(x[i]) >> 31) * sign);
        }
        return;
    }
    for (int64_t i = 0; i < k; i++) {
        float m = coded_part(g, layout, x[i]);
        int32_t step = (int32_t)position_of(g, layout, m);
        step = step > top - 1 ? top - 1 : step;
        float lower = above_base(g, is_uniform, (float)step), upper = above_base(g, is_uniform, (float)(step + 1));
        float drawn = uniform(draw(*seed, index[i])) * (upper - lower), above = m - lower;
        step += drawn < above;
        codes[i] = (uint8_t)(step + (int32_t)(bits_of(x[i]) >> 31) * sign);
    }
}

/* Least and greatest magnitude or, where signed, value, in an order of integers: NaN beyond Inf. */
INLINE int32_t order_key(uint32_t u, int is_signed) {
    return is_signed ? (int32_t)(u ^ (uint32_t)((int32_t)u >> 31) >> 1) : (int32_t)(u & 0x7FFFFFFF);
}

INLINE void find_range32(const uint32_t *x, int64_t k, int is_signed, uint32_t *least, uint32_t *most) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < k; i++) {
        int32_t key = order_key(x[i], is_signed);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    *least = (uint32_t)order_key((uint32_t)low, is_signed);
    *most = (uint32_t)order_key((uint32_t)high, is_signed);
}

INLINE int16_t order_key16(uint16_t u, int is_signed) {
    return is_signed ? (int16_t)(u ^ (uint16_t)((int16_t)u >> 15) >> 1) : (int16_t)(u & 0x7FFF);
}

INLINE void find_range16(const uint16_t *x, int64_t k, int is_signed, uint16_t *least, uint16_t *most) {
    int16_t low = INT16_MAX, high = INT16_MIN;
    for (int64_t i = 0; i < k; i++) {
        int16_t key = order_key16(x[i], is_signed);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    *least = (uint16_t)order_key16((uint16_t)low, is_signed);
    *most = (uint16_t)order_key16((uint16_t)high, is_signed);
}

INLINE void find_range(const void *x, int dtype, int64_t k, int is_signed, float *least, float *most) {
    if (dtype == F32) {
        uint32_t low, high;
        if (is_signed)
            find_range32(x, k, 1, &low, &high);
        else
            find_range32(x, k, 0, &low, &high);
        *least = float_of(low);
        *most = float_of(high);
    } else {
        uint16_t ends[2];
        float wide[2];
        if (is_signed)
            find_range16(x, k, 1, ends, ends + 1);
        else
            find_range16(x, k, 0, ends, ends + 1);
        widened(ends, 0, 2, dtype, 0, wide);
        *least = wide[0];
        *most = wide[1];
    }
}

INLINE int is_finite(float x) { return (bits_of(x) & 0x7FFFFFFF) < INFINITY_BITS; }

/* The values that are finite as float32 in s->x, with their indices; where they stood in s->key, and behind that,
 * from its end on, which of the others are negative. How many are finite. */
static int64_t leave_finite(Scratch *s, const void *kept, int64_t k, int dtype, int draws, int *has_nan) {
    const float *x = widened(kept, 0, k, dtype, 0, s->x);
    int64_t count = 0, end = k;
    for (int64_t i = 0; i < k; i++) {
        if (!is_finite(x[i])) {
            *has_nan |= x[i] != x[i];
            s->key[--end] = bits_of(x[i]) >> 31;
            continue;
        }
        s->x[count] = x[i];
        if (draws) s->index[count] = s->index[i];
        s->key[count++] = (uint32_t)i;
    }
    return count;
}

/* Codes of `count` values back to where they stood; what was left out has codes that are no value's then. */
static void spread_codes(Scratch *s, int64_t count, int64_t k, int bits, int layout, int infinite) {
    uint32_t last = (1u << bits) - 1, top = last >> 1;
    const uint32_t *negative = s->key + count;
    while (k-- > 0) {
        if (count == 0 || s->key[count - 1] != (uint32_t)k) {
            uint32_t minus = infinite ? *negative++ : 0;
            if (layout == SYMMETRIC)
                s->codes[k] = (uint8_t)(infinite && !minus ? top : last);
            else
                s->codes[k] = (uint8_t)(last - minus);
            continue;
        }
        uint32_t code = s->codes[--count], most = last - 1 - (uint32_t)infinite;
        if (layout == SYMMETRIC)
            code -= code == last || (infinite && code == top);
        else
            code = code > most ? most : code;
        s->codes[k] = (uint8_t)code;
    }
}

/* A bfloat16, or where that is not as odd as asked the next one above; the greatest of all stays. */
INLINE uint16_t with_parity(uint16_t u, int odd) {
    if ((u & 1) == odd || u == TOP_BITS >> 16) return u;
    return (uint16_t)(u >> 15 ? u - 1 : u + 1);
}

INLINE float told(float x, int odd) { return float_of((uint32_t)with_parity((uint16_t)(bits_of(x) >> 16), odd) << 16); }

/* Marks a scale, or takes the mark away. */
INLINE void turn_mark(uint16_t *scale, int columns, int layout) {
    uint16_t first = scale[0];
    if (layout != UNIFORM) {
        scale[columns - 1] ^= 0x8000;
    } else {
        scale[0] = scale[1];
        scale[1] = first;
    }
}

INLINE int has_mark(const uint16_t *scale, int columns, int layout) {
    if (layout != UNIFORM) return scale[columns - 1] >> 15;
    return float_of((uint32_t)scale[0] << 16) >= float_of((uint32_t)scale[1] << 16);
}

/* One bit, of a block with values that are not finite: code 1 is theirs, and what they are is the scale. */
static void encode_kind(Scratch *s, const void *kept, int64_t k, int dtype, int columns, uint16_t *scale) {
    const float *x = widened(kept, 0, k, dtype, 0, s->x);
    uint32_t kind = 0;
    for (int64_t i = 0; i < k; i++) {
        s->codes[i] = (uint8_t)!is_finite(x[i]);
        if (is_finite(x[i])) continue;
        kind = kind == 0 || kind == bits_of(x[i]) ? bits_of(x[i]) : 0x7FC00000;
    }
    int is_nan = (kind & 0x7FFFFFFF) > INFINITY_BITS;
    for (int j = 0; j < columns; j++) scale[j] = is_nan ? 0x7FC0 : (uint16_t)(kind >> 16);
}

/* `room`: bytes from `values` on that this thread owns and has not written yet. */
INLINE void encode_block(const Job *job, Scratch *s, const void *kept, int64_t k, uint8_t *values, int64_t room,
                         uint16_t *scale_out) {
    int bits = job->bits, layout = job->layout, dtype = job->dtype, vector = job->vector;
    int columns = scale_columns(bits, layout), is_marked = 0, is_unread = 0, has_nan = 0;
    int64_t count = k; /* of what is finite */
    float scale[4] = {0}, low = 0, high = 0;
    if (k > 0) find_range(kept, dtype, k, layout != SYMMETRIC, &low, &high);
    if (!is_finite(low) || !is_finite(high)) {
        if (bits == 1) {
            encode_kind(s, kept, k, dtype, columns, scale_out);
            pack_codes(s->codes, k, bits, vector, values, room);
            return;
        }
        is_marked = 1;
        count = leave_finite(s, kept, k, dtype, job->seed != NULL, &has_nan);
        kept = s->x, dtype = F32;
        if (count > 0) find_range(kept, F32, count, layout != SYMMETRIC, &low, &high);
    }
    if (count > 0) {
        if (is_codebook(bits, layout)) {
            const float *x = widened(kept, 0, count, dtype, vector, s->x);
            int share = is_marked ? 2 : 1;
            if (job->seed)
                encode_codebook_stochastic(x, s->index, *job->seed, count, bits, low, high, s->codes, scale);
            else if (bits == 1)
                encode_codebook(x, count, 1, 1, low, high, vector, s->codes, scale);
            else if (bits == 2)
                encode_codebook(x, count, 2, share, low, high, vector, s->codes, scale);
            else
                encode_codebook(x, count, 3, share, low, high, vector, s->codes, scale);
        } else {
            if (layout == SYMMETRIC) {
                scale[0] = round_down(sqrtf(low));
                scale[1] = round_up(sqrtf(high));
            } else {
                scale[0] = floor_bfloat(low);
                scale[1] = ceil_bfloat(high);
                if (is_marked && layout == UNIFORM) scale[1] = told(scale[1], has_nan);
                float most = layout == UNIFORM && scale[1] > high ? scale[1] : high, widest = most - scale[0];
                is_unread = !is_finite(widest);
                if (layout == AFFINE) scale[1] = round_up(sqrtf(widest < 0 ? 0 : widest));
            }
            if (is_marked) scale[1] = told(scale[1], has_nan);
            if (!is_unread) {
                Grid g = make_grid(layout, bits, scale[0], scale[1]);
#define ENCODE(layout) encode_grid(kept, dtype, s->x, s->index, job->seed, count, layout, &g, vector, s->codes)
                if (layout == SYMMETRIC)
                    ENCODE(SYMMETRIC);
                else if (layout == AFFINE)
                    ENCODE(AFFINE);
                else
                    ENCODE(UNIFORM);
#undef ENCODE
            }
        }
    }
    if (is_marked) scale[columns - 1] = told(scale[columns - 1], has_nan);
    for (int j = 0; j < columns; j++) scale_out[j] = is_unread ? 0x7FC0 : (uint16_t)(bits_of(scale[j]) >> 16);
    if (is_unread) {
        memset(s->codes, 0, (size_t)k);
    } else if (is_marked) {
        spread_codes(s, count, k, bits, layout, !(scale_out[columns - 1] & 1));
        turn_mark(scale_out, columns, layout);
    }
    pack_codes(s->codes, k, bits, vector, values, room);
}

/* A level, as a pattern of the output's dtype; finite ones beyond its greatest number become that. */
INLINE uint32_t narrow(uint32_t u, int dtype) {
    return dtype == F32 ? u : dtype == BF16 ? single_to_bfloat(u) : single_to_half(u);
}

INLINE uint32_t greatest(int dtype) { return dtype == F16 ? 0x477FE000 : dtype == BF16 ? TOP_BITS : 0x7F7FFFFF; }

INLINE uint32_t clamp_and_narrow(uint32_t u, int dtype) {
    uint32_t m = u & 0x7FFFFFFF, top = greatest(dtype);
    return narrow(m <= INFINITY_BITS && m > top ? (u & 0x80000000) | top : u, dtype);
}

#ifdef X86
/* The levels of a stream of codes; none beyond the greatest number of the dtype, which is not F16. */
VECTOR_INLINE int64_t decode_grid_as(const uint8_t *in, const uint8_t *end, int64_t k, int bits, int layout, int wide,
                                     const Grid *g, void *out) {
    __m256 from = _mm256_set1_ps(layout == SYMMETRIC ? g->start : g->base), unit = _mm256_set1_ps(g->width);
    __m256 top = _mm256_set1_ps(g->end);
    __m256i steps = _mm256_set1_epi32(g->count - 1), one = _mm256_set1_epi32(1);
    __m256i minus = _mm256_set1_epi32(INT32_MIN), half = _mm256_set1_epi32(0x7FFF);
    /* Four codes from the first byte on, four from where the fifth begins */
    __m256i lane = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3), _mm256_set1_epi32(bits));
    int odd = bits % 2 * 4;
    __m256i shift = _mm256_add_epi32(lane, _mm256_setr_epi32(0, 0, 0, 0, odd, odd, odd, odd));
    __m256i up = _mm256_sub_epi32(_mm256_set1_epi32(32 - bits), shift);
    __m128i down = _mm_cvtsi32_si128(32 - bits);
    int64_t i = 0;
    for (; i + 16 <= k && in + bits + bits / 2 + 4 <= end; i += 16, in += 2 * bits) {
        __m256i level[2];
        for (int j = 0; j < 2; j++) {
            int32_t word[2];
            memcpy(word, in + j * bits, 4);
            memcpy(word + 1, in + j * bits + bits / 2, 4);
            __m256i v = _mm256_blend_epi32(_mm256_set1_epi32(word[0]), _mm256_set1_epi32(word[1]), 0xF0);
            __m256 root;
            if (layout != SYMMETRIC) {
                root = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(v, shift), steps));
                root = _mm256_mul_ps(root, unit);
                root = layout == AFFINE ? _mm256_add_ps(from, _mm256_mul_ps(root, root))
                                        : _mm256_min_ps(_mm256_add_ps(from, root), top);
                level[j] = _mm256_castps_si256(root);
            } else {
                v = _mm256_sllv_epi32(v, up); /* the sign is the first bit now */
                root = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(v, down), steps));
                root = _mm256_add_ps(from, _mm256_mul_ps(root, unit));
                level[j] = _mm256_castps_si256(_mm256_mul_ps(root, root));
                level[j] = _mm256_or_si256(level[j], _mm256_and_si256(v, minus));
            }
            if (!wide) {
                v = _mm256_and_si256(_mm256_srli_epi32(level[j], 16), one);
                level[j] = _mm256_srli_epi32(_mm256_add_epi32(level[j], _mm256_add_epi32(v, half)), 16);
            }
        }
        if (wide) {
            _mm256_storeu_si256((__m256i *)((uint32_t *)out + i), level[0]);
            _mm256_storeu_si256((__m256i *)((uint32_t *)out + i + 8), level[1]);
        } else {
            __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(level[0], level[1]), 0xD8);
            _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), both);
        }
    }
    return i;
}

VECTOR_INLINE int64_t decode_grid_in(const uint8_t *in, const uint8_t *end, int64_t k, int bits, int layout, int wide,
                                     const Grid *g, void *out) {
    if (bits == 4 && k >= 64) { /* few levels: made once, then looked up */
        static const uint8_t every_code[16] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE};
        uint32_t table[16] = {0};
        decode_grid_as(every_code, every_code + 16, 16, 4, layout, 1, g, table);
        if (!wide)
            for (int c = 0; c < 16; c++) table[c] = (table[c] + 0x7FFF + (table[c] >> 16 & 1)) >> 16;
        return look_up_avx2(in, end, k, 4, table, wide, out);
    }
    return wide ? decode_grid_as(in, end, k, bits, layout, 1, g, out)
                : decode_grid_as(in, end, k, bits, layout, 0, g, out);
}

VECTOR int64_t decode_grid_avx2(const uint8_t *in, const uint8_t *end, int64_t k, int bits, int layout, int wide,
                                const Grid *g, void *out) {
    if (layout == UNIFORM) return decode_grid_in(in, end, k, bits, UNIFORM, wide, g, out);
    if (layout == AFFINE) return decode_grid_in(in, end, k, bits, AFFINE, wide, g, out);
    return decode_grid_in(in, end, k, bits, SYMMETRIC, wide, g, out);
}
#endif

/* k codes of a grid. `room` bytes may be read. */
INLINE void decode_grid(const uint8_t *packed, int64_t room, int64_t k, const uint16_t *scale, int bits, int layout,
                        int is_uniform, int dtype, int vector, uint8_t *codes, void *out) {
    Grid g = make_grid(layout, bits, float_of((uint32_t)scale[0] << 16), float_of((uint32_t)scale[1] << 16));
    int32_t steps = g.count - 1;
    uint32_t signs = layout == SYMMETRIC ? 0x80000000 : 0;
    float high = level_of(&g, is_uniform, (float)steps), low = level_of(&g, is_uniform, 0.0f);
    float top = float_of(greatest(dtype));
    int tame = fabsf(high) <= top && fabsf(low) <= top;
#define LEVEL                                                                        \
    bits_of(level_of(&g, is_uniform, (float)((int32_t)codes[i] & steps))) ^          \
        ((uint32_t)codes[i] << (32 - bits) & signs)
    if (tame && dtype != F16) {
        int64_t done = WITH_AVX2(decode_grid, packed, packed + room, k, bits, layout, dtype == F32, &g, out);
        int64_t bytes = done / 8 * bits;
        packed += bytes, room -= bytes, k -= done;
        out = (uint8_t *)out + done * (dtype == F32 ? 4 : 2);
    }
    unpack_codes(packed, room, k, bits, vector, codes);
    if (tame && dtype == F32)
        for (int64_t i = 0; i < k; i++) ((uint32_t *)out)[i] = LEVEL;
    else if (tame && dtype == F16)
        for (int64_t i = 0; i < k; i++) ((uint16_t *)out)[i] = single_to_half(LEVEL);
    else
        for (int64_t i = 0; i < k; i++) {
            uint32_t u = clamp_and_narrow(LEVEL, dtype);
            if (dtype == F32)
                ((uint32_t *)out)[i] = u;
            else
                ((uint16_t *)out)[i] = (uint16_t)u;
        }
#undef LEVEL
}

/* The value of each code, for 1..3 bits and 16 codes, which repeat. */
INLINE void codebook_table(const uint16_t *scale, int bits, int dtype, uint32_t *table) {
    uint32_t count = 1u << (bits - 1);
    for (uint32_t c = 0; c < 16; c++)
        table[c] = clamp_and_narrow(((uint32_t)scale[c & (count - 1)] << 16) ^ (c & count ? 0x80000000 : 0), dtype);
}

INLINE void look_up(const uint8_t *codes, int64_t k, const uint32_t *table, int wide, void *out) {
    if (wide)
        for (int64_t i = 0; i < k; i++) ((uint32_t *)out)[i] = table[codes[i]];
    else
        for (int64_t i = 0; i < k; i++) ((uint16_t *)out)[i] = (uint16_t)table[codes[i]];
}

/* What is not finite, where its codes stand: as float32 patterns. */
static void set_codes(const uint8_t *codes, int64_t k, int code, uint32_t u, int dtype, void *out) {
    uint32_t as = narrow(u, dtype);
    for (int64_t i = 0; i < k; i++) {
        if (codes[i] != code) continue;
        if (dtype == F32)
            ((uint32_t *)out)[i] = as;
        else
            ((uint16_t *)out)[i] = (uint16_t)as;
    }
}

/* `last`: the last number of the scale of a marked block. */
static void set_marked(const uint8_t *codes, int64_t k, uint16_t last, int bits, int layout, int dtype, void *out) {
    int top = (1 << bits) - 1, infinite = !(last & 1);
    uint32_t minus = layout == SYMMETRIC ? 0x80000000 : 0;
    set_codes(codes, k, top, infinite ? INFINITY_BITS | minus : 0x7FC00000, dtype, out);
    if (infinite) set_codes(codes, k, minus ? top >> 1 : top - 1, INFINITY_BITS | (minus ^ 0x80000000), dtype, out);
}

/* ------------------------------------------------------------------------------------------- one block */

/* Positions of the set bits of one block's mask, 64 at a time. */
INLINE uint64_t mask_word(const uint8_t *mask, int64_t n, int64_t i) {
    uint64_t word = 0;
    int64_t bytes = (n - i + 7) / 8;
    if (bytes >= 8)
        memcpy(&word, mask + i / 8, 8);
    else
        memcpy(&word, mask + i / 8, (size_t)bytes);
    return word;
}

/* Writes the block's mask. */
INLINE void mark(const void *key, int wide, int64_t n, int64_t k, int vector, uint8_t *mask, uint32_t *guess) {
    int64_t reached = n;
    uint32_t least = 0;
    if (k == 0) {
        memset(mask, 0, (size_t)(n + 7) / 8);
        return;
    }
    if (k < n) least = *guess = find_threshold(key, wide, n, k, vector, *guess, &reached);
    if (wide)
        mark32(key, n, least, vector, mask);
    else
        mark16(key, n, (uint16_t)least, vector, mask);
    for (int64_t i = n - 1; reached > k; i--) { /* ties: the last ones go */
        uint32_t at = wide ? ((const uint32_t *)key)[i] : ((const uint16_t *)key)[i];
        if (at == least) mask[i / 8] &= (uint8_t)~(1u << (i & 7)), reached--;
    }
}

/* Where few are kept the set bits are walked, else every element is stored and the position moves on by its bit;
 * with AVX2 eight at a time. Nothing is written beyond out[k - 1]. */
#ifdef X86
#define BYTES 0x0706050403020100ull /* the indices 0..7 */

VECTOR int64_t compact32_avx2(const uint32_t *x, const uint8_t *mask, int64_t n, int64_t k, uint32_t *out, int64_t *at) {
    int64_t i = 0, to = 0;
    for (; i + 8 <= n && to + 8 <= k; i += 8) {
        uint64_t lanes = _pdep_u64(mask[i / 8], 0x0101010101010101ull) * 0xFF;
        __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)_pext_u64(BYTES, lanes)));
        __m256i v = _mm256_loadu_si256((const __m256i *)(x + i));
        _mm256_storeu_si256((__m256i *)(out + to), _mm256_permutevar8x32_epi32(v, order));
        to += _mm_popcnt_u32(mask[i / 8]);
    }
    *at = to;
    return i;
}

VECTOR int64_t compact16_avx2(const uint16_t *x, const uint8_t *mask, int64_t n, int64_t k, uint16_t *out, int64_t *at) {
    int64_t i = 0, to = 0;
    for (; i + 8 <= n && to + 8 <= k; i += 8) {
        uint64_t lanes = _pdep_u64(mask[i / 8], 0x0101010101010101ull) * 0xFF;
        __m128i order = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t)_pext_u64(BYTES, lanes)));
        order = _mm_add_epi16(_mm_mullo_epi16(order, _mm_set1_epi16(0x0202)), _mm_set1_epi16(0x0100));
        __m128i v = _mm_loadu_si128((const __m128i *)(x + i));
        _mm_storeu_si128((__m128i *)(out + to), _mm_shuffle_epi8(v, order));
        to += _mm_popcnt_u32(mask[i / 8]);
    }
    *at = to;
    return i;
}

VECTOR int64_t expand32_avx2(const uint32_t *v, const uint8_t *mask, int64_t n, int64_t k, uint32_t *out, int64_t *at) {
    int64_t i = 0, from = 0;
    for (; i + 8 <= n && from + 8 <= k; i += 8) {
        uint64_t lanes = _pdep_u64(mask[i / 8], 0x0101010101010101ull) * 0xFF;
        __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)_pdep_u64(BYTES, lanes)));
        __m256i set = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)lanes));
        __m256i kept = _mm256_loadu_si256((const __m256i *)(v + from));
        kept = _mm256_and_si256(_mm256_permutevar8x32_epi32(kept, order), set);
        _mm256_storeu_si256((__m256i *)(out + i), kept);
        from += _mm_popcnt_u32(mask[i / 8]);
    }
    *at = from;
    return i;
}

VECTOR int64_t expand16_avx2(const uint16_t *v, const uint8_t *mask, int64_t n, int64_t k, uint16_t *out, int64_t *at) {
    int64_t i = 0, from = 0;
    for (; i + 8 <= n && from + 8 <= k; i += 8) {
        uint64_t lanes = _pdep_u64(mask[i / 8], 0x0101010101010101ull) * 0xFF;
        __m128i order = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t)_pdep_u64(BYTES, lanes)));
        order = _mm_add_epi16(_mm_mullo_epi16(order, _mm_set1_epi16(0x0202)), _mm_set1_epi16(0x0100));
        __m128i set = _mm_cvtepi8_epi16(_mm_cvtsi64_si128((int64_t)lanes));
        __m128i kept = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(v + from)), order);
        _mm_storeu_si128((__m128i *)(out + i), _mm_and_si128(kept, set));
        from += _mm_popcnt_u32(mask[i / 8]);
    }
    *at = from;
    return i;
}
#endif

#define COMPACT(width)                                                                                         \
    INLINE void compact##width(const uint##width##_t *x, const uint8_t *mask, int64_t n, int64_t k, int vector,   \
                               uint##width##_t *out) {                                                         \
        int64_t at = 0;                                                                                        \
        if (k * 16 < n) {                                                                                      \
            for (int64_t i = 0; i < n; i += 64)                                                                \
                for (uint64_t word = mask_word(mask, n, i); word; word &= word - 1)                            \
                    out[at++] = x[i + LOWEST_BIT(word)];                                                       \
            return;                                                                                            \
        }                                                                                                      \
        for (int64_t i = WITH_AVX2(compact##width, x, mask, n, k, out, &at); at < k; i++) {                    \
            out[at] = x[i];                                                                                    \
            at += mask[i / 8] >> (i & 7) & 1;                                                                  \
        }                                                                                                      \
    }

#define EXPAND(width)                                                                                          \
    INLINE void expand##width(const uint##width##_t *v, const uint8_t *mask, int64_t n, int64_t k, int vector, \
                              uint##width##_t *out) {                                                          \
        int64_t at = 0;                                                                                        \
        if (k * 16 < n) {                                                                                      \
            memset(out, 0, (size_t)n * sizeof *out);                                                           \
            for (int64_t i = 0; i < n; i += 64)                                                                \
                for (uint64_t word = mask_word(mask, n, i); word; word &= word - 1)                            \
                    out[i + LOWEST_BIT(word)] = v[at++];                                                       \
            return;                                                                                            \
        }                                                                                                      \
        for (int64_t i = WITH_AVX2(expand##width, v, mask, n, k, out, &at); i < n; i++) {                      \
            uint32_t bit = mask[i / 8] >> (i & 7) & 1;                                                         \
            out[i] = (uint##width##_t)(v[at < k ? at : k - 1] & (0u - bit));                                   \
            at += bit;                                                                                         \
        }                                                                                                      \
    }

COMPACT(32)
COMPACT(16)
EXPAND(32)
EXPAND(16)

INLINE float rounded(float x, int dtype) {
    uint32_t u = bits_of(x);
    if (dtype == F32) return x;
    return float_of(dtype == BF16 ? (uint32_t)single_to_bfloat(u) << 16 : half_to_single(single_to_half(u)));
}

/* `n` elements of one channel, or (`each`) one of each of `n` channels. */
INLINE void scale_run(const float *x, float *out, int64_t n, int dtype, int back, int each, const float *mean,
                      const float *factor) {
    if (back && each)
        for (int64_t i = 0; i < n; i++) out[i] = rounded(x[i] * factor[i], dtype) + mean[i];
    else if (back)
        for (int64_t i = 0; i < n; i++) out[i] = rounded(x[i] * *factor, dtype) + *mean;
    else if (each)
        for (int64_t i = 0; i < n; i++) out[i] = (x[i] - mean[i]) * factor[i];
    else
        for (int64_t i = 0; i < n; i++) out[i] = (x[i] - *mean) * *factor;
}

/* Elements of the flat tensor, from `first` on: to standard form, or back. `x` and `out` may be the same. */
INLINE void scale_channels(const Job *job, int64_t first, int64_t n, int back, const void *x, void *out) {
    int size = job->dtype == F32 ? 4 : 2, each = job->inner == 1;
    float room[STRIP];
    for (int64_t i = 0, m; i < n; i += m) {
        int64_t run = (first + i) / job->inner, c = run % job->channels;
        int64_t left = each ? job->channels - c : (run + 1) * job->inner - first - i;
        m = left < n - i ? left : n - i;
        if (job->dtype == F32) {
            scale_run((const float *)x + i, (float *)out + i, m, F32, back, each, job->mean + c, job->factor + c);
            continue;
        }
        m = m < STRIP ? m : STRIP;
        const float *wide = widened((const uint8_t *)x + i * size, 0, m, job->dtype, job->vector, room);
        if (job->dtype == BF16)
            scale_run(wide, room, m, BF16, back, each, job->mean + c, job->factor + c);
        else
            scale_run(wide, room, m, F16, back, each, job->mean + c, job->factor + c);
        for (int64_t j = 0; j < m; j++) ((uint16_t *)out)[i + j] = (uint16_t)narrow(bits_of(room[j]), job->dtype);
    }
}

/* Block b; this thread owns those before `to`. */
INLINE void sparsify_block(const Job *job, Scratch *s, int64_t b, int64_t to) {
    int64_t first = b * job->block, n = job->numel - first;
    int64_t k = n < job->block ? job->k_tail : job->k_full;
    n = n < job->block ? n : job->block;
    int wide = job->dtype == F32, full = job->keep == 10000, size = wide ? 4 : 2;
    const uint8_t *x = (const uint8_t *)job->x + first * size;
    uint8_t *mask = full ? NULL : job->mask + first / 8;
    if (job->mean) {
        scale_channels(job, first, n, 0, x, s->standard);
        x = (const uint8_t *)s->standard;
    }
    if (!full) {
        if (job->is_sample) {
            for (int64_t i = 0; i < n; i++) s->key[i] = draw(*job->seed, (uint32_t)(first + i));
            mark(s->key, 1, n, k, job->vector, mask, &s->guess);
        } else if (wide) {
            const uint32_t *w = (const uint32_t *)x;
            for (int64_t i = 0; i < n; i++) s->key[i] = w[i] & 0x7FFFFFFF;
            mark(s->key, 1, n, k, job->vector, mask, &s->guess);
        } else {
            const uint16_t *h = (const uint16_t *)x;
            uint16_t *key = (uint16_t *)s->key;
            for (int64_t i = 0; i < n; i++) key[i] = h[i] & 0x7FFF;
            mark(key, 0, n, k, job->vector, mask, &s->guess);
        }
    }
    if (job->bits == 0) {
        uint8_t *out = (uint8_t *)job->values + b * job->k_full * size;
        if (full)
            memcpy(out, x, (size_t)(n * size));
        else if (wide)
            compact32((const uint32_t *)x, mask, n, k, job->vector, (uint32_t *)out);
        else
            compact16((const uint16_t *)x, mask, n, k, job->vector, (uint16_t *)out);
        if (job->is_sample) {
            float weight = (float)(k ? (double)n / (double)k : 0.0);
            for (int64_t i = 0; i < k; i++) {
                if (wide) {
                    float *v = (float *)out;
                    v[i] = v[i] * weight;
                } else {
                    uint16_t *v = (uint16_t *)out;
                    uint32_t u = job->dtype == BF16 ? (uint32_t)v[i] << 16 : half_to_single(v[i]);
                    u = bits_of(float_of(u) * weight);
                    v[i] = job->dtype == BF16 ? single_to_bfloat(u) : single_to_half(u);
                }
            }
        }
        return;
    }
    if (job->seed) {
        int64_t at = 0;
        for (int64_t i = 0; at < k; i++) {
            s->index[at] = (uint32_t)(first + i);
            at += full ? 1 : mask[i / 8] >> (i & 7) & 1;
        }
    }
    const void *kept = x;
    if (!full && wide) {
        compact32((const uint32_t *)x, mask, n, k, job->vector, (uint32_t *)s->x);
        kept = s->x;
    } else if (!full) {
        compact16((const uint16_t *)x, mask, n, k, job->vector, (uint16_t *)s->key);
        kept = s->key;
    }
    int64_t stride = (job->k_full * job->bits + 7) / 8;
    int64_t room = to == job->blocks ? job->nbytes : to * stride;
    int columns = scale_columns(job->bits, job->layout);
    encode_block(job, s, kept, k, (uint8_t *)job->values + b * stride, room - b * stride, job->scale + b * columns);
}

/* `job->x` is the output here; scale and values the input. */
INLINE void unsparsify_block(const Job *job, Scratch *s, int64_t b) {
    int64_t first = b * job->block, n = job->numel - first;
    int64_t k = n < job->block ? job->k_tail : job->k_full;
    n = n < job->block ? n : job->block;
    int wide = job->dtype == F32, full = job->keep == 10000, size = wide ? 4 : 2;
    int bits = job->bits, vector = job->vector;
    void *out = (uint8_t *)job->x + first * size;
    const uint8_t *mask = full ? NULL : job->mask + first / 8;
    const void *v = (const uint8_t *)job->values + b * job->k_full * size;
    if (bits) {
        const uint8_t *packed = (const uint8_t *)job->values + b * ((job->k_full * bits + 7) / 8);
        int columns = scale_columns(bits, job->layout);
        uint16_t scale[4];
        memcpy(scale, job->scale + b * columns, (size_t)columns * 2);
        uint16_t kind = bits == 1 && (scale[0] & 0x7F80) == 0x7F80 ? scale[0] : 0;
        if (kind) memset(scale, 0, sizeof scale);
        int is_marked = bits > 1 && has_mark(scale, columns, job->layout);
        if (is_marked) turn_mark(scale, columns, job->layout);
        void *kept = full ? out : (void *)s->x;
        int64_t room = (const uint8_t *)job->values + job->nbytes - packed;
        if (is_codebook(bits, job->layout)) {
            uint32_t table[16];
            codebook_table(scale, bits, job->dtype, table);
            int64_t done = WITH_AVX2(look_up, packed, packed + room, k, bits, table, wide, kept);
            int64_t bytes = done / 8 * bits;
            unpack_codes(packed + bytes, room - bytes, k - done, bits, vector, s->codes);
            look_up(s->codes, k - done, table, wide, (uint8_t *)kept + done * size);
        } else if (job->layout == UNIFORM) {
            decode_grid(packed, room, k, scale, bits, UNIFORM, 1, job->dtype, vector, s->codes, kept);
        } else {
            decode_grid(packed, room, k, scale, bits, job->layout, 0, job->dtype, vector, s->codes, kept);
        }
        if (is_marked || kind) unpack_codes(packed, room, k, bits, vector, s->codes);
        if (is_marked) set_marked(s->codes, k, scale[columns - 1], bits, job->layout, job->dtype, kept);
        if (kind) set_codes(s->codes, k, 1, (uint32_t)kind << 16, job->dtype, kept);
        if (full) return;
        v = kept;
    }
    if (full)
        memcpy(out, v, (size_t)(n * size));
    else if (wide)
        expand32(v, mask, n, k, job->vector, out);
    else
        expand16(v, mask, n, k, job->vector, out);
}

/* What was unsparsified, with each channel around its mean again. */
INLINE void restore_block(const Job *job, int64_t b) {
    int64_t first = b * job->block, n = job->numel - first;
    void *out = (uint8_t *)job->x + first * (job->dtype == F32 ? 4 : 2);
    scale_channels(job, first, n < job->block ? n : job->block, 1, out, out);
}

/* ------------------------------------------------------------------------------------------- steps, flags */

typedef struct {
    const void *in;
    void *out;
    int64_t numel;
    int dtype, bits, vector;
    float border[255];    /* ascending; NaN after the last */
    uint32_t table[256];  /* the level of each code, in the pattern of the dtype */
} Steps;

/* How many borders x reaches: 2^bits - 1 of them, searched without a branch. */
INLINE void border_codes(const Steps *job, int64_t from, int64_t n, uint8_t *codes) {
    float room[STRIP];
    int dtype = job->dtype, bits = job->bits, vector = job->vector;
    const float *border = job->border;
    const void *in = (const uint8_t *)job->in + from * (dtype == F32 ? 4 : 2);
    int64_t done = bits <= 4 ? WITH_AVX2(border_codes, in, dtype, n, border, bits, codes) : 0;
    const float *x = widened(in, done, n, dtype, vector, room);
    for (int64_t i = done; i < n; i++) {
        uint32_t at = 0;
        for (uint32_t half = 1u << bits >> 1; half; half >>= 1) at += x[i] >= border[at + half - 1] ? half : 0;
        codes[i] = (uint8_t)at;
    }
}

INLINE void encode_slice(const Steps *job, int64_t from, int64_t to) {
    uint8_t codes[STRIP];
    for (int64_t i = from; i < to; i += STRIP) {
        int64_t n = to - i < STRIP ? to - i : STRIP;
        border_codes(job, i, n, codes);
        int64_t at = i / 8 * job->bits, end = (to * job->bits + 7) / 8;
        pack_codes(codes, n, job->bits, job->vector, (uint8_t *)job->out + at, end - at);
    }
}

INLINE void decode_slice(const Steps *job, int64_t from, int64_t to) {
    uint8_t codes[STRIP];
    const uint8_t *in = (const uint8_t *)job->in + from / 8 * job->bits;
    int64_t n = to - from, done = 0;
    int wide = job->dtype == F32, vector = job->vector;
    uint8_t *out = (uint8_t *)job->out + from * (wide ? 4 : 2);
    int64_t room = (job->numel * job->bits + 7) / 8 - from / 8 * job->bits;
    if (job->bits <= 4) done = WITH_AVX2(look_up, in, in + room, n, job->bits, job->table, wide, out);
    for (int64_t i = done; i < n; i += STRIP) {
        int64_t m = n - i < STRIP ? n - i : STRIP, at = i / 8 * job->bits;
        unpack_codes(in + at, room - at, m, job->bits, vector, codes);
        look_up(codes, m, job->table, wide, out + i * (wide ? 4 : 2));
    }
}

/* --------------------------------------------------------------------------------------- dispatch, threads */

typedef void (*Worker)(const Job *, Scratch *, int64_t, int64_t);
typedef void (*StepsWorker)(const Steps *, int64_t, int64_t);

#define WORKER(suffix, attribute)                                                                       \
    attribute static void sparsify_##suffix(const Job *job, Scratch *s, int64_t from, int64_t to) {     \
        for (int64_t b = from; b < to; b++) sparsify_block(job, s, b, to);                              \
    }                                                                                                   \
    attribute static void unsparsify_##suffix(const Job *job, Scratch *s, int64_t from, int64_t to) {   \
        for (int64_t b = from; b < to; b++) {                                                           \
            unsparsify_block(job, s, b);                                                                \
            if (job->mean) restore_block(job, b);                                                       \
        }                                                                                               \
    }                                                                                                   \
    attribute static void encode_##suffix(const Steps *job, int64_t from, int64_t to) {                 \
        encode_slice(job, from, to);                                                                    \
    }                                                                                                   \
    attribute static void decode_##suffix(const Steps *job, int64_t from, int64_t to) {                 \
        decode_slice(job, from, to);                                                                    \
    }

WORKER(plain, )
#ifdef X86
WORKER(avx2, __attribute__((target("avx2,bmi,bmi2,f16c,popcnt"))))
WORKER(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,bmi,bmi2,f16c,popcnt"))))
#endif

static int forced_level = -1;

/* 0: plain, 1: AVX2, 2: AVX-512. `wanted` < 0 asks for the best the machine has. */
EXPORT int dropit_level(int wanted) {
    int best = 0;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")) best = 1;
    if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        best = 2;
#endif
    forced_level = wanted < 0 || wanted > best ? best : wanted;
    return forced_level;
}

static int level_in_use(void) { return forced_level < 0 ? dropit_level(-1) : forced_level; }

static Worker choose(int back) {
    int level = level_in_use();
#ifdef X86
    if (level == 2) return back ? unsparsify_avx512 : sparsify_avx512;
    if (level == 1) return back ? unsparsify_avx2 : sparsify_avx2;
#endif
    (void)level;
    return back ? unsparsify_plain : sparsify_plain;
}

static StepsWorker choose_steps(int back) {
    int level = level_in_use();
#ifdef X86
    if (level == 2) return back ? decode_avx512 : encode_avx512;
    if (level == 1) return back ? decode_avx2 : encode_avx2;
#endif
    (void)level;
    return back ? decode_plain : encode_plain;
}

/* Returns 0, or 1 where memory ran out. */
static int run(Job *job, int back, int threads) {
    if (job->numel == 0) return 0;
    int64_t blocks = job->blocks;
    int64_t room = job->block < job->numel ? job->block : job->numel;
    /* One contiguous run of blocks a thread. Which block follows which gives first guesses only: no bit of the
     * result depends on the number of threads. */
    int64_t parts = job->numel < 1 << 14 || threads < 1 ? 1 : threads;
    parts = parts < blocks ? parts : blocks;
    Worker worker = choose(back);
    job->vector = forced_level > 0;
    int failed = 0;
#pragma omp parallel for num_threads((int)parts) schedule(static, 1) if (parts > 1) reduction(| : failed)
    for (int64_t part = 0; part < parts; part++) {
        size_t n = (size_t)room + 64;
        n = (n + 63) / 64 * 64;
        uint8_t *memory = malloc(n * (size_t)((job->bits ? 13 : 4) + (job->mean ? 4 : 0)));
        if (!memory) {
            failed = 1;
            continue;
        }
        Scratch s = {0};
        s.key = (uint32_t *)memory;
        if (job->bits) {
            s.x = (float *)(memory + n * 4);
            s.index = (uint32_t *)(memory + n * 8);
            s.codes = memory + n * 12;
        }
        s.standard = (float *)(memory + n * (job->bits ? 13 : 4));
        s.guess = job->dtype == F32 || job->is_sample ? 0x3F800000 : 0x3C00;
        worker(job, &s, blocks * part / parts, blocks * (part + 1) / parts);
        free(memory);
    }
    return failed;
}

static void set_sizes(Job *job) {
    if (job->block == 0) {
        job->block = job->numel ? job->numel : 1;
        job->k_full = job->k_tail = job->numel * job->keep / 10000;
    } else {
        job->k_full = (job->block * job->keep + 5000) / 10000;
        job->k_tail = (job->numel % job->block * job->keep + 5000) / 10000;
    }
    int64_t full = job->numel / job->block, tail = job->numel % job->block;
    job->blocks = full + (tail > 0);
    job->nbytes = full * ((job->k_full * job->bits + 7) / 8);
    if (tail) job->nbytes += (job->k_tail * job->bits + 7) / 8;
}

/* `mean` and `factor`: NULL, or as a job says. */
EXPORT int dropit_sparsify(const void *x, void *values, void *scale, void *mask, const int64_t *seed,
                           const float *mean, const float *factor, int64_t channels, int64_t inner, int64_t numel,
                           int64_t keep, int64_t block, int dtype, int bits, int layout, int is_sample, int threads) {
    Job job = {.x = x, .values = values, .scale = scale, .mask = mask, .numel = numel, .keep = keep, .block = block};
    job.seed = seed, job.dtype = dtype, job.bits = bits, job.layout = layout, job.is_sample = is_sample;
    job.mean = mean, job.factor = factor, job.channels = channels, job.inner = inner;
    set_sizes(&job);
    return run(&job, 0, threads);
}

EXPORT int dropit_unsparsify(void *out, void *values, void *scale, void *mask, const float *mean, const float *factor,
                             int64_t channels, int64_t inner, int64_t numel, int64_t keep, int64_t block, int dtype,
                             int bits, int layout, int threads) {
    Job job = {.x = out, .values = values, .scale = scale, .mask = mask, .numel = numel, .keep = keep, .block = block};
    job.dtype = dtype, job.bits = bits, job.layout = layout;
    job.mean = mean, job.factor = factor, job.channels = channels, job.inner = inner;
    set_sizes(&job);
    return run(&job, 1, threads);
}

static void run_steps(Steps *job, int back, int threads) {
    int64_t slices = (job->numel + SLICE - 1) / SLICE;
    StepsWorker worker = choose_steps(back);
    job->vector = forced_level > 0;
    threads = threads < 1 ? 1 : threads;
#pragma omp parallel for num_threads(threads) if (slices > 1)
    for (int64_t i = 0; i < slices; i++) {
        int64_t end = (i + 1) * SLICE;
        worker(job, i * SLICE, end < job->numel ? end : job->numel);
    }
}

EXPORT void dropit_encode_steps(const void *x, void *packed, const float *borders, int64_t numel, int count, int dtype,
                                int bits, int threads) {
    Steps job = {x, packed, numel, dtype, bits, 0, {0}, {0}};
    for (int j = 0; j < (1 << bits) - 1; j++) job.border[j] = j < count ? borders[j] : NAN;
    run_steps(&job, 0, threads);
}

/* A code without a level has the last one. */
EXPORT void dropit_decode_steps(const void *packed, void *out, const float *levels, int64_t numel, int count, int dtype,
                                int bits, int threads) {
    Steps job = {packed, out, numel, dtype, bits, 0, {0}, {0}};
    int codes = 1 << bits, room = codes < 16 ? 16 : codes;
    for (int c = 0; c < room; c++) {
        int at = c & (codes - 1);
        job.table[c] = narrow(bits_of(levels[at < count ? at : count - 1]), dtype);
    }
    run_steps(&job, 1, threads);
}

EXPORT void dropit_pack(const uint8_t *codes, uint8_t *out, int64_t count, int bits, int threads) {
    int64_t slices = (count + SLICE - 1) / SLICE;
    int vector = level_in_use() > 0;
    threads = threads < 1 ? 1 : threads;
#pragma omp parallel for num_threads(threads) if (slices > 1)
    for (int64_t i = 0; i < slices; i++) {
        int64_t first = i * SLICE, n = count - first < SLICE ? count - first : SLICE;
        if (bits == 1) { /* flags: one multiplication, where join8 has three steps */
            for (int64_t j = 0; j + 8 <= n; j += 8) {
                uint64_t v;
                memcpy(&v, codes + first + j, 8);
                out[(first + j) / 8] = flags_to_byte(v);
            }
            if (n % 8) pack_codes(codes + first + n / 8 * 8, n % 8, 1, 0, out + (first + n) / 8, 1);
        } else {
            pack_codes(codes + first, n, bits, vector, out + first / 8 * bits, (n * bits + 7) / 8);
        }
    }
}

EXPORT void dropit_unpack(const uint8_t *in, uint8_t *codes, int64_t count, int bits, int threads) {
    int64_t slices = (count + SLICE - 1) / SLICE;
    int vector = level_in_use() > 0;
    threads = threads < 1 ? 1 : threads;
#pragma omp parallel for num_threads(threads) if (slices > 1)
    for (int64_t i = 0; i < slices; i++) {
        int64_t first = i * SLICE, n = count - first < SLICE ? count - first : SLICE, whole = n / 8 * 8;
        int64_t at = first / 8 * bits, size = (count * bits + 7) / 8;
        unpack_codes(in + at, size - at, whole, bits, vector, codes + first);
        if (n % 8) {
            uint8_t rest[8];
            at += whole / 8 * bits;
            unpack_codes(in + at, size - at, n % 8, bits, 0, rest);
            memcpy(codes + first + whole, rest, (size_t)(n % 8));
        }
    }
}
