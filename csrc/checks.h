// What the host and the CUDA functions ask of their arguments.
#pragma once

#include "hpcloss.h"

namespace hpcloss {

constexpr int64_t kMaxIndex32 = 0x7FFFFFFF;

inline bool is_index(int32_t type) { return type == HPCLOSS_INT32 || type == HPCLOSS_INT64; }

inline int32_t check_rows(int64_t n, int32_t index_type) {
  if (!is_index(index_type)) return HPCLOSS_ERROR_TYPE;
  if (n < 0 || (index_type == HPCLOSS_INT32 && n > kMaxIndex32)) return HPCLOSS_ERROR_SIZE;
  return HPCLOSS_OK;
}

// Of arrays in host memory: whether offsets [count + 1] ascend within n rows.
template <class Index>
int32_t check_offsets(const Index* offsets, int64_t count, int64_t n) {
  if (offsets[0] < 0) return HPCLOSS_ERROR_OFFSETS;
  for (int64_t i = 0; i < count; ++i) {
    if (offsets[i + 1] < offsets[i] || offsets[i + 1] > n) return HPCLOSS_ERROR_OFFSETS;
  }
  return HPCLOSS_OK;
}

inline int32_t check_regions(const hpcloss_regions* regions, int64_t n, int64_t num_regions) {
  if (!regions) return HPCLOSS_ERROR_NULL;
  if (num_regions < 1) return HPCLOSS_ERROR_SIZE;
  if (regions->ids) return is_index(regions->ids_type) ? HPCLOSS_OK : HPCLOSS_ERROR_TYPE;
  if (regions->axes < 0 || regions->axes > HPCLOSS_MAX_AXES) return HPCLOSS_ERROR_SIZE;
  int64_t pixels = 1, cells = 1;
  for (int axis = 0; axis < regions->axes; ++axis) {
    const int64_t extent = regions->extent[axis], cell = regions->cell[axis];
    if (extent < 1 || cell < 1 || extent > (n > 1 ? n : 1) / pixels) return HPCLOSS_ERROR_SIZE;
    pixels *= extent;
    cells *= (extent - 1) / cell + 1;
  }
  if (n % pixels) return HPCLOSS_ERROR_SIZE;
  const int64_t images = n / pixels;
  return cells * (regions->per_image && images > 1 ? images : 1) <= num_regions ? HPCLOSS_OK : HPCLOSS_ERROR_SIZE;
}

// The same regions with as few axes as possible, at least one: an axis with one cell joins the one before it, and no cell
// is wider than its axis.
inline hpcloss_regions fewest_axes(const hpcloss_regions& regions) {
  hpcloss_regions joined = regions;
  joined.axes = 0;
  for (int axis = 0; axis < regions.axes; ++axis) {
    const int64_t extent = regions.extent[axis], cell = regions.cell[axis] < extent ? regions.cell[axis] : extent;
    if (joined.axes && cell == extent) {
      joined.extent[joined.axes - 1] *= extent;
      joined.cell[joined.axes - 1] *= extent;
    } else {
      joined.extent[joined.axes] = extent;
      joined.cell[joined.axes++] = cell;
    }
  }
  if (!joined.axes) joined.extent[0] = joined.cell[0] = joined.axes = 1;
  return joined;
}

inline int32_t check_class_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                                int64_t num_regions, int64_t num_classes, const int64_t* ignore, int64_t num_ignore,
                                const void* order, const void* offsets, int32_t index_type, const int64_t* outside) {
  if (const int32_t error = check_rows(n, index_type)) return error;
  if (label_type != HPCLOSS_UINT8 && !is_index(label_type)) return HPCLOSS_ERROR_TYPE;
  if (const int32_t error = check_regions(regions, n, num_regions)) return error;
  // Segments are numbered by 32-bit words, with one number more for the pixels that are ignored.
  if (num_classes < 1 || num_classes > (kMaxIndex32 - 1) / num_regions) return HPCLOSS_ERROR_SIZE;
  if (num_ignore < 0 || num_ignore > HPCLOSS_MAX_IGNORED) return HPCLOSS_ERROR_SIZE;
  if (!offsets || !outside || (num_ignore && !ignore) || (n && (!labels || !order))) return HPCLOSS_ERROR_NULL;
  return HPCLOSS_OK;
}

inline int32_t check_class_intervals(const void* offsets, int64_t num_regions, int64_t num_classes, int64_t n,
                                     int32_t index_type, const void* pos_start, const void* pos_end,
                                     const void* self_pos, const void* anchor_start, const void* anchor_end,
                                     const void* key_start, const void* key_end) {
  if (const int32_t error = check_rows(n, index_type)) return error;
  if (num_regions < 1 || num_classes < 1 || num_classes > (kMaxIndex32 - 1) / num_regions) return HPCLOSS_ERROR_SIZE;
  if (!offsets || !anchor_start || !anchor_end || !key_start || !key_end) return HPCLOSS_ERROR_NULL;
  return n && (!pos_start || !pos_end || !self_pos) ? HPCLOSS_ERROR_NULL : HPCLOSS_OK;
}

inline int32_t check_label_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                                int64_t num_regions, const int64_t* ignore, int64_t num_ignore, const void* order,
                                int32_t index_type, const void* pos_start, const void* pos_end, const void* self_pos,
                                const void* anchor_start, const void* anchor_end, const void* key_start,
                                const void* key_end) {
  if (const int32_t error = check_rows(n, index_type)) return error;
  if (label_type != HPCLOSS_UINT8 && !is_index(label_type)) return HPCLOSS_ERROR_TYPE;
  if (const int32_t error = check_regions(regions, n, num_regions)) return error;
  // Twice their number, and one more, are 32-bit words.
  if (num_regions > (kMaxIndex32 - 1) / 2) return HPCLOSS_ERROR_SIZE;
  if (num_ignore < 0 || num_ignore > HPCLOSS_MAX_IGNORED) return HPCLOSS_ERROR_SIZE;
  if (!anchor_start || !anchor_end || !key_start || !key_end || (num_ignore && !ignore)) return HPCLOSS_ERROR_NULL;
  return n && (!labels || !order || !pos_start || !pos_end || !self_pos) ? HPCLOSS_ERROR_NULL : HPCLOSS_OK;
}

inline int32_t check_pair_counts(const void* pos_start, const void* pos_end, const void* self_pos,
                                 const void* anchor_start, const void* anchor_end, const void* key_start,
                                 const void* key_end, int64_t n, int64_t num_regions, int32_t index_type,
                                 const void* positives, const void* negatives) {
  if (const int32_t error = check_rows(n, index_type)) return error;
  if (num_regions < 1) return HPCLOSS_ERROR_SIZE;
  if (!anchor_start || !anchor_end || !key_start || !key_end) return HPCLOSS_ERROR_NULL;
  return n && (!pos_start || !pos_end || !self_pos || !positives || !negatives) ? HPCLOSS_ERROR_NULL : HPCLOSS_OK;
}

inline int32_t check_sample(const void* order, const void* offsets, int32_t index_type, int64_t n,
                            int64_t num_intervals, int64_t k, int64_t max_k, int32_t kind, const void* values,
                            int64_t num_pixels, const int64_t* seed, const void* chosen, const void* chosen_offsets) {
  if (const int32_t error = check_rows(n, index_type)) return error;
  if (kind < HPCLOSS_UNIFORM || kind > HPCLOSS_HARD_EASY) return HPCLOSS_ERROR_TYPE;
  if (n > 0xFFFFFFFFLL || num_intervals < 0 || k < 1 || k > max_k || num_pixels < 0) return HPCLOSS_ERROR_SIZE;
  if (num_intervals > INT64_MAX / 8 / k) return HPCLOSS_ERROR_SIZE;
  if (!offsets || !chosen_offsets || !seed || (n && !order) || (num_intervals && !chosen)) return HPCLOSS_ERROR_NULL;
  if (n && kind != HPCLOSS_UNIFORM && !values) return HPCLOSS_ERROR_NULL;
  return HPCLOSS_OK;
}

inline int32_t check_sample_positives(const void* pos_start, const void* pos_end, const void* self_pos,
                                      int32_t index_type, int64_t n, int64_t k, const int64_t* seed,
                                      const void* rows) {
  if (const int32_t error = check_rows(n, index_type)) return error;
  if (k < 1 || k > kMaxIndex32 || n > INT64_MAX / 8 / k) return HPCLOSS_ERROR_SIZE;
  if (!seed || (n && (!pos_start || !pos_end || !self_pos || !rows))) return HPCLOSS_ERROR_NULL;
  return HPCLOSS_OK;
}

}  // namespace hpcloss
